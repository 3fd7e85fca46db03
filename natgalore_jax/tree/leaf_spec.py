"""The matrix view of a leaf: a :class:`LeafSpec`, the only place that defines its orientation."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """The view of one leaf of the params as a stack of m x n matrices, m the projected side.

    Static and hashable: part of a state's tree structure, not one of its arrays.

    Attributes:
      path: the path of the leaf, as in `jax.tree_util`.
      shape: the shape of the leaf.
      batch: axes over matrices (layers, experts), first in the view. Axes of blocks, see `split`,
        are the last of them.
      rows: axes that are merged into m, the projected side.
      cols: axes that are merged into n.
      rank: r, the number of columns of the basis.
      index: the position of the leaf's first matrix in the refresh order.
      both: whether the n side is projected too, with a second basis Q (n x r).
      split: the shape with each axis of several adjacent matrices split into (blocks, size); ()
        without such an axis. `batch`, `rows` and `cols` index its axes.
      guess: whether the last two axes are the matrix only by default, without evidence.
      partition: the mesh axes that the leaf's box names; None if unknown. Specs that differ in it
        alone are equal: an init without the rules of names in context has the same state.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    rank: int
    index: int = 0
    both: bool = False
    split: tuple[int, ...] = ()
    guess: bool = False
    partition: PartitionSpec | None = dataclasses.field(default=None, compare=False)

    def __hash__(self) -> int:
        return self._hash  # a state's structure holds each spec several times

    @functools.cached_property
    def _hash(self) -> int:
        fields = [field.name for field in dataclasses.fields(self) if field.compare]
        return hash(tuple(getattr(self, name) for name in fields))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: hashes of strings differ between processes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def unnamed(self) -> "LeafSpec":
        """The same view of any leaf of this shape: equal for the layers of an unrolled model."""
        return dataclasses.replace(self, path=(), index=0, partition=None)

    @functools.cached_property
    def matrix(self) -> "LeafSpec":
        """The view of one matrix, as `cut` returns it."""
        place = {axis: i for i, axis in enumerate(self.matrix_axes)}
        rows, cols = (tuple(place[axis] for axis in side) for side in (self.rows, self.cols))
        shape = tuple(self.sizes[axis] for axis in self.matrix_axes)
        return LeafSpec((), shape, (), rows, cols, self.rank, both=self.both)

    @functools.cached_property
    def layer(self) -> "LeafSpec":
        """The view of the leaf without its first batch axis."""
        first, *batch = self.batch
        shifted = lambda axes: tuple(axis - (axis > first) for axis in axes)
        shape = tuple(n for axis, n in enumerate(self.sizes) if axis != first)
        sides = shifted(self.rows), shifted(self.cols)
        return LeafSpec((), shape, shifted(batch), *sides, self.rank, both=self.both)

    @functools.cached_property
    def matrix_axes(self) -> tuple[int, ...]:
        """The axes of one matrix, in the leaf's order."""
        return tuple(axis for axis in range(len(self.sizes)) if axis not in self.batch)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the axes that `batch`, `rows` and `cols` index."""
        return self.split or self.shape

    @functools.cached_property
    def name(self) -> str:
        """The path in the form `layers/0/attention/query/kernel`."""
        return path_name(self.path)

    @functools.cached_property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in self.batch)

    @functools.cached_property
    def matrices(self) -> int:
        """The number of matrices in the leaf."""
        return math.prod(self.batch_shape)

    @functools.cached_property
    def m(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.rows)

    @functools.cached_property
    def n(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.cols)

    @functools.cached_property
    def core_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.rank, self.rank if self.both else self.n)

    @functools.cached_property
    def basis_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.m, self.rank)

    @functools.cached_property
    def transposed(self) -> "LeafSpec":
        """The view of the same leaf as n x m matrices, whose basis P is this view's Q."""
        return dataclasses.replace(self, rows=self.cols, cols=self.rows)

    @functools.cached_property
    def sides(self) -> tuple["LeafSpec", ...]:
        """The view of each basis: of P, or of P and Q."""
        return (self, self.transposed) if self.both else (self,)

    def to_view(self, x: Float[Array, "..."]) -> Float[Array, "*batch m n"]:
        """The leaf as a stack of matrices."""
        axes = (*self.batch, *self.rows, *self.cols)
        return x.reshape(self.sizes).transpose(axes).reshape(*self.batch_shape, self.m, self.n)

    def from_view(self, x: Shaped[Array, "*batch m n"]) -> Shaped[Array, "..."]:
        """The inverse of `to_view`."""
        axes = (*self.batch, *self.rows, *self.cols)
        inverse = tuple(axes.index(axis) for axis in range(len(axes)))
        return x.reshape([self.sizes[axis] for axis in axes]).transpose(inverse).reshape(self.shape)

    def cut(self, x: Float[Array, "..."], i: Int[Array, ""]) -> Float[Array, "..."]:
        """The i-th matrix of the leaf, its axes in the leaf's order; see `as_matrix`."""
        x = x.reshape(self.sizes)
        if not self.batch:
            return x
        index = dict(zip(self.batch, self._batch_index(i), strict=True))
        starts = [index.get(axis, jnp.zeros_like(i)) for axis in range(len(self.sizes))]
        sizes = [1 if axis in self.batch else n for axis, n in enumerate(self.sizes)]
        part = lax.dynamic_slice(x, starts, sizes)
        return part.reshape([self.sizes[axis] for axis in self.matrix_axes])

    def as_matrix(self, part: Float[Array, "..."]) -> Float[Array, "m n"]:
        """The result of `cut` as a matrix, the projected side first."""
        axes = [self.matrix_axes.index(axis) for axis in (*self.rows, *self.cols)]
        return part.transpose(axes).reshape(self.m, self.n)

    def take(self, x: Array, i: Int[Array, ""]) -> Array:
        """The part of the i-th matrix in a state array, whose batch axes come first."""
        if not self.batch:
            return x
        return lax.dynamic_slice(x, *self._slice(x, i)).reshape(x.shape[len(self.batch) :])

    def put(self, x: Array, i: Int[Array, ""], part: Array) -> Array:
        """`x` with the part of the i-th matrix replaced."""
        if not self.batch:
            return part
        starts, sizes = self._slice(x, i)
        return lax.dynamic_update_slice(x, part.reshape(sizes), starts)

    def take_all(self, state: PyTree, i: Int[Array, ""]) -> PyTree:
        """`take` for each array of a tree."""
        return jax.tree.map(lambda x: self.take(x, i), state)

    def put_all(self, state: PyTree, i: Int[Array, ""], part: PyTree) -> PyTree:
        """`put` for each array of a tree."""
        return jax.tree.map(lambda x, new: self.put(x, i, new), state, part)

    def _batch_index(self, i: Int[Array, ""]) -> tuple[Array, ...]:
        return jnp.unravel_index(i, self.batch_shape) if len(self.batch) > 1 else (i,)

    def _slice(self, x: Array, i: Int[Array, ""]) -> tuple[list[Array], tuple[int, ...]]:
        """Start indices and sizes of the i-th matrix's slice."""
        shape = x.shape[len(self.batch) :]
        starts = [*self._batch_index(i), *[jnp.zeros_like(i)] * len(shape)]
        return starts, (1,) * len(self.batch) + shape


def unboxed_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path without the `.value` of a Flax box."""
    return path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path


def path_name(path: tuple[Any, ...]) -> str:
    """The path in the form `layers/0/attention/query/kernel`."""
    return jax.tree_util.keystr(unboxed_path(path), simple=True, separator="/")
