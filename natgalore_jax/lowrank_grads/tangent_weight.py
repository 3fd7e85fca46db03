"""A weight that stands for W + P B Qᵀ at B = 0, and what happens to it until it is used.

The gradient with respect to B is the core Pᵀ G Q, so a program that is evaluated at such a weight,
and differentiated by B alone, has the core as its gradient and never needs G. For y = x W,

    y(B) = x W + (x P) B Qᵀ,    dy(B)/dB is linear,    B's cotangent: (x P)ᵀ (ȳ Q)               (1)

Every axis of W is a group of *labels*, and so are the axes of P, B and Q, which together own them
all: rows belong to P, columns to B (or to Q on both sides), layers and experts to all of them.
Then no operation need know of orientation. A transpose permutes groups, a reshape regroups labels,
a slice acts on what owns the label that it cuts, and a product is an `einsum` over labels.

The nearest published idea is that of Shamshoum et al., "CompAct", arXiv:2410.15352, which keeps
x P in place of x for a random P.
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
    """The weight W, or what has become of it, and the factors of what could be added to it.

    Attributes:
      weight: W.
      core: B, zeros.
      bases: P, or P and Q.
      axes: the labels of each axis of W, the slower first; () of an axis of length 1.
      core_axes: the label of each axis of B.
      bases_axes: the same of P, or of P and Q.
      name: of the leaf of the params.
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
        """Of each label."""
        pairs = [(self.core, self.core_axes), *zip(self.bases, self.bases_axes, strict=True)]
        return {label: n for x, axes in pairs for label, n in zip(axes, x.shape, strict=True)}

    @property
    def fresh(self) -> int:
        """From here on labels are free."""
        return 1 + max(self.sizes, default=-1)

    def owners(self, label: int) -> int:
        """How many of the factors have the label."""
        return sum(label in axes for axes in (self.core_axes, *self.bases_axes))

    def replace(self, **changes: Any) -> "TangentWeight":
        return dataclasses.replace(self, **changes)

    def change(self, label: int, new: Labels, f: Callable[[Array, int], Array]) -> "TangentWeight":
        """`f(factor, axis)` for each factor that has the label, which `new` ones replace there.

        The weight is left as it is: `reshape` and its kin know what becomes of it as a whole.
        """
        swap = lambda axes: tuple(y for x in axes for y in (new if x == label else (x,)))
        at = lambda x, axes: f(x, axes.index(label)) if label in axes else x
        return self.replace(
            core=at(self.core, self.core_axes),
            bases=tuple(map(at, self.bases, self.bases_axes)),
            axes=tuple(map(swap, self.axes)),
            core_axes=swap(self.core_axes),
            bases_axes=tuple(map(swap, self.bases_axes)),
        )


def tag(spec: LeafSpec, weight: Array, core: Array, *bases: Array) -> TangentWeight:
    """The leaf `weight` with B = `core`, zeros of `spec.core_shape`.

    Args:
      spec: the leaf's; the only source of orientation.
      weight: in the leaf's shape.
      core: (*batch, r, n), or (*batch, r, r).
      *bases: P (*batch, m, r), or P and Q (*batch, n, r).
    """
    of = lambda axes: tuple(spec.sizes[axis] for axis in axes)
    k = len(spec.sizes)
    last, last_axes = ((spec.rank,), (k + 1,)) if spec.both else (of(spec.cols), spec.cols)
    sides = [(spec.rows, k), (spec.cols, k + 1)][: len(bases)]
    whole = TangentWeight(
        weight.reshape(spec.sizes),
        core.reshape(*spec.batch_shape, spec.rank, *last),
        tuple(
            P.reshape(*spec.batch_shape, *of(axes), spec.rank)
            for P, (axes, _) in zip(bases, sides, strict=True)
        ),
        tuple((axis,) for axis in range(k)),
        (*spec.batch, k, *last_axes),
        tuple((*spec.batch, *axes, rank) for axes, rank in sides),
        spec.name,
    )
    leaf = reshape(whole, spec.shape)
    assert leaf is not None  # axes are merged, and merged axes need not be taken apart
    return leaf


def transpose(v: TangentWeight, permutation: Sequence[int]) -> TangentWeight:
    axes = tuple(v.axes[i] for i in permutation)
    return v.replace(weight=v.weight.transpose(permutation), axes=axes)


def reshape(v: TangentWeight, shape: Sequence[int]) -> TangentWeight | None:
    """The weight in another shape; None if that would cut across labels."""
    weight = v.weight.reshape(shape)
    for label, n in v.sizes.items():
        if n == 1 and any(label in group for group in v.axes):
            v = v.change(label, (), lambda x, axis: x.squeeze(axis))
    left = [label for group in v.axes for label in group]
    groups = []
    for size in shape:
        group: list[int] = []
        while size > 1:
            label, n = left[0], v.sizes[left[0]]
            if size % n == 0:
                group.append(left.pop(0))
                size //= n
            elif n % size == 0:
                two = (v.fresh, v.fresh + 1)
                parts = (size, n // size)
                v = v.change(
                    label,
                    two,
                    lambda x, axis, parts=parts: x.reshape(
                        *x.shape[:axis], *parts, *x.shape[axis + 1 :]
                    ),
                )
                left[:1] = two
            else:
                return None
        groups.append(tuple(group))
    return v.replace(weight=weight, axes=tuple(groups))


def cut(v: TangentWeight, axis: int, start: Any, size: int) -> TangentWeight | None:
    """Entries of one axis from `start`, a number or, where the axis is of one label, an array."""
    n = v.weight.shape[axis]
    if size == n:
        return v
    group = v.axes[axis]
    inner = math.prod(v.sizes[label] for label in group[1:])
    traced = isinstance(start, jax.Array)
    if len(group) > 1 and (traced or start % inner or size % inner):
        return None
    weight = lax.dynamic_slice_in_dim(v.weight, start, size, axis)
    at = start if len(group) == 1 else start // inner
    take = lambda x, axis: lax.dynamic_slice_in_dim(x, at, size // inner, axis)
    return v.change(group[0], (group[0],), take).replace(weight=weight)


def scale(v: TangentWeight, by: Array) -> TangentWeight:
    """Times a number; through the weight as it is, that has its gradient."""
    core = v.core * lax.stop_gradient(by).reshape(()).astype(v.core.dtype)
    return v.replace(weight=v.weight * by.reshape(()), core=core)
