"""The state of any optimizer in 8 or 4 bits: decoded before each update, encoded after it."""

import functools
import itertools
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from ..sharding.boxed_state import box_parts, box_state, named_leaves
from ..tree.cores import cores
from ..tree.flax_boxes import is_box, rebox_like, unbox, unbox_cores
from ..tree.flax_serialization import register_with_flax
from ..tree.state_roles import Undeclared, register_state, roles_of, walk
from ..util.validation import check_choice, check_int
from .dynamic_8bit import GENERATOR, LINEAR, LINEAR_4BIT, SQUARE, Code
from .quantized_array import (
    TAKES_CODES,
    block_of,
    is_large,
    is_quantized,
    quantize,
    without_keys,
)
from .staged_update import update_in_stages
from .symmetric_16bit import quantize_symmetric


CODES: dict[str, dict[int, Code]] = {  # of each role, by bits; the first is the default
    "linear": {8: LINEAR, 4: LINEAR_4BIT},
    "full": {8: LINEAR, 4: LINEAR_4BIT},
    "square": {8: SQUARE},
    "basis": {8: LINEAR},
}
SYMMETRIC = ("fisher", "root")
ROLES = (*CODES, *SYMMETRIC)
AT_RANDOM = ("linear", "full", "square")


class QuantizedState(NamedTuple):
    """The state of :func:`quantized`.

    Attributes:
      inner_state: the state of the optimizer, with a :class:`QuantizedArray` in place of each
        encoded array.
      key: of the next stochastic rounding, two words of uint32; None without such rounding.
    """

    inner_state: PyTree
    key: Array | None


register_state(QuantizedState, key="scalar")


