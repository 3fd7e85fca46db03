"""NamedShardings of an optimizer's state; roles have their PartitionSpecs in partitioning.py."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ..tree.cores import is_core
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec
from ..tree.state_roles import owner, walk
from ..util.validation import check_choice
from .array_partitions import use_partitions
from .partitioning import (
    ParamPartitions,
    add_axes,
    all_mesh_axes,
    divisible_partition,
    mesh_axes,
    place,
    state_partition,
)


def state_shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    param_shardings: PyTree,
    *,
    zero_axis: str | Sequence[str] | None = None,
    memory_kind: str | None = None,
) -> PyTree:
    """The sharding of every array of `tx.init(params)` for sharded weights.

    The state of a weight is divided over all mesh axes of the weight: for a projected weight
    sharded P(a, c), the basis is P((a, c), None), moments are P(None, (c, a)), and r x r arrays
    P((a, c), None). A mesh axis that does not divide m or n divides r, else a batch axis. Arrays
    with the shape of a weight have the weight's sharding; all others are replicated. In a
    :func:`quantized` state, codes have the sharding of the array they encode, and so have scales if
    the number of blocks is divisible.

    Args:
      tx: any optimizer made of this library's and Optax's transformations.
      params: the weights, or their `jax.ShapeDtypeStruct`; no array is allocated.
      param_shardings: a NamedSharding for each weight, all on one mesh.
      zero_axis: one or several mesh axes that divide the state although they do not divide the
        weights (ZeRO-1, arXiv:1910.02054). Each step gathers bases and r x n updates; on Auto axes
        the compiler gathers m x n updates, unless `tx` is :func:`sharded`.
      memory_kind: of all arrays, such as `"pinned_host"`. None: the memory in which `tx` creates
        each array, the device's or, with :func:`offload`, the host's.

    Returns:
      A tree of NamedShardings in the structure of the state.

    Raises:
      ValueError: if `zero_axis` is no axis of the mesh, the shardings are on several meshes, or
        their tree has another structure than the params.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> params = {"up": {"kernel": jnp.ones((64, 256))}}
      >>> shardings = {"up": {"kernel": NamedSharding(mesh, P("fsdp", None))}}
      >>> tx = natgalore.galore(1e-3, rank=16)
      >>> state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, shardings))(params)
      >>> state[0].basis["up"]["kernel"].value.sharding.spec
      P('fsdp',)
    """
    partitions = _param_partitions(params, param_shardings, zero_axis)
    program, shapes = jax.make_jaxpr(tx.init, return_shape=True)(params)
    shardings = _shardings_of_state(shapes, params, partitions)

    on_host = [aval.memory_space == jax.memory.Space.Host for aval in program.out_avals]
    # A memory kind for all arrays or for none: jax.jit matches donated arrays to results by it.
    kinds = ["pinned_host" if x else "device" if any(on_host) else None for x in on_host]
    with_kind = lambda sharding, kind: sharding.with_memory_kind(memory_kind or kind)
    return jax.tree.map(with_kind, shardings, jax.tree.structure(shapes).unflatten(kinds))


class Sharded(optax.GradientTransformationExtraArgs):
    """A transformation that may know the partitions of the params, as that of :func:`sharded`."""

    param_partitions: Callable[[PyTree], ParamPartitions] | None


def sharded(
    tx: optax.GradientTransformation,
    param_shardings: PyTree,
    *,
    zero_axis: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives `tx` the shardings of the weights, which arrays under `jit` on Auto axes lack.

    The state is created sharded and stays so, without `out_shardings`. Matrices of a stack that is
    sharded over layers are refreshed on their own devices, and m x n arrays travel for an
    orthogonalised residual only. On Explicit axes array types contain the shardings, and `sharded`
    adds only `zero_axis`.

    Args:
      tx: any optimizer made of this library's and Optax's transformations.
      param_shardings: a NamedSharding for each weight, all on one mesh.
      zero_axis: see :func:`state_shardings`.

    Returns:
      A transformation with the state of `tx`.

    Raises:
      ValueError: at init or update, for the reasons given at :func:`state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"up": {"kernel": jnp.ones((64, 256))}}
      >>> shardings = {"up": {"kernel": NamedSharding(mesh, P("fsdp"))}}
      >>> tx = sharded(natgalore.galore(1e-3, rank=16), shardings)
      >>> tx.init(params)[0].basis["up"]["kernel"].value.sharding.spec
      P('fsdp',)
    """
    tx = optax.with_extra_args_support(tx)

    def place_state(state: PyTree, params: PyTree) -> PyTree:
        partitions = _param_partitions(params, param_shardings, zero_axis)
        return jax.tree.map(place, state, _shardings_of_state(state, params, partitions))

    def init(params: PyTree) -> PyTree:
        with use_partitions(_param_partitions(params, param_shardings, zero_axis)):
            return place_state(tx.init(params), params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        leaf = lambda G: True if is_core(G) else G  # Cores come without the box of their leaf
        leaves = jax.tree.map(leaf, updates, is_leaf=is_core)
        partitions = _param_partitions(leaves, param_shardings, zero_axis)
        with use_partitions(partitions):
            updates, state = tx.update(updates, state, params, **extra_args)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(unbox(param_shardings)), strict=True)
        updates = jax.tree.structure(updates).unflatten([place(*pair) for pair in pairs])
        return updates, place_state(state, updates)

    transformation = Sharded(init, update)
    transformation.param_partitions = lambda params: _param_partitions(
        params, param_shardings, zero_axis
    )
    return transformation


