"""How an optimizer's whole state lies on a mesh: told, and seen to."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec, is_core
from ..tree.state_roles import owner, walk
from ..util.validation import check_choice
from .partitioning import (
    ParamPartitions,
    divisible_partition,
    known_partitions,
    mesh_axes,
    state_partition,
    place,
    trimmed,
)


def state_shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    param_shardings: PyTree,
    *,
    zero_axis: str | Sequence[str] | None = None,
    memory_kind: str | None = None,
) -> PyTree:
    """The sharding of every array of `tx.init(params)`, for weights that are sharded.

    Of a projected weight on the mesh's axes (a, c) the basis lies as a, moments and windows as c;
    what is r x r or s x s is on every device. What has the shape of a weight lies as it does, and
    all else is on every device. Of what is :func:`quantized` codes lie as the array would, and
    scales too where the number of blocks allows it.

    Args:
      tx: any optimizer, of this library's transformations and Optax's.
      params: the weights, or `jax.ShapeDtypeStruct` of them: nothing is allocated.
      param_shardings: a NamedSharding for each of them, all of one mesh.
      zero_axis: an axis of the mesh, or several, over which state is sharded that would be the same
        on all its devices (ZeRO-1, arXiv:1910.02054): moments and windows of projected weights by
        their n side, those of other weights by the first axis that can be divided. Bases stay
        whole. On Explicit axes the r x n update is gathered. On Auto axes an update does not know
        how its weight lies, and the compiler gathers the m x n one, unless `tx` is :func:`sharded`.
      memory_kind: of all arrays, such as `"pinned_host"`. None: of each where `tx` makes it, on
        the device, or where :func:`offload` puts it.

    Returns:
      A tree of NamedShardings in the structure of the state.

    Raises:
      ValueError: if `zero_axis` is no axis of the mesh, or the shardings are of several meshes or
        not in the structure of the params.

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
    partitions, zero_axes = _layout(params, param_shardings, zero_axis)
    program, shapes = jax.make_jaxpr(tx.init, return_shape=True)(params)
    shardings = _of_state(shapes, params, partitions, zero_axes)

    at_host = [aval.memory_space == jax.memory.Space.Host for aval in program.out_avals]
    # Named throughout or not at all: jax.jit matches donated arrays to results by the names.
    kinds = ["pinned_host" if x else "device" if any(at_host) else None for x in at_host]
    kept = lambda sharding, kind: sharding.with_memory_kind(memory_kind or kind)
    return jax.tree.map(kept, shardings, jax.tree.structure(shapes).unflatten(kinds))


