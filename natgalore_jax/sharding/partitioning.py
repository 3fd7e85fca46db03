"""How the arrays of a state lie on a mesh, and linear algebra on arrays that do.

A weight of axes (…batch, a, c), seen as m x n matrices with m on a and n on c, gives what is kept
of it their shardings: the basis P (m x r) lies as a does, cores and all that has their shape
(r x n) as c, and what is r x r, s x s or a number lies on every device, but for the batch axes,
which lie as the weight's. The ranks r and s are never sharded, so any rank will do on any mesh.

On a mesh with Explicit axes every array's type says how it lies, and JAX refuses a QR of a sharded
matrix, or a product whose contracted axis is. :func:`with_auto_axes` hands such work to the
compiler, as on
meshes with Auto axes, and states how the results lie. On Auto axes a concrete array says how it
lies, and under `jit` none does, unless the user has said it, for :func:`known_partitions`.
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


Entry = Any  # of a PartitionSpec: None, an axis of the mesh or several


def role_partition(role: str, spec: LeafSpec, param: PartitionSpec) -> PartitionSpec:
    """How an array of `role` lies that belongs to a leaf which lies as `param`.

    Args:
      role: as :func:`walk` tells it; of one that says nothing of axes, only batch axes are sharded.
      spec: the leaf's, or for a basis of the other side that turned.
      param: of the leaf.
    """
    entry = by_axis(spec, param)
    batch = [entry[axis] for axis in spec.batch]
    rows, cols = merged(spec, spec.rows, entry), merged(spec, spec.cols, entry)
    if spec.both and role != "basis":
        cols = None  # r wide
    rest: list[Entry] = {
        "basis": [rows, None],
        "linear": [None, cols],
        "square": [None, cols],
        "square_cols": [cols],
        "window": [None, None, cols],
    }.get(role, [])
    return trimmed([*batch, *rest])


def state_partition(x: Any, role: Any, spec: LeafSpec, param: PartitionSpec) -> PartitionSpec:
    """The same for an array that :func:`walk` met, whose role may be undeclared."""
    if x.shape[: len(spec.batch)] != spec.batch_shape:
        return PartitionSpec()
    if role is None or isinstance(role, Undeclared):
        role = "linear" if x.shape == spec.core_shape else "scalar"
    entries = role_partition(role, spec, param)
    # One number that stands for what is not kept, as Adafactor's does, cannot be sharded.
    return trimmed([e if n > 1 else None for e, n in zip(entries, x.shape, strict=False)])


def trimmed(entries: list[Entry]) -> PartitionSpec:
    """A PartitionSpec without trailing Nones, which JAX writes so: one spelling compiles once."""
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def divisible_partition(
    param: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """`param` where it divides the axes of an array of this shape, and None where it does not."""

    def fits(entry, size):
        return size % math.prod(mesh.shape[name] for name in mesh_axes(entry)) == 0

    return trimmed([e if fits(e, n) else None for e, n in zip(param, shape, strict=False)])


def by_axis(spec: LeafSpec, param: PartitionSpec) -> list[Entry]:
    """The entries of `param` for the axes that `spec` speaks of."""
    left = iter([*param, *[None] * (len(spec.shape) - len(param))])
    cuts = len(spec.sizes) - len(spec.shape)
    blocks = spec.batch[len(spec.batch) - cuts :]  # the axes that cuts made, see `select`
    out: list[Entry] = []
    for axis in range(len(spec.sizes)):
        entry = None if axis in blocks else next(left)
        # Of an axis that is cut the shards do not end where blocks do.
        out.append(None if axis - 1 in blocks else entry)
    return out


def merged(spec: LeafSpec, axes: tuple[int, ...], entry: list[Entry]) -> Entry:
    """How axes that are merged into one lie: as the first, where the others are whole."""
    first, *others = [entry[axis] for axis in axes if spec.sizes[axis] > 1] or [None]
    return None if any(other is not None for other in others) else first


class ParamPartitions(NamedTuple):
    """How the leaves of a tree lie on a mesh.

    Attributes:
      mesh: None where nothing is known of it.
      lies: the PartitionSpec of each leaf, by its path.
    """

    mesh: Mesh | AbstractMesh | None
    lies: Mapping[tuple, PartitionSpec]

    def at(self, path: tuple) -> PartitionSpec:
        return self.lies.get(path, PartitionSpec())

    def place(self, x: Array, entries: PartitionSpec) -> Array:
        """`x` on the mesh, lying as `entries` say."""
        return x if self.mesh is None else place(x, NamedSharding(self.mesh, entries))

    def hint(self, x: Array, entries: PartitionSpec) -> Array:
        """The same where types do not say it: under `jit`, on Auto axes."""
        typed = self.mesh is None or AxisType.Explicit in self.mesh.axis_types
        return x if typed or not isinstance(x, jax.core.Tracer) else self.place(x, entries)


_known: contextvars.ContextVar[ParamPartitions | None] = contextvars.ContextVar(
    "known", default=None
)


@contextlib.contextmanager
def known_partitions(partitions: ParamPartitions) -> Iterator[None]:
    """Within it :func:`partitions_of` answers `partitions` for arrays that cannot say how they
    lie.
    """
    token = _known.set(partitions)
    try:
        yield
    finally:
        _known.reset(token)


def partitions_of(tree: PyTree) -> ParamPartitions:
    """How the leaves of a tree lie: as their types say, or they themselves, or the user."""
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
    """How an array lies, as far as it says: a concrete one does, else its type."""
    if not isinstance(x, jax.core.Tracer):
        return x.sharding.spec if is_on_mesh(x) else PartitionSpec()
    return trimmed(list(jax.typeof(x).sharding.spec))


def with_auto_axes(f: Callable[..., PyTree], like: PyTree, *args: PyTree) -> PyTree:
    """`f(*args)`, inside which the compiler decides how arrays lie.

    Args:
      f: a function of arrays.
      like: what the results lie as: a tree in their structure of arrays or PartitionSpecs.
      *args: of `f`.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return f(*args)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    specs = jax.tree.map(lambda x: x if is_spec(x) else array_partition(x), like, is_leaf=is_spec)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, x), specs, is_leaf=is_spec)
    with use_abstract_mesh(mesh):
        return auto_axes(f, axes=mesh.explicit_axes, out_sharding=shardings)(*args)


def use_mesh_of(tree: PyTree) -> contextlib.AbstractContextManager[Any]:
    """Within it, what is made anew lies on the mesh of `tree`, if that has Explicit axes.

    Under `jit` it does anyway. Where operations run one by one JAX asks for `jax.set_mesh`, and
    this enters it for users who have not.
    """
    mesh = partitions_of(tree).mesh
    explicit = isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types
    if explicit and get_abstract_mesh().empty:
        with contextlib.suppress(ValueError):  # inside a transformation, such as `jit` or `vmap`
            return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def mesh_axes(entry: Entry) -> tuple[str, ...]:
    """The mesh's axes in an entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def place(x: Array, sharding: NamedSharding) -> Array:
    """`x` lying as `sharding` says."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)
