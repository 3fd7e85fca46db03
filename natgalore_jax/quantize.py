"""Keeping the state of any optimizer in 8 bits: decoded before each update, encoded after it."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from .checks import check_choice, check_int
from .codes import GENERATOR, LINEAR, SQUARE, Code, block_size, coded, decoded, is_coded
from .roles import Undeclared, register_state, walk
from .spec import cores


ROLES: dict[str, Code] = {"linear": LINEAR, "square": SQUARE, "basis": LINEAR}
SMALLEST = 4096  # numbers of an array that is worth it, as in 8-bit Adam


class QuantizedState(NamedTuple):
    """What :func:`quantized` remembers.

    Attributes:
      inner_state: the state of the optimizer, with a :class:`Coded` in place of each array that is
        kept in 8 bits; all others are as they were.
      key: that of the next rounding, two words of uint32; None where nothing is rounded at random.
    """

    inner_state: PyTree
    key: Array | None


register_state(QuantizedState, key="scalar")


def quantized(
    tx: optax.GradientTransformation,
    roles: Sequence[str] = ("linear", "square"),
    *,
    stochastic: Sequence[str] = ("square",),
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its moments in 8 bits between steps, in blocks of at most 128 numbers and a scale.

    Each update decodes the state, is that of `tx`, and encodes what comes of it, so 8-bit AdamW is
    `quantized(optax.adamw(1e-3))`. Which code is used for what, and why, is in `codes.py`. Second
    moments are kept by their roots, since Adam divides by these. In blocks of 128 gradients, noise
    of sizes that span two decades (95 %), the largest of Adam's answers in 4000 steps was then 1.6;
    with second moments as they are the small ones became 0, and it was 17,000.

    Arrays of fewer than 4096 numbers stay as they are, as in 8-bit Adam, and so do those whose last
    axis has no divisor from 16 to 128.

    Args:
      tx: any optimizer, of this library's transformations and Optax's. Of a state of your own
        :func:`register_state` tells what it holds; a large array of which that is not known stays
        as it is, with a warning at init. `optax.MultiSteps` goes around `quantized`, or small
        gradients are lost where it sums them.
      roles: what is encoded: `"linear"`, what is linear in gradients, as momentum is; `"square"`,
        Adam's second moments; `"basis"`, the bases of projections but random ones. PᵀP is then
        the identity to 1.5 % (r = 256, m = 1024). Not Fisher windows: their Gram matrix is that of
        cores in full, and `window_dtype` of :func:`scale_by_fisher` knows of it.
      stochastic: which of them are rounded to one of the two nearest values at random, so that the
        mean is right. Second moments should be: in a step they move by 0.1 %, less than the code
        resolves, so that to nearest they stay where they are relative to the largest of their
        block, and when it falls, after one gradient of 100 times the usual size, all fall with it:
        steps were 1.3 times too long 3000 steps after it, and to within 1 % right if rounded at
        random. Momentum moves by 10 % and has less noise to nearest.
      seed: of that rounding.

    Returns:
      A transformation with state :class:`QuantizedState`. Inside of :func:`sharded` and
      :func:`offload`, if these are used. What is not finite in the state comes back as NaN.

    Raises:
      TypeError, ValueError: if an argument is out of range; or, at init, inside a projection, whose
        transport would meet codes, or around another `quantized`.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore
      >>> tx = quantized(natgalore.galore(1e-3, rank=16))
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})
      >>> nu = state.inner_state[0].inner_state[1].nu["kernel"].value
      >>> nu.codes.shape, nu.codes.dtype.name, nu.scales.shape
      ((16, 256), 'uint8', (16, 8))

    Reference: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.
    """
    for name, given in (("roles", roles), ("stochastic", stochastic)):
        for role in (given,) if isinstance(given, str) else given:
            check_choice(name, role, ROLES)
    check_int("seed", seed, minimum=0)
    tx = optax.with_extra_args_support(tx)
    roles, stochastic = (
        {given} if isinstance(given, str) else set(given) for given in (roles, stochastic)
    )
    random = bool(roles & stochastic)

    def encoded(state: PyTree, key: Array | None) -> QuantizedState:
        now, following = (None, None) if key is None else jax.random.split(_typed(key))
        leaf = itertools.count()

        def one(x, role, spec):
            i = next(leaf)
            block = _block(x)
            if role not in roles or block is None:
                return x
            with_key = now is not None and role in stochastic
            return coded(ROLES[role], x, block, jax.random.fold_in(now, i) if with_key else None)

        words = None if following is None else jax.random.key_data(following)
        return QuantizedState(walk(state, one), words)

    def init(params: PyTree) -> QuantizedState:
        if cores(params):
            raise ValueError(
                "`quantized` goes around `natgalore.project`, not into it: quantized(chain(...))."
            )
        state = tx.init(params)
        if any(map(is_coded, jax.tree.leaves(state, is_leaf=is_coded))):
            raise ValueError("`tx` is quantized already: give `quantized` the optimizer itself.")
        _warn_undeclared(state)
        key = jax.random.key_data(jax.random.key(seed, impl=GENERATOR)) if random else None
        return encoded(jax.tree.map(_not_folded, state), key)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        updates, inner_state = tx.update(updates, decoded(state.inner_state), params, **extra_args)
        return updates, encoded(inner_state, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def _not_folded(x: Any) -> Any:
    """x, which is constant at init, unknown to the compiler: it would encode it as it compiles."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x + lax.optimization_barrier(jnp.zeros((), x.dtype))


def _block(x: Any) -> int | None:
    """How many numbers of x share a scale; None where x stays as it is."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.size < SMALLEST:
        return None
    return block_size(x.shape[-1])


def _typed(key: Array) -> Array:
    return jax.random.wrap_key_data(key, impl=GENERATOR)


def _warn_undeclared(state: PyTree) -> None:
    """Says which large arrays stay as they are because nobody has said what they hold."""
    fields: dict[str, None] = {}

    def note(x, role, spec):
        if isinstance(role, Undeclared) and _block(x) is not None:
            fields[str(role)] = None
        return x

    walk(state, note)
    if fields:
        warnings.warn(
            f"`quantized` leaves {', '.join(fields)} as it is: `natgalore.register_state` says "
            "what a state holds.",
            stacklevel=3,
        )
