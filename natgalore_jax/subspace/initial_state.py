"""The state of a projection before its first update.

Inner is initialised with zero Cores in place of the projected leaves, so its state has their size.
Bases are random, moments and counters zero, all on the mesh of the params and in their boxes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..sharding.array_partitions import partitions_of
from ..sharding.boxed_state import box_state, named_leaves
from ..sharding.partitioning import ParamPartitions, role_partition, state_partition
from ..sharding.shard_map import varying_as
from ..tree.cores import Basis, Core, allow_no_cores, cores
from ..tree.flax_boxes import unbox, with_boxes
from ..tree.flax_serialization import register_with_flax
from ..tree.state_roles import walk
from .basis import basis_key
from .inner import Inner
from .learning_rate_check import check_learning_rate
from .projection import to_working_dtype, working_dtype
from .residual import RESIDUALS, Residual
from .state import FORMAT_VERSION, ResidualMomentumState, Settings, SubspaceState
from .transport import check_roles
from .weight_decay import inspect


def initial_state(
    inner: Inner,
    settings: Settings,
    residual: str | Residual | None,
    has_momentum: bool,
    params: PyTree,
    specs: PyTree,
) -> SubspaceState:
    """The state for `params`.

    Args:
      inner: the inner transformation.
      settings: of the projection.
      residual: of the projection.
      has_momentum: whether the residual has a momentum.
      params: the parameters.
      specs: like the params without boxes: the LeafSpec of each projected leaf, else None.

    Raises:
      ValueError: inner contains a learning rate that the residual does not allow, reads weights in
        a way that cores do not allow, or has a state that transport cannot carry.
    """
    register_with_flax()
    named = named_leaves(params)
    transformation, params = with_boxes(inner.transformation, params), unbox(params)
    partitions = partitions_of(params)
    refresh = settings.refresh
    specs = jax.tree.map(
        lambda spec: (
            dataclasses.replace(spec, partition=named[spec.path].partition)
            if spec.path in named
            else spec
        ),
        specs,
    )

    def zeros(x, spec, shape, role):
        """A Core of zeros where arrays of the role lie."""
        value = jnp.zeros_like(x, working_dtype(x), shape)
        return Core(
            partitions.place(value, role_partition(role, spec, partitions.leaf(spec))), spec
        )

    def proxy(x, spec):
        if spec is None:
            return to_working_dtype(x)
        return zeros(x, spec, spec.core_shape, "linear")

    def momentum(x, spec):
        if spec is None:
            return None
        return zeros(x, spec, (*spec.batch_shape, spec.m, spec.n), "full")

    def basis(x, spec, side=0):
        if spec is None or (side and not spec.both):
            return None
        index = spec.index + jnp.arange(spec.matrices)
        keys = jax.vmap(lambda i: basis_key(refresh.seed, i, 0, side))(index)
        view = spec.sides[side]
        start = refresh.method.start(keys, view, working_dtype(x))
        return Basis(varying_as(start, x), view, settings)

    def counter(x, spec):
        shape = () if spec is None else spec.batch_shape
        count = jnp.zeros_like(x, jnp.int32, shape)
        return count if spec is None else Core(count, spec)

    proxies = jax.tree.map(proxy, params, specs)
    inner_state = allow_no_cores(transformation.init(proxies))
    origins = inspect(transformation, proxies, inner_state) if cores(proxies) else None
    if residual is not None and not inner.rate_free and cores(proxies):
        check_learning_rate(transformation, proxies, sized=residual in RESIDUALS)
    if refresh.transport is not None:
        check_roles(inner_state, origins)
    if has_momentum:
        inner_state = ResidualMomentumState(jax.tree.map(momentum, params, specs), inner_state)
    state = SubspaceState(
        count=jnp.zeros([], jnp.int32),
        basis=jax.tree.map(basis, params, specs),
        right_basis=jax.tree.map(functools.partial(basis, side=1), params, specs),
        refreshed=jax.tree.map(
            lambda x, spec: None if spec is None else counter(x, spec), params, specs
        ),
        skipped=jax.tree.map(counter, params, specs),
        inner_state=inner_state,
        version=jnp.full([], FORMAT_VERSION, jnp.int32),
    )
    return box_state(_placed(state, partitions), named)


def _placed(state: SubspaceState, partitions: ParamPartitions) -> SubspaceState:
    """The state on the mesh of the params."""

    def at(x, role, spec):
        if spec is not None:
            return partitions.place(x, state_partition(x.shape, role, spec, partitions.leaf(spec)))
        # Arrays of leaves that are not projected are where inner made them.
        return partitions.place(x, jax.sharding.PartitionSpec()) if jnp.ndim(x) == 0 else x

    return walk(state, at)
