"""The boxes that Flax puts around an array, told by their form alone.

`nnx.Variable`, `linen.Partitioned` and their kin are nodes with one child, `value`, and beside it
what is known of the whole weight: names of its axes, a sharding. A core has other axes, so a
projected leaf leaves its box. The state holds bare Cores, named as those of a plain dict of arrays
are, and `nnx.Optimizer`, which boxes the arrays of a state and keeps the nodes around them, can
store it. Any other leaf stays in its box, in the state of `inner` too, as with every Optax
optimizer.
"""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from .leaf_spec import Basis, Core, is_core


VALUE = (jax.tree_util.GetAttrKey("value"),)


def unbox(tree: PyTree) -> PyTree:
    """`tree` with every array out of its box."""
    return jax.tree.map(lambda x: _children(x)[0][1] if is_box(x) else x, tree, is_leaf=is_box)


def rebox(tree: PyTree, like: PyTree) -> PyTree:
    """`tree`, which is like `unbox(like)`, with all but its Cores in the boxes of `like`."""

    def put(box, x):
        if is_core(x) or not is_box(box):
            return x
        return jax.tree.structure(box).unflatten(jax.tree.leaves(x))

    return jax.tree.map(put, like, tree, is_leaf=is_box)


def with_boxes(
    inner: optax.GradientTransformationExtraArgs, like: PyTree
) -> optax.GradientTransformationExtraArgs:
    """`inner` on trees out of the boxes of `like`; it gets them back in them, but for Cores."""

    def init(params: PyTree) -> Any:
        return inner.init(rebox(params, like))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        params = None if params is None else rebox(params, like)
        updates, state = inner.update(rebox(updates, like), state, params, **extra_args)
        return unbox(updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def is_box(x: Any) -> bool:
    """Whether x is a node of one child, called `value`, which is an array or a hole."""
    if isinstance(x, tuple | Core | Basis):
        return False
    children = _children(x)
    return [path for path, _ in children] == [VALUE] and _is_single(children[0][1])


def _is_single(x: Any) -> bool:
    return jax.tree.structure(x).num_nodes == 1


def _children(x: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda child: child is not x)
