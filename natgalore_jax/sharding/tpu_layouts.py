"""The order in which a TPU stores the axes of gradients, state arrays and updates."""

import functools
import itertools

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ..tree.leaf_spec import LeafSpec
from ..util.control_flow import by_platform
from ..util.tpu_tiles import bits_of, smallest_tiling
from .partitioning import (
    LeafPartition,
    all_mesh_axes,
    axis_entries,
    mesh_axes,
    mesh_of_constraint,
    shards,
)


def in_stored_layout(x: Array, partition: PartitionSpec, leaf: LeafPartition) -> Array:
    """`x`, on TPUs in the layout that an argument of this type has, by its part on one chip.

    XLA:TPU chooses the layout of an array that a loop writes by the products in the loop. Where it
    is another one, every step copies moments, cores and updates to it and back: for 342 columns a
    chip, no multiple of 8, the layout of the argument has the layers next to each other.

    Args:
      x: an array of the state, or of the shape of its leaf.
      partition: of x.
      leaf: the partition of the leaf.
    """
    mesh = mesh_of_constraint(x, leaf)
    if mesh is None:
        return x
    sizes = [
        size // shards(mesh_axes(entry), mesh)
        for size, entry in itertools.zip_longest(x.shape, partition)
    ]
    order = smallest_tiling(sizes, bits_of(x.dtype)).order
    if list(order) == sorted(order):
        return x  # row-major, XLA's choice too
    # The compiler would gather an array for a constraint outside `shard_map`.
    on_shards = jax.shard_map(
        functools.partial(with_layout_constraint, layouts=Layout(order)),
        mesh=mesh,
        in_specs=partition,
        out_specs=partition,
        axis_names={*all_mesh_axes(partition)},
        check_vma=False,
    )
    return by_platform(x, tpu=on_shards, default=lambda x: x)


def stored_layout_of_matrix(spec: LeafSpec, leaf: LeafPartition, G: Array) -> Layout | None:
    """The layout of a matrix in a TPU's array of the leaf; None if it is or may be sharded.

    XLA:TPU gathers a sharded matrix for a constraint of its layout.

    Args:
      spec: of the leaf.
      leaf: the partition of the leaf.
      G: an array of the leaf's shape.
    """
    entries, axes = axis_entries(spec, leaf.partition), spec.matrix_axes
    if leaf.mesh is None:
        is_whole = jax.typeof(G).sharding.mesh.empty
    else:
        is_whole = all(shards(mesh_axes(entries[axis]), leaf.mesh) == 1 for axis in axes)
    if not is_whole:
        return None
    order = smallest_tiling(spec.sizes, bits_of(G.dtype)).order
    return Layout(tuple(axes.index(axis) for axis in order if axis in axes))


def in_layout_on_tpu(x: Array, layout: Layout | None) -> Array:
    """`x`, on TPUs in a layout if there is one."""
    if layout is None:
        return x
    in_layout = functools.partial(with_layout_constraint, layouts=layout)
    return by_platform(x, tpu=in_layout, default=lambda x: x)