def _param_partitions(
    params: PyTree, param_shardings: PyTree, zero_axis: str | Sequence[str] | None
) -> ParamPartitions:
    """The partitions of the weights and the axes of ZeRO, both checked."""
    params, param_shardings = unbox(params), unbox(param_shardings)
    try:
        shardings = jax.tree.structure(params).flatten_up_to(param_shardings)
    except ValueError as error:
        raise ValueError(
            f"`param_shardings` must have the structure of the params: {error}"
        ) from None
    meshes = {getattr(x, "mesh", None) for x in shardings}
    if len(meshes) != 1 or None in meshes:
        raise ValueError(f"`param_shardings` must be NamedShardings on one mesh, got {shardings}.")
    (mesh,) = meshes
    zero_axes = mesh_axes(tuple(zero_axis) if isinstance(zero_axis, list) else zero_axis)
    for axis in zero_axes:
        check_choice("zero_axis", axis, mesh.axis_names)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    partitions = {path: x.spec for path, x in zip(paths, shardings, strict=True)}
    return ParamPartitions(mesh, partitions, zero_axes)


def _shardings_of_state(state: PyTree, params: PyTree, partitions: ParamPartitions) -> PyTree:
    """The NamedSharding of each array of a state; both trees may hold ShapeDtypeStructs."""
    mesh, param_partitions, zero_axes = partitions
    weights = dict(jax.tree_util.tree_leaves_with_path(unbox(params)))

    def projected(x: Any, role: Any, spec: LeafSpec | None) -> Any:
        if spec is None:
            return x
        return NamedSharding(mesh, state_partition(x.shape, role, spec, partitions.leaf(spec)))

    def other(path: tuple, x: Any) -> NamedSharding:
        if isinstance(x, NamedSharding):
            return x
        leaf = owner(path, param_partitions)
        if leaf is None or not _has_shape_of(weights[leaf].shape, x.shape):
            return NamedSharding(mesh, PartitionSpec())
        # Fewer scales than codes: a mesh axis may divide the weight and not them.
        partition = divisible_partition(param_partitions[leaf], x.shape, mesh)
        names = [*all_mesh_axes(param_partitions[leaf]), *zero_axes]
        return NamedSharding(mesh, add_axes(partition, names, x.shape, mesh))

    leaves = jax.tree_util.tree_leaves_with_path(unbox(walk(state, projected)))
    return jax.tree.structure(state).unflatten([other(path, x) for path, x in leaves])


def _has_shape_of(weight: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether `shape` is a weight's, or that of blocks along its last axis."""
    if len(shape) != len(weight) or not shape:
        return tuple(shape) == tuple(weight)
    blocks = shape[-1] and weight[-1] % shape[-1] == 0
    return tuple(shape[:-1]) == tuple(weight[:-1]) and bool(blocks or shape == weight)