def sharded(
    tx: optax.GradientTransformation,
    param_shardings: PyTree,
    *,
    zero_axis: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`tx` that knows how the weights lie, which under `jit` on Auto axes no array says.

    Its state is made in place, and stays there, without `out_shardings`. Layers of a stack that is
    sharded over devices refresh where they live, and under `zero_axis` the r x n update is gathered
    instead of the m x n one. On Explicit axes types say all this but for `zero_axis`.

    Args:
      tx: any optimizer, of this library's transformations and Optax's.
      param_shardings: a NamedSharding for each weight, all of one mesh.
      zero_axis: as of :func:`state_shardings`.

    Returns:
      A transformation with the state of `tx`.

    Raises:
      ValueError: as :func:`state_shardings` does, at init or update.

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

    def placed(state: PyTree, params: PyTree) -> PyTree:
        partitions, zero_axes = _layout(params, param_shardings, zero_axis)
        return jax.tree.map(place, state, _of_state(state, params, partitions, zero_axes))

    def init(params: PyTree) -> PyTree:
        partitions, _ = _layout(params, param_shardings, zero_axis)
        with known_partitions(partitions):
            return placed(tx.init(params), params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        leaf = lambda G: True if is_core(G) else G  # where it may have come without its box
        leaves = jax.tree.map(leaf, updates, is_leaf=is_core)
        partitions, _ = _layout(leaves, param_shardings, zero_axis)
        with known_partitions(partitions):
            updates, state = tx.update(updates, state, params, **extra_args)
        flat = zip(jax.tree.leaves(updates), jax.tree.leaves(unbox(param_shardings)), strict=True)
        updates = jax.tree.structure(updates).unflatten([place(x, lies) for x, lies in flat])
        return updates, placed(state, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def _layout(
    params: PyTree, param_shardings: PyTree, zero_axis: str | Sequence[str] | None
) -> tuple[ParamPartitions, tuple[str, ...]]:
    """The mesh and how each weight lies on it, and the axes of ZeRO."""
    params, param_shardings = unbox(params), unbox(param_shardings)
    try:
        flat = jax.tree.structure(params).flatten_up_to(param_shardings)
    except ValueError as error:
        raise ValueError(f"`param_shardings` is not in the structure of params: {error}") from None
    meshes = {getattr(x, "mesh", None) for x in flat}
    if len(meshes) != 1 or None in meshes:
        raise ValueError(f"`param_shardings` must be NamedShardings of one mesh, got {flat}.")
    (mesh,) = meshes
    zero_axes = mesh_axes(tuple(zero_axis) if isinstance(zero_axis, list) else zero_axis)
    for axis in zero_axes:
        check_choice("zero_axis", axis, mesh.axis_names)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    lies = {path: x.spec for path, x in zip(paths, flat, strict=True)}
    return ParamPartitions(mesh, lies), zero_axes


def _of_state(
    state: PyTree, params: PyTree, partitions: ParamPartitions, zero_axes: Sequence[str]
) -> PyTree:
    """The NamedSharding of each array of a state; of both trees shapes suffice."""
    mesh, lies = partitions
    weights = dict(jax.tree_util.tree_leaves_with_path(unbox(params)))

    def named(x: Any, entries: PartitionSpec, divisible: Sequence[int]) -> NamedSharding:
        if x.shape and len(entries) == len(x.shape):
            # The last axis of scales is one of blocks, which may be few.
            last = divisible_partition(PartitionSpec(entries[-1]), x.shape[-1:], mesh)
            entries = trimmed([*entries[:-1], *last])
        for axis in zero_axes:
            entries = _over(axis, mesh, entries, x.shape, divisible)
        return NamedSharding(mesh, entries)

    def projected(x: Any, role: Any, spec: LeafSpec | None) -> Any:
        if spec is None:
            return x
        ndim = len(x.shape)
        divisible = [ndim - 1] if role in ("linear", "square", "window") else []
        return named(x, state_partition(x, role, spec, lies[spec.path]), divisible)

    def other(path: tuple, x: Any) -> NamedSharding:
        if isinstance(x, NamedSharding):
            return x
        leaf = owner(path, lies)
        if leaf is None or not _like(x.shape, weights[leaf].shape):
            return named(x, PartitionSpec(), [])
        return named(x, trimmed([*lies[leaf]]), range(len(x.shape)))

    found = jax.tree_util.tree_leaves_with_path(unbox(walk(state, projected)))
    return jax.tree.structure(state).unflatten([other(path, x) for path, x in found])


def _like(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether an array has the shape of a weight, or of blocks of its last axis."""
    if len(shape) != len(weight) or not shape:
        return tuple(shape) == tuple(weight)
    blocks = shape[-1] and weight[-1] % shape[-1] == 0
    return tuple(shape[:-1]) == tuple(weight[:-1]) and bool(blocks or shape == weight)


def _over(
    axis: str, mesh: Mesh, entries: PartitionSpec, shape: tuple[int, ...], divisible: Sequence[int]
) -> PartitionSpec:
    """`entries` with the mesh's `axis` too, on the first axis of `divisible` that it can divide."""
    parts = [*entries, *[None] * (len(shape) - len(entries))]
    if any(axis in mesh_axes(entry) for entry in parts):
        return entries
    for i in divisible:
        names = (*mesh_axes(parts[i]), axis)
        if shape[i] and shape[i] % math.prod(mesh.shape[name] for name in names) == 0:
            parts[i] = names if len(names) > 1 else axis
            break
    return trimmed(parts)
