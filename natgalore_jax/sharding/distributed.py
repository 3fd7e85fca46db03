"""Work on whole matrices that lie on several devices: each where it is, or on_whole_matrices out.

over_shards    a loop over the matrices of a stack, on each device over its own
on_whole_matrices          products of matrices with themselves, each on a device that has all of it
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection

import jax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
)
from jaxtyping import Array, PyTree

from ..tree.leaf_spec import LeafSpec
from .partitioning import ParamPartitions, by_axis, merged, mesh_axes, place, trimmed


def batch_partition(spec: LeafSpec, partitions: ParamPartitions) -> PartitionSpec:
    """How the batch axes of a leaf are sharded; an empty one where they are whole."""
    entry = by_axis(spec, partitions.get(spec.path))
    return trimmed([entry[axis] for axis in spec.batch])


def over_shards(
    f: Callable[..., PyTree],
    spec: LeafSpec,
    partitions: ParamPartitions,
    G: Array,
    which: PyTree,
    state: PyTree,
) -> PyTree:
    """`f(spec, G, which, state)` on each device's own matrices, where batch axes are sharded.

    A loop over the matrices of a stack would gather it whole to cut one out.

    Args:
      f: from a leaf's spec, G, and arrays whose batch axes come first, to new ones of the last.
      spec: of the leaf.
      partitions: of the gradients.
      G: in the leaf's shape.
      which: arrays that are not returned.
      state: those that are.
    """
    batch = batch_partition(spec, partitions)
    if not batch:
        return f(spec, G, which, state)
    entry = by_axis(spec, partitions.get(spec.path))
    names = {name for part in batch for name in mesh_axes(part)}
    context = get_abstract_mesh()
    mesh = partitions.mesh if context.empty else context
    sizes = [
        size // math.prod(mesh.shape[name] for name in mesh_axes(entry[axis]) if axis in spec.batch)
        for axis, size in enumerate(spec.sizes)
    ]
    own = dataclasses.replace(spec, shape=tuple(sizes), split=())
    stacked = PartitionSpec(*[x if a in spec.batch else None for a, x in enumerate(entry)])
    return jax.shard_map(
        functools.partial(f, own),
        mesh=mesh,
        in_specs=(stacked, batch, batch),
        out_specs=batch,
        axis_names=names,
        check_vma=False,
    )(G.reshape(spec.sizes), which, state)


def on_whole_matrices(
    f: Callable[[Array], Array], spec: LeafSpec, partitions: ParamPartitions, x: Array
) -> Array:
    """`f(x)` of the matrices of a leaf, (*batch, m, n), each of which it meets whole on a device.

    For products of a matrix with itself, for each of which shards would be gathered. The matrices
    of a stack are on_whole_matrices out over the devices that share each of them; where their
    number does not allow that, each of these devices works on all.
    """
    context = get_abstract_mesh()
    mesh = context if isinstance(x, jax.core.Tracer) and not context.empty else partitions.mesh
    entry = by_axis(spec, partitions.get(spec.path))
    sides = [merged(spec, axes, entry) for axes in (spec.rows, spec.cols)]
    batch = [[*mesh_axes(entry[axis])] for axis in spec.batch]
    shared = [name for side in sides for name in mesh_axes(side)]
    if mesh is None or not shared or not _are_auto(mesh, [*itertools.chain(*batch), *shared]):
        return f(x)
    lies = PartitionSpec(*[entry[axis] for axis in spec.batch], *sides)
    for name in shared:
        for names, size in zip(batch, spec.batch_shape, strict=True):
            if size % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
                names.append(name)
                break
    whole = NamedSharding(mesh, trimmed([tuple(names) or None for names in batch]))
    return place(place(f(place(x, whole)), whole), NamedSharding(mesh, lies))


def _are_auto(mesh: Mesh | AbstractMesh, names: Collection[str]) -> bool:
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(types[name] == AxisType.Auto for name in names)
