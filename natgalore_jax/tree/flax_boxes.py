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
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from .leaf_spec import Basis, Core, is_core, path_name


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


def axis_names(params: PyTree) -> dict[str, tuple[str | None, ...]]:
    """The names of a leaf's axes, by the name of the leaf, for every leaf that has them.

    Flax's boxes have them as `names`, `out_sharding`, `sharding_names` or `sharding`, a tuple or a
    PartitionSpec; a Haliax NamedArray has `axes`. The name of an axis may be None.
    """
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: _names(x) is not None)
    found = ((path, _names(node)) for path, node in nodes)
    return {path_name((*path, *names[0])): names[1] for path, names in found if names}


def _names(x: Any) -> tuple[tuple[Any, ...], tuple[str | None, ...]] | None:
    """Path and axis names of the one array below a node that names its axes, else None."""
    if isinstance(x, jax.Array):
        return None
    # Attributes of an NNX Variable may be deprecated, or those of its array.
    metadata = x.get_metadata() if hasattr(x, "get_metadata") else None
    for field in ("names", "out_sharding", "sharding_names", "sharding", "axes"):
        names = getattr(x, field, None) if metadata is None else metadata.get(field)
        if not isinstance(names, tuple | PartitionSpec):
            continue
        leaves = jax.tree_util.tree_leaves_with_path(x)
        rank = len(getattr(leaves[0][1], "shape", ())) if len(leaves) == 1 else 0
        if isinstance(names, PartitionSpec):  # it may omit trailing axes
            names = (*names, *[None] * (rank - len(names)))
        names = [getattr(name, "name", name) for name in names]
        if rank and len(names) == rank and leaves[0][0]:
            return leaves[0][0], tuple(x if isinstance(x, str) else None for x in names)
    return None


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
