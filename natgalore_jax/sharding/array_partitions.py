"""The partitions that arrays have, and linear algebra on arrays whose types contain them.

On Explicit mesh axes every array's type contains its partition, and JAX refuses a QR of a sharded
matrix and a product over a sharded axis. :func:`with_auto_axes` leaves such operations to the
compiler, as on Auto axes, and fixes the partitions of their results. On Auto axes only a concrete
array has a known partition; under `jit` it comes from the user, through :func:`use_partitions`.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
    use_abstract_mesh,
)
from jaxtyping import PyTree

from ..tree.leaf_spec import LeafSpec
from .partitioning import ParamPartitions, all_mesh_axes, trim_partition


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


def partitions_of(tree: PyTree, specs: Sequence[LeafSpec] = ()) -> ParamPartitions:
    """The partitions of the leaves.

    From concrete arrays, else types, else `use_partitions`, else, for the mesh in context, from the
    boxes at init, which `specs` of projected leaves have kept.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    concrete = (x.sharding.mesh for _, x in leaves if is_on_mesh(x))
    mesh = next(concrete, None) or explicit_mesh(tree)
    if mesh is None:
        return _known.get() or _named_partitions(specs)
    return ParamPartitions(mesh, {path: array_partition(x) for path, x in leaves})


def _named_partitions(specs: Sequence[LeafSpec]) -> ParamPartitions:
    named = {spec.path: spec.partition for spec in specs if spec.partition is not None}
    mesh = get_abstract_mesh()
    names = all_mesh_axes(itertools.chain(*named.values()))
    if not named or not all(name in mesh.shape for name in names):
        return ParamPartitions(None, {})
    return ParamPartitions(mesh, named)


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
