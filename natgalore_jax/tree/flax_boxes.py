"""Boxes around arrays: nodes of Flax and Haliax that hold one array and names of its axes.

A box (`nnx.Variable`, `linen.Partitioned`, `haliax.NamedArray` and similar) is recognised by its
structure: a pytree node with one child, and metadata of the full weight, such as axis names or a
sharding. A core has other axes, so projected leaves are unboxed, and Cores have the paths of a
plain dict of arrays. All other leaves stay in their boxes, in the state of `inner` too, as with
every Optax optimizer.

Trainers read the sharding of the state from its boxes. At init the arrays of a projected leaf get
boxes of the leaf's kind with names of their own axes (sharding/boxed_state.py); an update returns
its state in the boxes in which it was given, if any.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from .cores import Basis, Core, is_core
from .leaf_spec import path_name


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


def unbox_cores(state: PyTree) -> PyTree:
    """A state without boxes inside its Cores and Bases; `rebox_like` puts them back."""
    is_node = lambda x: isinstance(x, Core | Basis)
    bare = lambda x: x.replace(unbox(x.value)) if is_node(x) else x
    return jax.tree.map(bare, state, is_leaf=is_node)


def rebox_like(state: PyTree, like: PyTree) -> PyTree:
    """The arrays of a state in the structure of `like`, which has the boxes."""
    return jax.tree.structure(like).unflatten(jax.tree.leaves(state))


def axis_names(params: PyTree) -> dict[str, tuple[str | None, ...]]:
    """The names of a leaf's axes, by the name of the leaf, for every leaf that has them.

    The name of an axis is None if it has none, or several.
    """
    name = lambda entry: entry if isinstance(entry, str) else None
    return {
        path_name(path): tuple(map(name, axis_entries_of(box))) for path, box in named_boxes(params)
    }


def named_boxes(params: PyTree) -> list[tuple[tuple[Any, ...], Any]]:
    """Path and node of each box that names the axes of its array."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return [(path, x) for path, x in nodes if is_box(x) and axis_entries_of(x) is not None]


def axis_entries_of(box: Any) -> tuple[Any, ...] | None:
    """For each axis of the array in a box its name, a tuple of names, or None; None without names.

    Flax's boxes have them as `names`, `out_sharding`, `sharding_names` or `sharding`, a tuple or a
    PartitionSpec; a Haliax NamedArray has `axes`. NNX names the axis of scanned layers apart, by
    `partition_name` at `param_scan_axis`.
    """
    value = _children(box)[0][1]
    rank = len(getattr(value, "shape", ()))
    # Attributes of an NNX Variable may be deprecated, or those of its array.
    metadata = _metadata(box)
    for field in FIELDS:
        if metadata is not None:
            names = metadata.get(field)
        else:
            names = _axes(box) if field == "axes" else getattr(box, field, None)
        if not isinstance(names, tuple | PartitionSpec) or not rank:
            continue
        entries = [getattr(name, "name", name) for name in names]
        layers = (metadata or {}).get("partition_name")
        if len(entries) < rank and layers is not None and layers not in entries:
            entries.insert((metadata or {}).get("param_scan_axis", 0), layers)
        if isinstance(names, PartitionSpec):  # it may omit trailing axes
            entries += [None] * (rank - len(entries))
        if len(entries) == rank:
            return tuple(entries)
    return None


def box_like(box: Any, x: Any, entries: Sequence[Any]) -> Any:
    """A box of the kind of `box` for an array with other axes.

    Args:
      box: of a weight.
      x: the array.
      entries: for each axis a name, a tuple of mesh axes, or None; in a NamedArray a name.
    """
    metadata = _metadata(box)
    if metadata is not None:
        (field, *_) = (name for name in FIELDS if metadata.get(name) is not None)
        # NNX prefers the deprecated names of a field to `out_sharding`.
        dropped = ("param_scan_axis", "partition_name", *FIELDS)
        metadata = {k: v for k, v in metadata.items() if k not in dropped}
        return type(box).from_metadata(x, metadata | {field: tuple(entries)})
    if _axes(box) is not None:
        axis = type(box.axes[0])
        names = [f"axis_{i}" if name is None else name for i, name in enumerate(entries)]
        return type(box)(x, tuple(map(axis, names, x.shape)))
    if not (dataclasses.is_dataclass(box) and hasattr(box, "names")):
        return x  # a box of an unknown kind
    return dataclasses.replace(box, value=x, names=tuple(entries))


FIELDS = ("names", "out_sharding", "sharding_names", "sharding", "axes")


def _metadata(box: Any) -> dict[str, Any] | None:
    return dict(box.get_metadata()) if hasattr(box, "get_metadata") else None


def is_box(x: Any) -> bool:
    """Whether x is a node with one child, an array or leafless, called `value` or of named axes."""
    if isinstance(x, tuple | Core | Basis | jax.Array):
        return False
    children = _children(x)
    if len(children) != 1 or not _is_single(children[0][1]):
        return False
    return children[0][0] == VALUE or _axes(x) is not None


def _axes(x: Any) -> tuple[Any, ...] | None:
    """The axes of a Haliax array: Axis nodes, in newer versions names.

    In those `axes` is computed, and raises for an array of another rank.
    """
    names = getattr(x, "axis_names", None)
    if isinstance(names, tuple):
        return names
    axes = getattr(x, "axes", None)
    is_axis = lambda axis: hasattr(axis, "name") and hasattr(axis, "size")
    return axes if isinstance(axes, tuple) and all(map(is_axis, axes)) else None


def _is_single(x: Any) -> bool:
    return jax.tree.structure(x).num_nodes == 1


def _children(x: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda child: child is not x)
