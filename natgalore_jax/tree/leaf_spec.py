"""What is this leaf? The types that answer it, once, for every room of the library.

A :class:`LeafSpec` says how a leaf of the params is seen as matrices and is the only home of
their orientation. A :class:`Core` carries an array of one projected leaf together with its spec:
gradients in the subspace are Cores, and because Optax's transformations map over the node and
keep it, so is everything they remember of them. What such an array *is*, `state_roles.py` says.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """How one leaf of the params is seen as a stack of m x n matrices, m the projected side.

    Static and hashable: it lives in the structure of a state, never among its arrays.

    Attributes:
      path: where the leaf is, as `jax.tree_util` spells it.
      shape: of the leaf.
      batch: axes that count matrices (layers, experts); they come first in the view. The axes of
        blocks, see `split`, are the last of them.
      rows: axes that make up m, the projected side.
      cols: axes that make up n.
      rank: r, columns of the basis.
      index: the place of its first matrix in the refresh order.
      both: whether the n side is projected too, on a second basis Q (n x r).
      split: the shape with each axis that holds several matrices side by side as two, (blocks,
        size); () where no axis does. `batch`, `rows` and `cols` are axes of it.
      guess: whether the last two axes were taken as the matrix for want of evidence.
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

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes that `batch`, `rows` and `cols` speak of."""
        return self.split or self.shape

    @property
    def name(self) -> str:
        """The path as people write it: `layers/0/attention/query/kernel`."""
        return path_name(self.path)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in self.batch)

    @property
    def matrices(self) -> int:
        """How many matrices the leaf holds."""
        return math.prod(self.batch_shape)

    @property
    def m(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.rows)

    @property
    def n(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.cols)

    @property
    def core_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.rank, self.rank if self.both else self.n)

    @property
    def basis_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.m, self.rank)

    @property
    def transposed(self) -> "LeafSpec":
        """The same leaf seen as n x m matrices: what P is here, Q is there."""
        return dataclasses.replace(self, rows=self.cols, cols=self.rows)

    def to_view(self, x: Float[Array, "..."]) -> Float[Array, "*batch m n"]:
        """The leaf as its matrices."""
        axes = (*self.batch, *self.rows, *self.cols)
        return x.reshape(self.sizes).transpose(axes).reshape(*self.batch_shape, self.m, self.n)

    def from_view(self, x: Float[Array, "*batch m n"]) -> Float[Array, "..."]:
        """The inverse of `to_view`."""
        axes = (*self.batch, *self.rows, *self.cols)
        inverse = tuple(axes.index(axis) for axis in range(len(axes)))
        return x.reshape([self.sizes[axis] for axis in axes]).transpose(inverse).reshape(self.shape)

    def cut(self, x: Float[Array, "..."], i: Int[Array, ""]) -> Float[Array, "..."]:
        """The i-th matrix of the leaf as it lies there, its axes in the leaf's order."""
        x = x.reshape(self.sizes)
        if not self.batch:
            return x
        place = dict(zip(self.batch, self._place(i), strict=True))
        starts = [place.get(axis, jnp.zeros_like(i)) for axis in range(len(self.sizes))]
        sizes = [1 if axis in self.batch else n for axis, n in enumerate(self.sizes)]
        part = lax.dynamic_slice(x, starts, sizes)
        return part.reshape([n for axis, n in enumerate(self.sizes) if axis not in self.batch])

    def as_matrix(self, part: Float[Array, "..."]) -> Float[Array, "m n"]:
        """What `cut` gives, with the projected side first."""
        left = [axis for axis in range(len(self.sizes)) if axis not in self.batch]
        axes = [left.index(axis) for axis in (*self.rows, *self.cols)]
        return part.transpose(axes).reshape(self.m, self.n)

    def take(self, x: Array, i: Int[Array, ""]) -> Array:
        """The i-th matrix's part of a state array, whose batch axes come first."""
        if not self.batch:
            return x
        return lax.dynamic_slice(x, *self._cut(x, i)).reshape(x.shape[len(self.batch) :])

    def put(self, x: Array, i: Int[Array, ""], part: Array) -> Array:
        """`x` with the i-th matrix's part replaced."""
        if not self.batch:
            return part
        starts, sizes = self._cut(x, i)
        return lax.dynamic_update_slice(x, part.reshape(sizes), starts)

    def take_all(self, state: PyTree, i: Int[Array, ""]) -> PyTree:
        """`take` of each array of a tree."""
        return jax.tree.map(lambda x: self.take(x, i), state)

    def put_all(self, state: PyTree, i: Int[Array, ""], part: PyTree) -> PyTree:
        """`put` into each array of a tree."""
        return jax.tree.map(lambda x, new: self.put(x, i, new), state, part)

    def _place(self, i: Int[Array, ""]) -> tuple[Array, ...]:
        return jnp.unravel_index(i, self.batch_shape) if self.batch else ()

    def _cut(self, x: Array, i: Int[Array, ""]) -> tuple[list[Array], tuple[int, ...]]:
        rest = x.shape[len(self.batch) :]
        starts = [*self._place(i), *[jnp.zeros_like(i)] * len(rest)]
        return starts, (1,) * len(self.batch) + rest


