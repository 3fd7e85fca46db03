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

from ..tree.leaf_spec import cores
from ..tree.state_roles import Undeclared, register_state, walk
from ..util.validation import check_choice, check_int
from .dynamic_8bit import GENERATOR, LINEAR, SQUARE, Code
from .quantized_array import (
    basis,
    block_of,
    coded,
    is_large,
    is_quantized,
    keep_codes_if_unchanged,
)
from .staged_update import in_parts
from .symmetric_16bit import coded as coded_symmetric


CODES: dict[str, Code] = {"linear": LINEAR, "square": SQUARE, "basis": LINEAR}
SYMMETRIC = ("fisher", "root")
ROLES = (*CODES, *SYMMETRIC)
AT_RANDOM = ("linear", "square", "basis")


class QuantizedState(NamedTuple):
    """What :func:`quantized` remembers.

    Attributes:
      inner_state: the state of the optimizer, with a :class:`QuantizedArray` in place of each
      array that is kept in 8 bits; all others are as they were.
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
    `quantized(optax.adamw(1e-3))`. Under `jax.jit` large arrays are decoded a few at a time, as far
    as `tx` treats them apart (`staged_update.py`). `dynamic_8bit.py` explains the codes.
    Second moments are kept by their roots, since Adam divides by these. In blocks of 128 gradients,
    noise of sizes that span two decades (95 %), the largest of Adam's answers in 4000 steps was
    then 1.6; with second moments as they are the small ones became 0, and it was 17,000.

    Arrays of fewer than 4096 numbers stay as they are, as in 8-bit Adam, and so do those whose last
    axis has no divisor from 16 to 128.

    Args:
      tx: any optimizer, of this library's transformations and Optax's. Of a state of your own
        :func:`register_state` tells what it holds; a large array of which that is not known stays
        as it is, with a warning at init. `optax.MultiSteps` goes around `quantized`, or small
        gradients are lost where it sums them.
      roles: what is encoded, each a choice of its own:

        - `"linear"`: what is linear in gradients, as momentum is.
        - `"square"`: Adam's second moments.
        - `"basis"`: bases of projections, but random ones. Decoded, their columns are made
          orthonormal again, for r/n of what projecting costs: from 1.3 % off to 1.3e-4, without
          which a whitened residual had 15 to 43 % of its size within the span. Their span is
          turned by 1.2 %. Codes change at a refresh alone.
        - `"fisher"`, `"root"`: L of :func:`scale_by_core_fisher`, and its inverse root, in a code
          of their own (`symmetric_16bit.py`): 8 bits of L would make it indefinite, and its root
          NaN; half of a symmetric matrix says nothing, and 16 bits of the other half take as
          much. At `damping=0.1` answers are right to 0.2 %, at the least, 1e-3, to 7 %. Of a state
          of your own both must be symmetric and semidefinite; what is not r x r stays as it is.
      stochastic: which of them are rounded to one of the two nearest values at random, so that the
        mean is right. Second moments should be: in a step they move by 0.1 %, less than the code
        resolves, so that to nearest they stay where they are relative to the largest of their
        block, and when it falls, after one gradient of 100 times the usual size, all fall with it:
        steps were 1.3 times too long 3000 steps after it, and to within 1 % right if rounded at
        random. Momentum moves by 10 % and has less noise to nearest. Fishers are rounded
        to nearest.
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
    for name, given, known in (("roles", roles, ROLES), ("stochastic", stochastic, AT_RANDOM)):
        for role in (given,) if isinstance(given, str) else given:
            check_choice(name, role, known)
    seed = check_int("seed", seed, minimum=0)
    tx = optax.with_extra_args_support(tx)
    roles, stochastic = (
        {given} if isinstance(given, str) else set(given) for given in (roles, stochastic)
    )
    random = bool(roles & stochastic)

    def init(params: PyTree) -> QuantizedState:
        if cores(params):
            raise ValueError(
                "`quantized` goes around `natgalore.project`, not into it: quantized(chain(...))."
            )
        state = tx.init(params)
        if any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized))):
            raise ValueError("`tx` is quantized already: give `quantized` the optimizer itself.")
        _warn_undeclared(state)
        key = jax.random.key_data(jax.random.key(seed, impl=GENERATOR)) if random else None
        now, following = _split(key)
        place = itertools.count()

        def first(x, role, spec):
            i = next(place)
            if role not in roles:
                return x
            x = _not_folded(x)
            if role in SYMMETRIC:
                return coded_symmetric(x) if _is_symmetric(x) else x
            block = block_of(x)
            if block is None:
                return x
            return coded(CODES[role], x, block, _key_of(now, i) if role in stochastic else None)

        return QuantizedState(walk(state, first), following)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        leaves, treedef = jax.tree.flatten(state.inner_state, is_leaf=is_quantized)
        role_at = _roles(treedef)
        in_codes = [i for i, x in enumerate(leaves) if is_quantized(x)]
        now, following = _split(state.key)

        def inner(arrays):
            before = treedef.unflatten(_with(leaves, in_codes, arrays))
            moved, after = tx.update(updates, before, params, **extra_args)
            new = treedef.flatten_up_to(after)
            return (moved, new), [new[i] for i in in_codes]

        def read(place, x):
            return basis(x) if role_at[in_codes[place]] == "basis" else x.array()

        def write(place, before, after):
            i = in_codes[place]
            x, role = leaves[i], role_at[i]
            if role in SYMMETRIC:
                return x.anew(after)
            key = _key_of(now, i) if role in stochastic else None
            new = coded(CODES[role], after, after.shape[-1] // x.scales.shape[-1], key)
            return keep_codes_if_unchanged(x, before, after, new) if role == "basis" else new

        (updates, new), codes = in_parts(inner, [leaves[i] for i in in_codes], read, write)
        inner_state = treedef.unflatten(_with(new, in_codes, codes))
        return updates, QuantizedState(inner_state, following)

    return optax.GradientTransformationExtraArgs(init, update)


def _roles(treedef: Any) -> list[Any]:
    """The role of each array of a state of this structure."""
    found: list[Any] = [None] * treedef.num_leaves

    def note(i, role, spec):
        found[i] = role
        return i

    walk(treedef.unflatten(range(treedef.num_leaves)), note)
    return found


def _with(leaves: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    """The leaves with those at `places` replaced."""
    left = dict(zip(places, others, strict=True))
    return [left.get(i, x) for i, x in enumerate(leaves)]


def _not_folded(x: Any) -> Any:
    """x, which is constant at init, unknown to the compiler: it would encode it as it compiles."""
    if not is_large(x):
        return x
    return x + lax.optimization_barrier(jnp.zeros((), x.dtype))


def _is_symmetric(x: Any) -> bool:
    """Whether x is r x r; what else has a role of the Fisher is small."""
    return x.ndim >= 2 and x.shape[-1] == x.shape[-2] and is_large(x)


def _split(key: Array | None) -> tuple[Array | None, Array | None]:
    """The words of a key as one for now and the words of the next."""
    if key is None:
        return None, None
    now, following = jax.random.split(jax.random.wrap_key_data(key, impl=GENERATOR))
    return now, jax.random.key_data(following)


def _key_of(key: Array | None, i: int) -> Array | None:
    """The key of the i-th array of a state."""
    return None if key is None else jax.random.fold_in(key, i)


def _warn_undeclared(state: PyTree) -> None:
    """Says which large arrays stay as they are because nobody has said what they hold."""
    fields: dict[str, None] = {}

    def note(x, role, spec):
        if isinstance(role, Undeclared) and block_of(x) is not None:
            fields[str(role)] = None
        return x

    walk(state, note)
    if fields:
        warnings.warn(
            f"`quantized` leaves {', '.join(fields)} as it is: `natgalore.register_state` says "
            "what a state holds.",
            stacklevel=3,
        )
