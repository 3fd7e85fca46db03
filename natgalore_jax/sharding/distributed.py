"""Operations on the matrices of a leaf that is sharded over devices.

over_shards         a loop over the matrices of a stack, on each device over its own matrices
on_whole_matrices   products of a matrix with itself, on devices that hold the whole matrix
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import (
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
)
from jaxtyping import Array, PyTree

from ..tree.leaf_spec import LeafSpec
from .partitioning import (
    LeafPartition,
    are_auto,
    axis_entries,
    merged_entry,
    mesh_axes,
    place,
    trim_partition,
)


def batch_partition(spec: LeafSpec, leaf: LeafPartition) -> PartitionSpec:
    """The partition of the batch axes of a leaf; P() if they are not sharded."""
    entries = axis_entries(spec, leaf.partition)
    return trim_partition([entries[axis] for axis in spec.batch])


def over_shards(
    f: Callable[..., PyTree],
    spec: LeafSpec,
    leaf: LeafPartition,
    G: Array,
    inputs: PyTree,
    state: PyTree,
) -> PyTree:
    """`f(spec, G, inputs, state)`, on each device with its own matrices if batch axes are sharded.

    Without `shard_map`, a loop over the matrices of a sharded stack would gather the whole stack to
    slice one matrix out.

    Args:
      f: a function of a LeafSpec and arrays, which returns the new `state`.
      spec: of the leaf.
      leaf: the partition of the gradient.
      G: the gradient, in the leaf's shape.
      inputs: arrays whose batch axes come first, not returned.
      state: arrays whose batch axes come first, returned.
    """
    batch = batch_partition(spec, leaf)
    if not batch:
        return f(spec, G, inputs, state)
    entries = axis_entries(spec, leaf.partition)
    names = {name for entry in batch for name in mesh_axes(entry)}
    context = get_abstract_mesh()
    mesh = leaf.mesh if context.empty else context
    local_sizes = [
        size
        // math.prod(mesh.shape[name] for name in mesh_axes(entries[axis]) if axis in spec.batch)
        for axis, size in enumerate(spec.sizes)
    ]
    local_spec = dataclasses.replace(spec, shape=tuple(local_sizes), split=())
    G_partition = PartitionSpec(*[e if a in spec.batch else None for a, e in enumerate(entries)])
    return jax.shard_map(
        functools.partial(f, local_spec),
        mesh=mesh,
        in_specs=(G_partition, batch, batch),
        out_specs=batch,
        axis_names=names,
        check_vma=False,
    )(G.reshape(spec.sizes), inputs, state)


def on_whole_matrices(
    f: Callable[..., Array], spec: LeafSpec, leaf: LeafPartition, x: Array, *args: Any
) -> Array:
    """`f(x, *args)` for the matrices of a leaf, (*batch, m, n), each matrix whole on some device.

    For products of a matrix with itself, each of which would gather the shards. The matrices of a
    stack are distributed over the devices that share each of them; where their number is not
    divisible, each of these devices computes all matrices.
    """
    context = get_abstract_mesh()
    mesh = context if isinstance(x, jax.core.Tracer) and not context.empty else leaf.mesh
    entries = axis_entries(spec, leaf.partition)
    sides = [merged_entry(spec, axes, entries) for axes in (spec.rows, spec.cols)]
    batch = [[*mesh_axes(entries[axis])] for axis in spec.batch]
    shared = [name for side in sides for name in mesh_axes(side)]
    if mesh is None or not shared or not are_auto(mesh, [*itertools.chain(*batch), *shared]):
        return f(x, *args)
    sharding = NamedSharding(mesh, PartitionSpec(*[entries[axis] for axis in spec.batch], *sides))
    for name in shared:
        for names, size in zip(batch, spec.batch_shape, strict=True):
            if size % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
                names.append(name)
                break
    whole = NamedSharding(mesh, trim_partition([tuple(names) or None for names in batch]))
    return place(place(f(place(x, whole), *args), whole), sharding)