class _Marked:
    """An array of one projected leaf, and that leaf's spec.

    Its child repeats its own key, so that a mask which reads the last key of a path, such as
    `lambda path, _: path[-1].key != "bias"`, goes on working on trees that hold it.
    """

    def __init__(self, value: Any, spec: LeafSpec):
        self.value = value
        self.spec = spec

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec.name}, {self.value!r})"

    def replace(self, value: Any):
        return type(self)(value, self.spec)

    def tree_flatten_with_keys(self):
        key = self.spec.path[-1] if self.spec.path else jax.tree_util.GetAttrKey("value")
        return ((key, self.value),), self.spec

    def tree_flatten(self):
        return (self.value,), self.spec

    @classmethod
    def tree_unflatten(cls, spec: LeafSpec, children: Iterable[Any]):
        (value,) = children
        return cls(value, spec)


@jax.tree_util.register_pytree_with_keys_class
class Core(_Marked):
    """An array of core coordinates: `value` is (*batch, r, n), or what a state keeps of such.

    Of a leaf projected on both sides it is (*batch, r, r).
    """


@jax.tree_util.register_pytree_with_keys_class
class Basis(_Marked):
    """The orthonormal basis of one leaf's matrices: `value` is (*batch, m, r).

    Of a basis that a key regenerates it is that key's data, (*batch, words) uint32.
    """


def is_core(x: Any) -> bool:
    """Whether x is a Core that holds an array; `optax.masked` empties those it withholds."""
    return isinstance(x, Core) and not isinstance(x.value, optax.MaskedNode)


def cores(tree: PyTree) -> list[Core]:
    """The Cores of a tree, in order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_core) if is_core(x)]


def replace_cores(tree: PyTree, values: Iterable[Any]) -> PyTree:
    """`tree` with the arrays of its Cores replaced, in the order of `cores`."""
    left = iter(values)
    replace = lambda x: x.replace(next(left)) if is_core(x) else x
    return jax.tree.map(replace, tree, is_leaf=is_core)


def core_arrays(tree: PyTree) -> list[Array]:
    """The arrays of the Cores of a tree, in order."""
    return [core.value for core in cores(tree)]


def zeros_at_cores(
    params: PyTree, shape: Callable[[int, int], tuple[int, ...]], dtype: Any = None
) -> PyTree:
    """Zeros of (*batch, *shape(r, n)) at each Core of `params`, nothing elsewhere.

    `dtype` is by default that of the core.
    """

    def zeros(x):
        if not is_core(x):
            return None
        *batch, r, n = x.value.shape
        return x.replace(jnp.zeros_like(x.value, dtype, (*batch, *shape(r, n))))

    return jax.tree.map(zeros, params, is_leaf=is_core)


_inside = contextvars.ContextVar("inside a subspace", default=False)


@contextlib.contextmanager
def subspace() -> Iterator[None]:
    """Within it, inner transformations are initialised, even where no leaf is projected."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def subspace_only(name: str, params: PyTree) -> None:
    """Raises if the transformation `name` is initialised outside a subspace."""
    if jax.tree.leaves(params) and not cores(params) and not _inside.get():
        raise ValueError(
            f"`{name}` works on cores: give it to `natgalore.project` as (part of) `inner`, or put "
            "it after `natgalore.project` in `natgalore.chain`. Here it would see whole weights."
        )


def unboxed_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path without the `.value` in which Flax boxes an array."""
    return path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path


def path_name(path: tuple[Any, ...]) -> str:
    """The path as people write it: `layers/0/attention/query/kernel`."""
    return jax.tree_util.keystr(unboxed_path(path), simple=True, separator="/")
