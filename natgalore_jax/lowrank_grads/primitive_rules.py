"""What becomes of a tagged weight under one operation of a program: a rule for each that has one.

A rule gives another :class:`TangentWeight`, or an array that has what the weight could add
attached to it; or None, where it does not hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core
from jaxtyping import Array

from ..util.jaxprs import apply
from .dot_general import dot, plain
from .tangent_weight import TangentWeight, cut, reshape, scale, transpose


Value = Any  # an array or a TangentWeight


def _on_weight(eqn: jax_core.JaxprEqn, v: TangentWeight) -> TangentWeight:
    """What acts on the array and not on what it means: a cast, a name, a sharding."""
    (weight,) = apply(eqn, [v.weight])
    return v.replace(weight=weight)


def _cast(eqn: jax_core.JaxprEqn, v: TangentWeight) -> TangentWeight | None:
    real = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return _on_weight(eqn, v) if real else None


def _reshape(eqn: jax_core.JaxprEqn, v: TangentWeight, *sizes: Any) -> TangentWeight | None:
    turned = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    return None if sizes or turned else reshape(v, eqn.outvars[0].aval.shape)


def _broadcast(eqn: jax_core.JaxprEqn, v: TangentWeight, *sizes: Any) -> TangentWeight | None:
    """Only what adds axes of length 1."""
    shape = eqn.outvars[0].aval.shape
    return None if sizes or np.prod(shape) != v.weight.size else reshape(v, shape)


def _cuts(v: TangentWeight, starts: Sequence[Any], sizes: Sequence[int]) -> TangentWeight | None:
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        v = None if v is None else cut(v, axis, start, size)
    return v


def _slice(eqn: jax_core.JaxprEqn, v: TangentWeight) -> TangentWeight | None:
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    if set(eqn.params["strides"] or ()) - {1}:
        return None
    return _cuts(v, starts, [end - start for start, end in zip(starts, ends, strict=True)])


def _dynamic_slice(eqn: jax_core.JaxprEqn, v: Value, *starts: Any) -> TangentWeight | None:
    if not isinstance(v, TangentWeight) or len(starts) != v.weight.ndim:
        return None
    return _cuts(v, [jnp.asarray(start) for start in starts], eqn.params["slice_sizes"])


def _split(eqn: jax_core.JaxprEqn, v: TangentWeight) -> list[TangentWeight] | None:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    ends = np.cumsum(sizes).tolist()
    parts = [
        cut(v, axis, end - int(size), int(size)) for end, size in zip(ends, sizes, strict=True)
    ]
    return None if any(part is None for part in parts) else parts


def _mul(eqn: jax_core.JaxprEqn, a: Value, b: Value) -> TangentWeight | None:
    v, by = (a, b) if isinstance(a, TangentWeight) else (b, a)
    number = not isinstance(by, TangentWeight) and np.size(by) == 1
    return scale(v, jnp.asarray(by)) if number and np.ndim(by) <= v.weight.ndim else None


def _div(eqn: jax_core.JaxprEqn, v: Value, by: Value) -> TangentWeight | None:
    if isinstance(by, TangentWeight) or np.size(by) != 1:
        return None
    (weight,) = apply(eqn, [v.weight, by])
    return scale(v, 1 / jnp.asarray(by)).replace(weight=weight)


def _dot_general(eqn: jax_core.JaxprEqn, a: Value, b: Value) -> Array | None:
    if isinstance(a, TangentWeight) and isinstance(b, TangentWeight):
        return None
    first = isinstance(a, TangentWeight)
    v, x = (a, b) if first else (b, a)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    x = jnp.asarray(x)  # of a literal
    (y,) = apply(eqn, [v.weight, x] if first else [x, v.weight])
    return dot(v, x, y, *axes_of(eqn, first), first, eqn.params["precision"])


def axes_of(eqn: jax_core.JaxprEqn, first: bool) -> tuple[Any, Any]:
    """The axes that a `dot_general` contracts, and those of a batch: of the weight, and of x."""
    ordered = lambda pair: tuple(pair) if first else (pair[1], pair[0])
    contracted, batch = map(ordered, eqn.params["dimension_numbers"])
    return contracted, batch


def _gather(eqn: jax_core.JaxprEqn, v: Value, indices: Value) -> Value | None:
    """Rows of one axis, as of an embedding."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(v, TangentWeight) or isinstance(indices, TangentWeight):
        return None
    (axis, *more), shape = numbers.start_index_map, v.weight.shape
    rest = [i for i in range(len(shape)) if i != axis]
    rows = numbers.collapsed_slice_dims == (axis,) and not numbers.operand_batching_dims
    if more or not rows or len(v.axes[axis]) != 1 or any(sizes[i] != shape[i] for i in rest):
        return None
    (y,) = apply(eqn, [v.weight, indices])
    (label,), indices = v.axes[axis], jnp.asarray(indices)
    places = indices.shape[:-1]
    new = tuple(v.fresh + i for i in range(len(places)))
    mode = eqn.params["mode"]

    def take(x, at):
        kept = tuple(i + (i >= at) * (len(places) - 1) for i in range(x.ndim) if i != at)
        dims = lax.GatherDimensionNumbers(kept, (at,), (at,))
        sizes = tuple(1 if i == at else n for i, n in enumerate(x.shape))
        return lax.gather(x, indices, dims, sizes, mode=mode, fill_value=0)

    alone = v.owners(label) == 1
    v = v.change(label, new, take)
    left, of_rest = iter(new), iter([v.axes[i] for i in rest])
    axes = [next(of_rest) if i in numbers.offset_dims else (next(left),) for i in range(y.ndim)]
    v = v.replace(weight=y, axes=tuple(axes))
    return plain(v) if alone else v  # matrices of a stack are weights still


USES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _cast,
    "copy": _on_weight,
    "copy_p": _on_weight,
    "div": _div,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "expand_dims": _reshape,
    "gather": _gather,
    "mul": _mul,
    "name": _on_weight,
    "neg": lambda eqn, v: scale(v, -jnp.ones((), v.weight.dtype)),
    "pvary": _on_weight,  # for what the core is summed over devices, as the gradient would be
    "reduce_precision": _on_weight,
    "reshape": _reshape,
    "sharding_constraint": _on_weight,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "stop_gradient": lambda eqn, v: v.weight,
    "transpose": lambda eqn, v: transpose(v, eqn.params["permutation"]),
}
