"""PartitionSpecs of optimizer state, and linear algebra on sharded arrays.

A weight with PartitionSpec P(…batch, a, c), seen as m x n matrices with m sharded over mesh axis a
and n over c, determines the partitions of its state: the basis (m x r) has P(…batch, a), cores and
moments (r x n) have P(…batch, None, c), and r x r, s x s and scalar arrays are sharded over the
batch axes only. The ranks r and s are never sharded, so any rank works on any mesh.

On Explicit mesh axes every array's type contains its partition, and JAX refuses a QR of a sharded
matrix and a product over a sharded axis. :func:`with_auto_axes` leaves such operations to the
compiler, as on Auto axes, and fixes the partitions of their results. On Auto axes only a concrete
array has a known partition; under `jit` it comes from the user, through :func:`use_partitions`.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
    use_abstract_mesh,
)
from jaxtyping import Array, PyTree

from ..tree.leaf_spec import LeafSpec
from ..tree.state_roles import Undeclared


Entry = Any  # of a PartitionSpec: None, one mesh axis or a tuple of several


class LeafPartition(NamedTuple):
    """The partition of one leaf, and its mesh; static and hashable.

    Attributes:
      mesh: None if nothing is known of it.
      partition: the PartitionSpec of the leaf.
    """

    mesh: Mesh | AbstractMesh | None
    partition: PartitionSpec


class ParamPartitions(NamedTuple):
    """The PartitionSpec of each parameter, and the mesh.

    Attributes:
      mesh: None if no leaf is on a known mesh.
      partitions: the PartitionSpec of each leaf, by its path; a missing leaf is replicated.
    """

    mesh: Mesh | AbstractMesh | None
    partitions: Mapping[tuple, PartitionSpec]

    def get(self, path: tuple) -> PartitionSpec:
        """The PartitionSpec of the leaf at `path`."""
        return self.partitions.get(path, PartitionSpec())

    def leaf(self, spec: LeafSpec) -> LeafPartition:
        """The partition of a projected leaf."""
        return LeafPartition(self.mesh, self.get(spec.path))

    def place(self, x: Array, partition: PartitionSpec) -> Array:
        """`x` with `partition` on the mesh; unchanged without a mesh."""
        return x if self.mesh is None else place(x, NamedSharding(self.mesh, partition))

    def hint(self, x: Array, partition: PartitionSpec) -> Array:
        """`place` for arrays without a partition of their own: under `jit` on Auto axes."""
        typed = self.mesh is None or AxisType.Explicit in self.mesh.axis_types
        return x if typed or not isinstance(x, jax.core.Tracer) else self.place(x, partition)


def role_partition(role: str, spec: LeafSpec, param: PartitionSpec) -> PartitionSpec:
    """The partition of a state array.

    Args:
      role: of the array, see :func:`register_state`. For a role without a matrix axis of the leaf,
        only the batch axes are sharded.
      spec: of the leaf, or `spec.transposed` for the basis Q of the n side.
      param: the partition of the leaf.
    """
    entries = axis_entries(spec, param)
    batch = [entries[axis] for axis in spec.batch]
    rows, cols = merged_entry(spec, spec.rows, entries), merged_entry(spec, spec.cols, entries)
    if spec.both and role != "basis":
        cols = None  # r wide
    matrix: list[Entry] = {
        "basis": [rows, None],
        "linear": [None, cols],
        "square": [None, cols],
        "square_cols": [cols],
        "window": [None, None, cols],
    }.get(role, [])
    return trim_partition([*batch, *matrix])


def state_partition(x: Any, role: Any, spec: LeafSpec, param: PartitionSpec) -> PartitionSpec:
    """`role_partition` of an array that :func:`walk` visits, whose role may be undeclared."""
    if x.shape[: len(spec.batch)] != spec.batch_shape:
        return PartitionSpec()
    if role is None or isinstance(role, Undeclared):
        role = "linear" if x.shape == spec.core_shape else "scalar"
    entries = role_partition(role, spec, param)
    # Placeholders of size 1, as in Adafactor's state, cannot be sharded.
    return trim_partition([e if n > 1 else None for e, n in zip(entries, x.shape, strict=False)])


def trim_partition(entries: list[Entry]) -> PartitionSpec:
    """The PartitionSpec without trailing Nones, JAX's own spelling: equal ones compile once."""
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def divisible_partition(
    param: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """`param` with None for every axis of `shape` that the mesh axes do not divide."""

    def divides(entry, size):
        return size % math.prod(mesh.shape[name] for name in mesh_axes(entry)) == 0

    return trim_partition(
        [e if divides(e, n) else None for e, n in zip(param, shape, strict=False)]
    )


def axis_entries(spec: LeafSpec, param: PartitionSpec) -> list[Entry]:
    """The entries of `param` for the axes in `spec.sizes`.

    An axis that is split into (blocks, size) gets None for both: its shards need not end where the
    blocks do.
    """
    remaining = iter([*param, *[None] * (len(spec.shape) - len(param))])
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


_known: contextvars.ContextVar[ParamPartitions | None] = contextvars.ContextVar(
    "known", default=None
)


@contextlib.contextmanager
def use_partitions(partitions: ParamPartitions) -> Iterator[None]:
    """Context in which :func:`partitions_of` returns `partitions` for arrays without a mesh."""
    token = _known.set(partitions)
    try:
        yield
    finally:
        _known.reset(token)


def partitions_of(tree: PyTree) -> ParamPartitions:
    """The partitions of the leaves: from concrete arrays, else types, else `use_partitions`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    concrete = (x.sharding.mesh for _, x in leaves if is_on_mesh(x))
    mesh = next(concrete, None) or explicit_mesh(tree)
    if mesh is None:
        return _known.get() or ParamPartitions(None, {})
    return ParamPartitions(mesh, {path: array_partition(x) for path, x in leaves})


def explicit_mesh(tree: PyTree) -> Any:
    """The mesh in the types of the arrays of a tree if it has Explicit axes, else None."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def is_on_mesh(x: Any) -> bool:
    """Whether x is a concrete array on a mesh."""
    tracer = isinstance(x, jax.core.Tracer)
    return not tracer and isinstance(getattr(x, "sharding", None), NamedSharding)


def array_partition(x: Any) -> PartitionSpec:
    """The partition of a concrete array, or of a tracer's type; P() if neither has one."""
    if not isinstance(x, jax.core.Tracer):
        return x.sharding.spec if is_on_mesh(x) else PartitionSpec()
    return trim_partition(list(jax.typeof(x).sharding.spec))


def with_auto_axes(
    f: Callable[..., PyTree], out_like: PyTree | Callable[[], PyTree], *args: PyTree
) -> PyTree:
    """`f(*args)` with shardings inside `f` chosen by the compiler, on Explicit axes too.

    Args:
      f: a function of arrays.
      out_like: the partitions of the results, as a tree of PartitionSpecs or arrays that have
        them; or a function that returns this tree, called only on Explicit axes.
      *args: of `f`.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return f(*args)
    out_like = out_like() if callable(out_like) else out_like
    is_partition = lambda x: isinstance(x, PartitionSpec)
    sharding = lambda x: NamedSharding(mesh, x if is_partition(x) else array_partition(x))
    out_sharding = jax.tree.map(sharding, out_like, is_leaf=is_partition)
    with use_abstract_mesh(mesh):
        return auto_axes(f, axes=mesh.explicit_axes, out_sharding=out_sharding)(*args)


def use_mesh_of(tree: PyTree) -> contextlib.AbstractContextManager[Any]:
    """Context in which new arrays are on the mesh of `tree`, if that has Explicit axes.

    Under `jit` they are in any case. Outside, JAX requires `jax.set_mesh`; this context enters it
    for users who have not.
    """
    mesh = partitions_of(tree).mesh
    explicit = isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types
    if explicit and get_abstract_mesh().empty:
        with contextlib.suppress(ValueError):  # inside a transformation such as `jit` or `vmap`
            return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def mesh_axes(entry: Entry) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def place(x: Array, sharding: NamedSharding) -> Array:
    """`x` with `sharding`: moved if concrete, resharded or constrained if traced."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)
