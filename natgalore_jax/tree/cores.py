"""Pytree nodes that pair an array with the view of its leaf.

A :class:`Core` pairs an array of a projected leaf with its :class:`LeafSpec`. Gradients in the
subspace are Cores; Optax's transformations map over the node and keep it, so the arrays in their
states are Cores too. `state_roles.py` defines the contents of such arrays.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .flax_serialization import serializable
from .leaf_spec import LeafSpec


class _ArrayWithSpec:
    """An array of one projected leaf, and that leaf's spec.

    The key of the node's child repeats the leaf's own key, so masks that read the last key of a
    path, such as `lambda path, _: path[-1].key != "bias"`, work on trees with such nodes.
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


@serializable
@jax.tree_util.register_pytree_with_keys_class
class Core(_ArrayWithSpec):
    """A core, or any state array of a projected leaf.

    A core's `value` is (*batch, r, n), or (*batch, r, r) for a leaf projected on both sides.
    """


@serializable
@jax.tree_util.register_pytree_with_keys_class
class Basis(_ArrayWithSpec):
    """The orthonormal bases of one leaf's matrices: `value` is (*batch, m, r).

    For random bases, which are regenerated, `value` is their key data, (*batch, words) uint32.

    Attributes:
      settings: of the projection, static: `subspace.state.Settings`.
    """

    def __init__(self, value: Any, spec: LeafSpec, settings: Any = None):
        super().__init__(value, spec)
        self.settings = settings

    def replace(self, value: Any):
        return Basis(value, self.spec, self.settings)

    def tree_flatten_with_keys(self):
        children, spec = super().tree_flatten_with_keys()
        return children, (spec, self.settings)

    def tree_flatten(self):
        return (self.value,), (self.spec, self.settings)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Iterable[Any]):
        (value,) = children
        return cls(value, *static)


def is_core(x: Any) -> bool:
    """Whether x is a Core with an array, not with the MaskedNode that `optax.masked` puts there."""
    return isinstance(x, Core) and not isinstance(x.value, optax.MaskedNode)


def cores(tree: PyTree) -> list[Core]:
    """The Cores of a tree, in order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_core) if is_core(x)]


def replace_cores(tree: PyTree, values: Iterable[Any]) -> PyTree:
    """`tree` with the arrays of its Cores replaced, in the order of `cores`."""
    remaining = iter(values)
    replace = lambda x: x.replace(next(remaining)) if is_core(x) else x
    return jax.tree.map(replace, tree, is_leaf=is_core)


def core_arrays(tree: PyTree) -> list[Any]:
    """The values of the Cores of a tree, in order."""
    return [core.value for core in cores(tree)]


def zeros_at_cores(
    params: PyTree, shape: Callable[[int, int], tuple[int, ...]], dtype: Any = None
) -> PyTree:
    """Zeros of (*batch, *shape(r, n)) at each Core of `params`, None at every other leaf.

    The default of `dtype` is the core's. :class:`NoCores` if no leaf is a Core.
    """
    if jax.tree.leaves(params) and not cores(params):
        return NoCores()

    def zeros(x):
        if not is_core(x):
            return None
        *batch, r, n = x.value.shape
        return x.replace(jnp.zeros_like(x.value, dtype, (*batch, *shape(r, n))))

    return jax.tree.map(zeros, params, is_leaf=is_core)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoCores:
    """Marks the state of a transformation on cores whose params at init had none.

    The projection removes it (:func:`allow_no_cores`), since it may project no leaf. Outside a
    projection it remains, and the first update raises (:func:`require_cores`).
    """


def allow_no_cores(state: PyTree) -> PyTree:
    """`state` with None in place of every :class:`NoCores`."""
    is_marker = lambda x: isinstance(x, NoCores)
    return jax.tree.map(lambda x: None if is_marker(x) else x, state, is_leaf=is_marker)


def require_cores(name: str, field: PyTree) -> None:
    """Raises if `field` of the state of the transformation `name` is :class:`NoCores`."""
    if isinstance(field, NoCores):
        raise ValueError(
            f"`{name}` works on cores, but its input has none: pass it to `natgalore.project` as "
            "(part of) `inner`, or put it after `natgalore.project` in `natgalore.chain`."
        )
