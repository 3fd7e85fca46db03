"""How an optimizer's whole state lies on a mesh: for `jax.jit` and for checkpoints."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .checks import check_choice
from .memory import owner
from .placement import held, lying, trimmed
from .roles import walk
from .spec import LeafSpec


def state_shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    param_shardings: PyTree,
    *,
    zero_axis: str | None = None,
) -> PyTree:
    """The sharding of every array of `tx.init(params)`, for weights that are sharded.

    Of a projected weight on the mesh's axes (a, c) the basis lies as a, moments and windows as c;
    what is r x r or s x s is on every device. What has the shape of a weight lies as it does, and
    all else is on every device.

    Args:
      tx: any optimizer, of this library's transformations and Optax's.
      params: the weights, or `jax.ShapeDtypeStruct` of them: nothing is allocated.
      param_shardings: a NamedSharding for each of them, all of one mesh.
      zero_axis: an axis of the mesh over which state is sharded that would be the same on all its
        devices (ZeRO-1, arXiv:1910.02054): moments and windows of projected weights by their n
        side, those of other weights by the first axis that can be divided. Bases stay whole. On
        Explicit axes the r x n update is gathered; on Auto axes, where an update does not know how
        its weight lies, the compiler gathers the m x n one.

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
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    weights = dict(zip(paths, jax.tree.leaves(params), strict=True))
    try:
        flat = jax.tree.structure(params).flatten_up_to(param_shardings)
    except ValueError as error:
        raise ValueError(f"`param_shardings` is not in the structure of params: {error}") from None
    meshes = {getattr(x, "mesh", None) for x in flat}
    if len(meshes) != 1 or None in meshes:
        raise ValueError(f"`param_shardings` must be NamedShardings of one mesh, got {flat}.")
    (mesh,) = meshes
    if zero_axis is not None:
        check_choice("zero_axis", zero_axis, mesh.axis_names)
    lies = {path: sharding.spec for path, sharding in zip(paths, flat, strict=True)}

    def named(x: Any, entries: PartitionSpec, divisible: Sequence[int]) -> NamedSharding:
        if zero_axis is not None:
            entries = _over(zero_axis, mesh, entries, x.shape, divisible)
        return NamedSharding(mesh, entries)

    def projected(x: Any, role: Any, spec: LeafSpec | None) -> Any:
        if spec is None:
            return x
        ndim = len(x.shape)
        divisible = [ndim - 1] if role in ("linear", "square", "window") else []
        return named(x, lying(x, role, spec, lies[spec.path]), divisible)

    def other(path: tuple, x: Any) -> NamedSharding:
        if isinstance(x, NamedSharding):
            return x
        leaf = owner(path, lies)
        if leaf is None or tuple(weights[leaf].shape) != tuple(x.shape):
            return named(x, PartitionSpec(), [])
        return named(x, trimmed([*lies[leaf]]), range(len(x.shape)))

    state = walk(jax.eval_shape(tx.init, params), projected)
    return jax.tree_util.tree_map_with_path(other, state)


def _over(
    axis: str, mesh: Any, entries: PartitionSpec, shape: tuple[int, ...], divisible: Sequence[int]
) -> PartitionSpec:
    """`entries` with the mesh's `axis` too, on the first axis of `divisible` that it can divide."""
    parts = [*entries, *[None] * (len(shape) - len(entries))]
    if any(axis in held(entry) for entry in parts):
        return entries
    for i in divisible:
        names = (*held(parts[i]), axis)
        if shape[i] and shape[i] % math.prod(mesh.shape[name] for name in names) == 0:
            parts[i] = names if len(names) > 1 else axis
            break
    return trimmed(parts)
