"""PartitionSpecs of optimizer state.

A weight with PartitionSpec P(…batch, a, c), seen as m x n matrices with m sharded over mesh axis a
and n over c, determines the partitions of its state. Every state array is divided over all mesh
axes of its weight:

- basis (m x r): m over a and c,
- cores and moments (r x n): n over c and a,
- r x r arrays: r over a and c.

A mesh axis that does not divide m or n divides r, else a batch axis; otherwise the array is
replicated along that axis. A replicated weight has replicated state, unless ZeRO adds mesh axes.

Products with G and W need P with m over a alone and cores with n over c alone: :func:`align`
gathers them, m r and r n numbers.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
)
from jaxtyping import Array

from ..tree.leaf_spec import LeafSpec
from ..tree.state_roles import AXES, axis_size


Entry = Any  # of a PartitionSpec: None, one mesh axis or a tuple of several


class UnknownMesh(NamedTuple):
    """Stands for a mesh of which only bounds are known.

    Attributes:
      shape: for each mesh axis the largest size that it can have.
      devices: a multiple of the size of every group of mesh axes.
    """

    shape: Mapping[str, int]
    devices: int


class LeafPartition(NamedTuple):
    """The partition of one leaf, and its mesh; static and hashable.

    Attributes:
      mesh: None if nothing is known of it.
      partition: the PartitionSpec of the leaf.
      zero_axes: further mesh axes that divide the state of the leaf, not the leaf (ZeRO).
    """

    mesh: Mesh | AbstractMesh | UnknownMesh | None
    partition: PartitionSpec
    zero_axes: tuple[str, ...] = ()


class ParamPartitions(NamedTuple):
    """The PartitionSpec of each parameter, and the mesh.

    Attributes:
      mesh: None if no leaf is on a known mesh.
      partitions: the PartitionSpec of each leaf, by its path; a missing leaf is replicated.
      zero_axes: see :class:`LeafPartition`.
    """

    mesh: Mesh | AbstractMesh | None
    partitions: Mapping[tuple, PartitionSpec]
    zero_axes: tuple[str, ...] = ()

    def leaf(self, spec: LeafSpec) -> LeafPartition:
        """The partition of a projected leaf."""
        partition = self.partitions.get(spec.path, PartitionSpec())
        return LeafPartition(self.mesh, partition, self.zero_axes)

    def place(self, x: Array, partition: PartitionSpec) -> Array:
        """`x` with `partition` on the mesh; unchanged without a mesh."""
        return x if self.mesh is None else place(x, NamedSharding(self.mesh, partition))


def state_partition(
    shape: tuple[int, ...], role: Any, spec: LeafSpec, leaf: LeafPartition, alone: bool = False
) -> PartitionSpec:
    """The partition in which a state array is stored.

    Args:
      shape: of the array, or of the codes or scales that encode it.
      role: of the array, see :func:`register_state`.
      spec: of the leaf, or `spec.transposed` for the basis Q of the n side.
      leaf: the partition of the leaf.
      alone: whether each entry has one name at most.
    """
    if shape[: len(spec.batch)] != spec.batch_shape:
        return PartitionSpec()
    if role not in AXES:
        role = "linear" if shape == spec.core_shape else "scalar"
    aligned = aligned_partition(role, spec, leaf)
    if leaf.mesh is None:
        return aligned
    partition = divisible_partition(aligned, shape, leaf.mesh)
    if not {"m", "r", "k"} & {*AXES[role]}:
        return partition
    names = all_mesh_axes((*leaf.partition, leaf.zero_axes))
    return add_axes(partition, names, shape, leaf.mesh, len(spec.batch), alone)


def role_partition(role: str, spec: LeafSpec, leaf: LeafPartition) -> PartitionSpec:
    """`state_partition` of an array of the shape that its role has; not for windows."""
    sizes = [axis_size(axis, spec) or 1 for axis in AXES[role]]
    return state_partition((*spec.batch_shape, *sizes), role, spec, leaf)


def aligned_partition(role: str, spec: LeafSpec, leaf: LeafPartition) -> PartitionSpec:
    """The partition of a state array along the axes that it shares with the leaf."""
    entries = axis_entries(spec, leaf.partition)
    rows, cols = (merged_entry(spec, axes, entries) for axes in (spec.rows, spec.cols))
    sides = {"m": rows, "n": cols, "k": None if spec.both else cols}  # of both sides k is r
    batch = [entries[axis] for axis in spec.batch]
    return trim_partition([*batch, *(sides.get(axis) for axis in AXES[role])])


def align(x: Array, role: str, spec: LeafSpec, leaf: LeafPartition) -> Array:
    """`x` in its `aligned_partition`, gathered along the other mesh axes of the leaf.

    Without this constraint the compiler may gather or exchange the m x n operand of a product.
    """
    if not is_divided_further(x, role, spec, leaf):
        return x
    return _constrain(x, aligned_partition(role, spec, leaf), leaf)


def is_divided_further(x: Array, role: str, spec: LeafSpec, leaf: LeafPartition) -> bool:
    """Whether :func:`align` gathers `x`."""
    return state_partition(x.shape, role, spec, leaf) != aligned_partition(role, spec, leaf)


def store(x: Array, role: str, spec: LeafSpec, leaf: LeafPartition) -> Array:
    """`x` in the `state_partition` of its role."""
    return _constrain(x, state_partition(x.shape, role, spec, leaf), leaf)


def _constrain(x: Array, partition: PartitionSpec, leaf: LeafPartition) -> Array:
    mesh = mesh_of_constraint(x, leaf)
    return x if mesh is None else place(x, NamedSharding(mesh, partition))


def mesh_of_constraint(x: Array, leaf: LeafPartition) -> Mesh | AbstractMesh | None:
    """The mesh on which `x` can be constrained; None if there is none."""
    context, traced = get_abstract_mesh(), isinstance(x, jax.core.Tracer)
    mesh = context if traced and not context.empty else leaf.mesh
    names = all_mesh_axes((*leaf.partition, leaf.zero_axes))
    # A mesh that only names in boxes refer to has no devices to move a concrete array to.
    has_devices = traced or isinstance(mesh, Mesh)
    if mesh is None or not has_devices or not names or not are_auto(mesh, names):
        return None
    return mesh


def are_auto(mesh: Mesh | AbstractMesh, names: Iterable[str]) -> bool:
    """Whether the compiler chooses shardings along all mesh axes `names`."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(types[name] == AxisType.Auto for name in names)


