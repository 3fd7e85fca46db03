"""Rules of the primitives that :class:`TangentWeight` supports.

A rule `(eqn, *operands)` evaluates one equation. It returns a :class:`TangentWeight` (or a list of
them), or an array with the term of B attached; None where it does not hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core
from jaxtyping import Array

from ..util.jaxprs import apply
from .dot_general import dot, materialise
from .tangent_weight import TangentWeight, reshape, scale, slice_axis, transpose


Value = Any  # an array or a TangentWeight


def _dot_general(eqn: jax_core.JaxprEqn, a: Value, b: Value) -> Array | None:
    if isinstance(a, TangentWeight) and isinstance(b, TangentWeight):
        return None
    first = isinstance(a, TangentWeight)
    v, x = (a, b) if first else (b, a)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    x = jnp.asarray(x)  # a literal may be a NumPy array
    (y,) = apply(eqn, [v.weight, x] if first else [x, v.weight])
    contracted, batch = eqn.params["dimension_numbers"]
    if not first:
        contracted, batch = contracted[::-1], batch[::-1]
    return dot(v, x, y, contracted, batch, first, eqn.params["precision"])


def _gather(eqn: jax_core.JaxprEqn, v: Value, indices: Value) -> Value | None:
    """Entries of one axis: rows of an embedding, or layers of a stack."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(v, TangentWeight) or isinstance(indices, TangentWeight):
        return None
    (axis, *more_axes), shape = numbers.start_index_map, v.weight.shape
    other_axes = [i for i in range(len(shape)) if i != axis]
    one_axis = numbers.collapsed_slice_dims == (axis,) and not numbers.operand_batching_dims
    full_slices = all(sizes[i] == shape[i] for i in other_axes)
    if more_axes or not one_axis or not full_slices or len(v.axes[axis]) != 1:
        return None
    (y,) = apply(eqn, [v.weight, indices])
    (label,), indices = v.axes[axis], jnp.asarray(indices)
    new = tuple(v.next_label + i for i in range(indices.ndim - 1))
    mode = eqn.params["mode"]

    def take(x, axis):
        offsets = tuple(i + (i >= axis) * (len(new) - 1) for i in range(x.ndim) if i != axis)
        dims = lax.GatherDimensionNumbers(offsets, (axis,), (axis,))
        sizes = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
        return lax.gather(x, indices, dims, sizes, mode=mode, fill_value=0)

    new_axes, kept_axes = iter(new), iter([v.axes[i] for i in other_axes])
    is_kept = [i in numbers.offset_dims for i in range(y.ndim)]
    axes = tuple(next(kept_axes) if kept else (next(new_axes),) for kept in is_kept)
    taken = v.replace_label(label, new, take).replace(weight=y, axes=axes)
    # Rows, as of an embedding, are activations; a choice of layers is still a weight.
    return materialise(taken) if v.owners(label) == 1 else taken


def _on_weight(eqn: jax_core.JaxprEqn, v: TangentWeight) -> TangentWeight:
    """A primitive that changes dtype, name or sharding of the weight alone."""
    (weight,) = apply(eqn, [v.weight])
    return v.replace(weight=weight)


def _cast(eqn: jax_core.JaxprEqn, v: TangentWeight) -> TangentWeight | None:
    floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return _on_weight(eqn, v) if floating else None


def _reshape(eqn: jax_core.JaxprEqn, v: TangentWeight, *sizes: Any) -> TangentWeight | None:
    permuted = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    return None if sizes or permuted else reshape(v, eqn.outvars[0].aval.shape)


def _broadcast(eqn: jax_core.JaxprEqn, v: TangentWeight, *sizes: Any) -> TangentWeight | None:
    """A broadcast that adds axes of length 1 only."""
    shape = eqn.outvars[0].aval.shape
    return None if sizes or np.prod(shape) != v.weight.size else reshape(v, shape)


def _slice(eqn: jax_core.JaxprEqn, v: TangentWeight) -> TangentWeight | None:
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    if set(eqn.params["strides"] or ()) - {1}:
        return None
    return _slice_axes(v, starts, [end - start for start, end in zip(starts, ends, strict=True)])


def _dynamic_slice(eqn: jax_core.JaxprEqn, v: Value, *starts: Any) -> TangentWeight | None:
    if not isinstance(v, TangentWeight) or len(starts) != v.weight.ndim:
        return None
    return _slice_axes(v, [jnp.asarray(start) for start in starts], eqn.params["slice_sizes"])


def _split(eqn: jax_core.JaxprEqn, v: TangentWeight) -> list[TangentWeight] | None:
    axis, sizes = eqn.params["axis"], [int(size) for size in eqn.params["sizes"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [slice_axis(v, axis, *place) for place in zip(starts, sizes, strict=True)]
    return None if any(part is None for part in parts) else parts


def _slice_axes(
    v: TangentWeight, starts: Sequence[Any], sizes: Sequence[int]
) -> TangentWeight | None:
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        v = None if v is None else slice_axis(v, axis, start, size)
    return v


def _mul(eqn: jax_core.JaxprEqn, a: Value, b: Value) -> TangentWeight | None:
    v, factor = (a, b) if isinstance(a, TangentWeight) else (b, a)
    if not _is_number(factor) or np.ndim(factor) > v.weight.ndim:
        return None
    return scale(v, jnp.asarray(factor))


def _div(eqn: jax_core.JaxprEqn, v: Value, divisor: Value) -> TangentWeight | None:
    if not _is_number(divisor):
        return None
    (weight,) = apply(eqn, [v.weight, divisor])
    return scale(v, 1 / jnp.asarray(divisor)).replace(weight=weight)


def _is_number(x: Value) -> bool:
    return not isinstance(x, TangentWeight) and np.size(x) == 1


RULES: dict[str, Callable[..., Any]] = {
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
    "pvary": _on_weight,  # its transpose sums the core over devices, as it would the gradient
    "reduce_precision": _on_weight,
    "reshape": _reshape,
    "sharding_constraint": _on_weight,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "stop_gradient": lambda eqn, v: v.weight,
    "transpose": lambda eqn, v: transpose(v, eqn.params["permutation"]),
}
