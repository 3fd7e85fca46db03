"""Shardings that trainers read from names: boxes for the state arrays of boxed params.

A trainer that shards by names reads them from the boxes of `jax.eval_shape(tx.init, params)`, and
replicates arrays without a box. Each state array of a boxed leaf gets a box of the leaf's kind that
divides the array over the mesh axes of the leaf, as :func:`state_partition` does.

- Flax with rules in context (or names that are axes of the mesh in context): an entry is a logical
  name, or a tuple of several mesh axes, which rules leave as it is. (JAX turns a tuple of one axis
  into a string, which rules would drop as an unknown name.)
- Flax without rules, Haliax: an axis has one name. The name of an axis that the array has not goes
  to another axis.

Without a mesh in context the sizes of its axes are unknown. A group of mesh axes that divides an
axis of the weight divides its size and the number of devices; only their greatest common divisor is
then known to be safe. A name whose axes may not divide an array is dropped.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import PyTree

from ..tree.flax_boxes import axis_entries_of, box_like, named_boxes
from ..tree.leaf_spec import LeafSpec
from ..tree.state_roles import walk
from .partitioning import (
    LeafPartition,
    UnknownMesh,
    all_mesh_axes,
    divisible_partition,
    mesh_axes,
    state_partition,
)


class NamedLeaf(NamedTuple):
    """A boxed leaf with named axes.

    Attributes:
      box: of the leaf.
      leaf: its partition, over mesh axes, or over names in place of mesh axes if `by_name`.
      by_name: whether an axis has one name.
      partition: over mesh axes; None if it is not known.
      logical: the logical name that rules resolve to mesh axes.
    """

    box: Any
    leaf: LeafPartition
    by_name: bool
    partition: PartitionSpec | None
    logical: Mapping[tuple[str, ...], str] = {}


def named_leaves(params: PyTree) -> dict[tuple, NamedLeaf]:
    """The leaves of `params` in boxes with named axes, by their paths without boxes."""
    return {path: _named_leaf(box) for path, box in named_boxes(params)}


def box_state(state: PyTree, leaves: Mapping[tuple, NamedLeaf]) -> PyTree:
    """`state` with boxes inside the Cores and Bases of named leaves."""
    if not leaves:
        return state

    def box(x: Any, role: Any, spec: LeafSpec | None) -> Any:
        named = None if spec is None else leaves.get(spec.path)
        if named is None:
            return x
        partition = state_partition(x.shape, role, spec, named.leaf, alone=named.by_name)
        return _box(named, x, partition)

    return walk(state, box)


def _box(named: NamedLeaf, x: Any, partition: PartitionSpec) -> Any:
    entries = [*partition, *[None] * (x.ndim - len(partition))]
    if named.logical:
        axes = map(mesh_axes, entries)
        entries = [named.logical.get(names, names if len(names) > 1 else None) for names in axes]
    return box_like(named.box, x, entries)


def box_parts(box: Any, codes: Any) -> Any:
    """Codes and scales of the array in a box, each in a box of its own.

    Args:
      box: around the array.
      codes: a node with the shape of the array in its first array, which keeps the names of the
        box, and the shape of blocks along the last axis in others.
    """
    first, *others = jax.tree.leaves(codes)
    boxes = [jax.tree.structure(box).unflatten([first])]
    if axis_entries_of(box) is None:
        return jax.tree.structure(codes).unflatten([*boxes, *others])
    named = _named_leaf(box)
    for x in others:
        partition = divisible_partition(named.leaf.partition, x.shape, named.leaf.mesh)
        boxes.append(_box(named, x, partition))
    return jax.tree.structure(codes).unflatten(boxes)


def _named_leaf(box: Any) -> NamedLeaf:
    entries, shape = axis_entries_of(box), jax.tree.leaves(box)[0].shape
    if hasattr(box, "axes"):
        return _haliax_leaf(box, entries, shape)
    sizes = get_abstract_mesh().shape
    rules = _flax_rules(box)
    if not rules and not all(name in sizes for name in all_mesh_axes(entries)):
        leaf = LeafPartition(_unknown_mesh(entries, shape), PartitionSpec(*entries))
        return NamedLeaf(box, leaf, True, None)
    partition = _resolve(entries, rules)
    mesh = get_abstract_mesh()
    if not all(name in sizes for name in all_mesh_axes(partition)):
        mesh = _unknown_mesh(partition, shape)
    pairs = zip(entries, map(mesh_axes, partition), strict=True)
    logical = {axes: name for name, axes in pairs if axes} if rules else {}
    return NamedLeaf(box, LeafPartition(mesh, partition), False, partition, logical)


def _haliax_leaf(box: Any, names: Sequence[str], shape: Sequence[int]) -> NamedLeaf:
    haliax = sys.modules.get("haliax.partitioning")
    mapping = (haliax.current_thread_local_mapping() if haliax else None) or {}
    if not mapping:
        leaf = LeafPartition(_unknown_mesh(names, shape), PartitionSpec(*names))
        return NamedLeaf(box, leaf, True, None)
    partition = PartitionSpec(*(_as_entry(mapping.get(name)) for name in names))
    sharded = PartitionSpec(
        *(name if entry else None for name, entry in zip(names, partition, strict=True))
    )
    sizes = get_abstract_mesh().shape
    if all(name in sizes for name in all_mesh_axes(partition)):
        pairs = zip(names, partition, strict=True)
        shape_of = {
            name: math.prod(sizes[axis] for axis in mesh_axes(entry)) for name, entry in pairs
        }
        mesh = UnknownMesh(shape_of, math.prod(sizes.values()))
    else:
        mesh = _unknown_mesh(sharded, shape)
    return NamedLeaf(box, LeafPartition(mesh, sharded), True, partition)


def _unknown_mesh(entries: Iterable[Any], shape: Sequence[int]) -> UnknownMesh:
    """A mesh with the largest sizes that its axes can have."""
    devices = jax.device_count()
    pairs = zip(entries, shape, strict=True)
    sizes = {name: math.gcd(size, devices) for entry, size in pairs for name in mesh_axes(entry)}
    return UnknownMesh(sizes, devices)


def _resolve(entries: Sequence[Any], rules: Sequence[tuple[str, Any]]) -> PartitionSpec:
    """Mesh axes of logical names: for each name the first rule whose mesh axes are all free.

    Without rules names are mesh axes.
    """
    if not rules:
        return PartitionSpec(*entries)
    resolved: list[Any] = [None if isinstance(entry, str) else entry for entry in entries]
    for name, axes in rules:
        used = {*all_mesh_axes(resolved)}
        for i, entry in enumerate(entries):
            free = resolved[i] is None and not used & {*mesh_axes(_as_entry(axes))}
            if entry == name and free and axes:
                resolved[i] = _as_entry(axes)
    return PartitionSpec(*resolved)


def _as_entry(axes: Any) -> Any:
    return tuple(axes) if isinstance(axes, list) else axes


def _flax_rules(box: Any) -> Sequence[tuple[str, Any]]:
    """The rules of a box, else of the context: (logical name, mesh axes)."""
    metadata = box.get_metadata() if hasattr(box, "get_metadata") else {}
    rules = metadata.get("sharding_rules") or getattr(box, "rules", None)
    spmd = sys.modules.get("flax.core.spmd")
    return tuple(rules or (spmd.get_logical_axis_rules() if spmd else ()))