def add_axes(
    partition: PartitionSpec,
    names: Iterable[str],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh | UnknownMesh,
    batch: int = 0,
    alone: bool = False,
) -> PartitionSpec:
    """`partition` with each of the mesh axes added to the largest axis that it divides.

    Args:
      partition: of the array.
      names: of mesh axes, in order; those already in `partition` are skipped.
      shape: of the array. Of axes of equal sizes the first is divided.
      mesh: has the sizes of the mesh axes.
      batch: the number of leading axes that are divided only where no other axis can be.
      alone: whether axes that are divided already are skipped.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
      >>> tuple(add_axes(PartitionSpec(None, "tensor"), ["fsdp"], (128, 1024), mesh))
      (None, ('tensor', 'fsdp'))
      >>> tuple(add_axes(PartitionSpec(None, "tensor"), ["fsdp"], (128, 1022), mesh))
      ('fsdp', 'tensor')
    """
    entries = [*partition, *[None] * (len(shape) - len(partition))]
    order = sorted(range(len(shape)), key=lambda i: (i < batch, -shape[i]))
    for name in names:
        if mesh.shape[name] == 1 or name in all_mesh_axes(entries):
            continue
        for i in order:
            divided = (*mesh_axes(entries[i]), name)
            if alone and len(divided) > 1:
                continue
            if shape[i] and shape[i] % shards(divided, mesh) == 0:
                entries[i] = divided if len(divided) > 1 else name
                break
    return trim_partition(entries)


def trim_partition(entries: list[Entry]) -> PartitionSpec:
    """The PartitionSpec without trailing Nones, JAX's own spelling: equal ones compile once."""
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def shards(names: Iterable[str], mesh: Mesh | AbstractMesh | UnknownMesh) -> int:
    """The number of devices along mesh axes; a multiple of it if the mesh is unknown."""
    number = math.prod(mesh.shape[name] for name in names)
    return math.gcd(number, mesh.devices) if isinstance(mesh, UnknownMesh) else number


def divisible_partition(
    partition: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | UnknownMesh
) -> PartitionSpec:
    """`partition` with None for every axis of `shape` that the mesh axes do not divide."""

    def divides(entry, size):
        return size % shards(mesh_axes(entry), mesh) == 0

    return trim_partition(
        [e if divides(e, n) else None for e, n in zip(partition, shape, strict=False)]
    )


def axis_entries(spec: LeafSpec, partition: PartitionSpec) -> list[Entry]:
    """The entries of a leaf's partition for the axes in `spec.sizes`.

    An axis that is split into (blocks, size) gets None for both: its shards need not end where the
    blocks do.
    """
    remaining = iter([*partition, *[None] * (len(spec.shape) - len(partition))])
    splits = len(spec.sizes) - len(spec.shape)
    block_axes = spec.batch[len(spec.batch) - splits :]
    entries: list[Entry] = []
    for axis in range(len(spec.sizes)):
        entry = None if axis in block_axes else next(remaining)
        entries.append(None if axis - 1 in block_axes else entry)
    return entries


def merged_entry(spec: LeafSpec, axes: tuple[int, ...], entries: list[Entry]) -> Entry:
    """The entry of several axes reshaped to one: the first's, if the others are not sharded."""
    first, *others = [entries[axis] for axis in axes if spec.sizes[axis] > 1] or [None]
    return None if any(other is not None for other in others) else first


def mesh_axes(entry: Entry) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def all_mesh_axes(entries: Iterable[Entry]) -> list[str]:
    """The mesh axes in the entries of a PartitionSpec, in order."""
    return [name for entry in entries for name in mesh_axes(entry)]


def place(x: Array, sharding: NamedSharding) -> Array:
    """`x` with `sharding`: moved if concrete, resharded or constrained if traced."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)
