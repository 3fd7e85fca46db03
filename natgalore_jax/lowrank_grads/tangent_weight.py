"""A projected weight W with the linear term P B Qᵀ attached at B = 0, and its shape operations.

For the gradient G of a loss L with respect to W (Q is the identity if one side is projected),

    W(B) = W + P B Qᵀ,    dL/dB at B = 0 is the core Pᵀ G Q                                     (1)

so a program evaluated at W(0) and differentiated with respect to B gives the core without
forming G.

Each axis of W is a tuple of integer *labels*, as in an `einsum`, and each label is an axis of P, B
or Q: rows belong to P, columns to B (to Q if both sides are projected), layers and experts to all
factors. A transpose permutes the tuples, a reshape regroups labels, a slice cuts the factors that
have the sliced label. The orientation of the matrix occurs in :func:`tag` alone.

Reference: Shamshoum et al., "CompAct", arXiv:2410.15352, stores x P in place of x, for a random P.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from ..tree.leaf_spec import LeafSpec


Labels = tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "core", "bases"),
    meta_fields=("axes", "core_axes", "bases_axes", "name"),
)
@dataclasses.dataclass(frozen=True)
class TangentWeight:
    """W(0) of (1), after any shape operations.

    Attributes:
      weight: W.
      core: B, zeros.
      bases: (P,) or (P, Q).
      axes: labels of each axis of W, the slowest first; () for an axis of length 1.
      core_axes: label of each axis of B.
      bases_axes: label of each axis of P, and of Q.
      name: name of the leaf of the params.
    """

    weight: Array
    core: Array
    bases: tuple[Array, ...]
    axes: tuple[Labels, ...]
    core_axes: Labels
    bases_axes: tuple[Labels, ...]
    name: str

    @property
    def sizes(self) -> dict[int, int]:
        """Length of each label's axis."""
        pairs = [(self.core, self.core_axes), *zip(self.bases, self.bases_axes, strict=True)]
        return {label: n for x, axes in pairs for label, n in zip(axes, x.shape, strict=True)}

    @property
    def next_label(self) -> int:
        """The smallest label above all labels in use."""
        return 1 + max(self.sizes, default=-1)

    def owners(self, label: int) -> int:
        """Number of factors that have the label."""
        return sum(label in axes for axes in (self.core_axes, *self.bases_axes))

    def replace(self, **changes: Any) -> "TangentWeight":
        return dataclasses.replace(self, **changes)

    def replace_label(
        self, label: int, new: Labels, f: Callable[[Array, int], Array]
    ) -> "TangentWeight":
        """Applies `f(factor, axis)` to each factor with the label, and relabels that axis `new`.

        `weight` is unchanged: the caller replaces it.
        """
        relabel = lambda axes: tuple(y for x in axes for y in (new if x == label else (x,)))
        apply = lambda x, axes: f(x, axes.index(label)) if label in axes else x
        return self.replace(
            core=apply(self.core, self.core_axes),
            bases=tuple(map(apply, self.bases, self.bases_axes)),
            axes=tuple(map(relabel, self.axes)),
            core_axes=relabel(self.core_axes),
            bases_axes=tuple(map(relabel, self.bases_axes)),
        )


def tag(spec: LeafSpec, weight: Array, core: Array, *bases: Array) -> TangentWeight:
    """W(0) for a leaf of the params.

    Args:
      spec: the leaf's spec.
      weight: the leaf.
      core: B, zeros of (*batch, r, n), or (*batch, r, r) if both sides are projected.
      *bases: P (*batch, m, r), or P and Q (*batch, n, r).
    """
    ndim = len(spec.sizes)  # axis i of the leaf has label i; the ranks follow
    P_rank, Q_rank = ndim, ndim + 1
    sizes = lambda axes: tuple(spec.sizes[axis] for axis in axes)
    cols = (Q_rank,) if spec.both else spec.cols
    col_sizes = (spec.rank,) if spec.both else sizes(spec.cols)
    sides = [(spec.rows, P_rank), (spec.cols, Q_rank)][: len(bases)]
    split = TangentWeight(
        weight=weight.reshape(spec.sizes),
        core=core.reshape(*spec.batch_shape, spec.rank, *col_sizes),
        bases=tuple(
            basis.reshape(*spec.batch_shape, *sizes(axes), spec.rank)
            for basis, (axes, _) in zip(bases, sides, strict=True)
        ),
        axes=tuple((axis,) for axis in range(ndim)),
        core_axes=(*spec.batch, P_rank, *cols),
        bases_axes=tuple((*spec.batch, *axes, rank) for axes, rank in sides),
        name=spec.name,
    )
    leaf = reshape(split, spec.shape)
    assert leaf is not None  # merging axes splits no label
    return leaf


def transpose(v: TangentWeight, permutation: Sequence[int]) -> TangentWeight:
    axes = tuple(v.axes[i] for i in permutation)
    return v.replace(weight=v.weight.transpose(permutation), axes=axes)


def reshape(v: TangentWeight, shape: Sequence[int]) -> TangentWeight | None:
    """The weight in another shape; None where a label's size is no multiple of an axis's."""
    weight = v.weight.reshape(shape)
    for label, n in v.sizes.items():
        if n == 1 and any(label in group for group in v.axes):
            v = v.replace_label(label, (), lambda x, axis: x.squeeze(axis))
    remaining = [label for group in v.axes for label in group]
    axes = []
    for size in shape:
        group: list[int] = []
        while size > 1:
            label, n = remaining[0], v.sizes[remaining[0]]
            if size % n == 0:
                group.append(remaining.pop(0))
                size //= n
            elif n % size == 0:  # the axis ends inside the label
                new = (v.next_label, v.next_label + 1)
                v = v.replace_label(label, new, functools.partial(_split_axis, size=size))
                remaining[:1] = new
            else:
                return None
        axes.append(tuple(group))
    return v.replace(weight=weight, axes=tuple(axes))


def _split_axis(x: Array, axis: int, size: int) -> Array:
    """x with one axis of n entries as two, of `size` and n / `size`."""
    return x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])


def slice_axis(v: TangentWeight, axis: int, start: Any, size: int) -> TangentWeight | None:
    """`size` entries of one axis from `start`; None where the slice cuts an inner label.

    `start` is an int, or an array if the axis has one label.
    """
    if size == v.weight.shape[axis]:
        return v
    outer, *inner = v.axes[axis]
    unit = math.prod(v.sizes[label] for label in inner)
    if inner and (isinstance(start, jax.Array) or start % unit or size % unit):
        return None
    weight = lax.dynamic_slice_in_dim(v.weight, start, size, axis)
    first = start // unit if inner else start
    take = lambda x, axis: lax.dynamic_slice_in_dim(x, first, size // unit, axis)
    return v.replace_label(outer, (outer,), take).replace(weight=weight)


def scale(v: TangentWeight, factor: Array) -> TangentWeight:
    """The weight times a number.

    The gradient with respect to `factor` is that of `weight * factor`; B = 0 contributes nothing.
    """
    core = v.core * lax.stop_gradient(factor).reshape(()).astype(v.core.dtype)
    return v.replace(weight=v.weight * factor.reshape(()), core=core)
