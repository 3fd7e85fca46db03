"""Removal and restoration of Flax's boxes around arrays, recognised by their structure.

A box (`nnx.Variable`, `linen.Partitioned` and similar) is a pytree node with one child, `value`,
and metadata of the full weight, such as axis names or a sharding. A core has other axes, so
projected leaves are unboxed. The state holds unboxed Cores, with the paths of a plain dict of
arrays; `nnx.Optimizer`, which boxes the arrays of a state and keeps the nodes around them, can
store it. All other leaves stay in their boxes, in the state of `inner` too, as with every Optax
optimizer.
"""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from .leaf_spec import Basis, Core, is_core


VALUE = (jax.tree_util.GetAttrKey("value"),)


def unbox(tree: PyTree) -> PyTree:
    """`tree` with every box replaced by its array."""
    return jax.tree.map(lambda x: _children(x)[0][1] if is_box(x) else x, tree, is_leaf=is_box)


def rebox(tree: PyTree, boxes: PyTree) -> PyTree:
    """`tree`, in the structure of `unbox(boxes)`, with every leaf but Cores in its box again."""

    def put(box, x):
        if is_core(x) or not is_box(box):
            return x
        return jax.tree.structure(box).unflatten(jax.tree.leaves(x))

    return jax.tree.map(put, boxes, tree, is_leaf=is_box)


def with_boxes(
    inner: optax.GradientTransformationExtraArgs, boxes: PyTree
) -> optax.GradientTransformationExtraArgs:
    """`inner` for unboxed trees: it sees every leaf but Cores in the boxes of `boxes`."""

    def init(params: PyTree) -> Any:
        return inner.init(rebox(params, boxes))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        params = None if params is None else rebox(params, boxes)
        updates, state = inner.update(rebox(updates, boxes), state, params, **extra_args)
        return unbox(updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def is_box(x: Any) -> bool:
    """Whether x is a node with one child, called `value`, that is an array or leafless."""
    if isinstance(x, tuple | Core | Basis):
        return False
    children = _children(x)
    return [path for path, _ in children] == [VALUE] and _is_single(children[0][1])


def _is_single(x: Any) -> bool:
    return jax.tree.structure(x).num_nodes == 1


def _children(x: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda child: child is not x)