def quantized(
    tx: optax.GradientTransformation,
    roles: Sequence[str] | Mapping[str, int] = ("linear", "square", "full"),
    *,
    stochastic: Sequence[str] = ("square",),
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its moments in 8 bits between steps, in blocks of at most 128 numbers and a scale.

    Moments that are linear in gradients may be in 4 bits.

    8-bit AdamW is `quantized(optax.adamw(1e-3))`. Under `jax.jit` large arrays are decoded a few at
    a time (`staged_update.py`); a refresh decodes the state of one matrix at a time. The codes are
    described in `dynamic_8bit.py`. Second moments are encoded by their square roots, since Adam
    divides by these. Encoded themselves, small second moments become 0: for gradients in blocks of
    128 whose sizes span two decades, the largest of Adam's answers in 4000 steps was then 17,000,
    and 1.6 with square roots.

    Arrays of fewer than 4096 entries are not encoded, as in 8-bit Adam, and neither are arrays
    whose last axis has no divisor from 16 to 128.

    Args:
      tx: any optimizer, of this library's transformations and Optax's. For a state of your own,
        :func:`register_state` declares its roles; a large array without a role is not encoded, with
        a warning at init. `optax.MultiSteps` goes around `quantized`: inside, it would lose small
        gradients in its sum.
      roles: which arrays are encoded, or a mapping to the bits of each, such as `{"linear": 8,
        "square": 8, "full": 4}`:

        - `"linear"`: moments that are linear in gradients, as momentum is. 8 or 4 bits.
        - `"full"`: the momentum of a projection's residual, one number per weight. 8 or 4 bits.
        - `"square"`: Adam's second moments.
        - `"basis"`: bases of projections, except random ones. Decoded bases are orthonormalised by
          one iteration, for r/n of the cost of a projection, which reduces |PᵀP − I| from 1.3e-2 to
          1.3e-4. Without it 15 to 43 % of an orthogonalised residual lay in the span of P. Encoding
          changes the span by 1.2 %. Codes change only at a refresh.
        - `"fisher"`, `"root"`: L of :func:`scale_by_core_fisher` and its inverse root, in 16 bits
          for each pair of entries (`symmetric_16bit.py`); 8 bits of L would make it indefinite. At
          `damping=0.1` answers are right to 0.2 %, at the smallest damping, 1e-3, to 7 %. In a
          state of your own both must be symmetric and semidefinite; arrays that are not r x r are
          not encoded.
      stochastic: which of the roles "linear", "full" and "square" are rounded stochastically, to
        one of the two nearest values with the right mean. Second moments should be: they move by
        0.1 % in a step, less than the code resolves, so rounding to nearest keeps them constant
        relative to the largest of their block. After one gradient of 100 times the usual size,
        steps were 1.3 times too long for 3000 steps, and right within 1 % with stochastic rounding.
        Momentum moves by 10 % and has less noise with rounding to nearest.
      seed: of the stochastic rounding.

    Returns:
      A transformation with state :class:`QuantizedState`. :func:`sharded` and :func:`offload` go
      around it. Entries that are not finite are decoded as NaN.

    Raises:
      TypeError, ValueError: if an argument is out of range; or, at init, inside a projection or
        around another `quantized`.

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
        if not isinstance(given, Collection):
            raise TypeError(f"`{name}` must be names of roles, some of {[*known]}, got {given!r}.")
        for role in (given,) if isinstance(given, str) else given:
            check_choice(name, role, known)
    bits = roles if isinstance(roles, Mapping) else {}
    for role, number in bits.items():
        check_choice(f"roles[{role!r}]", number, CODES.get(role, {16: None}))
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
        register_with_flax()
        state = unbox_cores(tx.init(params))
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
                return quantize_symmetric(x) if _is_symmetric(x) else x
            block = block_of(x)
            if block is None:
                return x
            code = CODES[role][bits.get(role, 8)]
            key = _key_of(now, i) if role in stochastic else None
            return quantize(code, x, block, key, 0 if spec is None else len(spec.batch))

        encoded = jax.tree.map(_boxes_inside, state, walk(state, first), is_leaf=is_box)
        return QuantizedState(box_state(encoded, named_leaves(params)), following)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        boxed, state = state, jax.tree.map(_boxes_outside, unbox_cores(state), is_leaf=is_quantized)
        leaves, treedef = jax.tree.flatten(state.inner_state, is_leaf=is_quantized)
        now, following = _split(state.key)
        for i, (x, (role, _)) in enumerate(zip(leaves, roles_of(leaves, treedef), strict=True)):
            if is_quantized(x) and role in stochastic:
                leaves[i] = x.with_key(_key_of(now, i))
        taken = _taken_by_their_own(treedef)
        own = [i for i, x in enumerate(leaves) if is_quantized(x) and i not in taken]

        def on_leaves(leaves: list[Any]):
            before = [*leaves]
            for i in own:
                before[i] = leaves[i].decode()
            moved, after = tx.update(updates, treedef.unflatten(before), params, **extra_args)
            new = treedef.flatten_up_to(after)
            for i in own:
                new[i] = leaves[i].encode(new[i])
            return moved, new

        updates, new = update_in_stages(on_leaves, leaves, own)
        new = treedef.unflatten(without_keys(new))
        return updates, rebox_like(QuantizedState(new, following), boxed)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.lru_cache(maxsize=64)
def _taken_by_their_own(treedef: Any) -> frozenset[int]:
    """The leaves of a state that are in a state whose transformation takes codes."""
    is_taker = lambda x: type(x) in TAKES_CODES
    numbered = treedef.unflatten(range(treedef.num_leaves))
    takers = filter(is_taker, jax.tree.leaves(numbered, is_leaf=is_taker))
    return frozenset(i for taker in takers for i in jax.tree.leaves(taker))


def _boxes_inside(box: Any, encoded: Any) -> Any:
    """For a box around an encoded array: the codes and the scales in boxes."""
    if not is_box(box):
        return encoded
    parts = jax.tree.leaves(encoded, is_leaf=is_quantized)
    return box_parts(box, parts[0]) if any(map(is_quantized, parts)) else encoded


def _boxes_outside(x: Any) -> Any:
    """The inverse of `_boxes_inside`."""
    if not is_quantized(x) or not is_box(x.codes):
        return x
    return jax.tree.structure(x.codes).unflatten([unbox(x)])


def _not_folded(x: Any) -> Any:
    """Hides x from constant folding, so that XLA does not run the encoder at compile time."""
    if not is_large(x):
        return x
    return x + lax.optimization_barrier(jnp.zeros((), x.dtype))


def _is_symmetric(x: Any) -> bool:
    """Whether x is r x r; other arrays of a Fisher stage are small."""
    return x.ndim >= 2 and x.shape[-1] == x.shape[-2] and is_large(x)


def _split(key: Array | None) -> tuple[Array | None, Array | None]:
    """A key for this update and the data of the next."""
    if key is None:
        return None, None
    now, following = jax.random.split(jax.random.wrap_key_data(key, impl=GENERATOR))
    return now, jax.random.key_data(following)


def _key_of(key: Array | None, i: int) -> Array | None:
    """The key of the i-th array of a state."""
    return None if key is None else jax.random.fold_in(key, i)


def _warn_undeclared(state: PyTree) -> None:
    """Warns of large arrays that are not encoded because their role is not declared."""
    fields: dict[str, None] = {}

    def note(x, role, spec):
        if isinstance(role, Undeclared) and block_of(x) is not None:
            fields[str(role)] = None
        return x

    walk(state, note)
    if fields:
        warnings.warn(
            f"`quantized` does not encode {', '.join(fields)}: declare its role with "
            "`natgalore.register_state`.",
            stacklevel=3,
        )
