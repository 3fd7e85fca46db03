"""One step in the subspace, on one tree.

    refresh  P from G where it is due, and what inner remembers carried along (refresh.py)
    project  R = PᵀG, or PᵀG Q (lower.py)
    gate     a matrix whose gradient is not finite hands on a zero core instead
    inner    U = inner(R): one transformation over one tree of Cores and other leaves
    lift     P U, or P U Qᵀ, in the leaf's shape, what was left out, if it is asked for, and inner's
             decay of the whole weight (lift.py, residual.py)

Inner sees float32 (float64 where a leaf is), whatever the dtype of the params: a second moment in
bfloat16 with b2 = 0.999 cannot move.

Reference: Zhao et al., "GaLore", arXiv:2403.03507, algorithm 2; Das, "Natural GaLore",
arXiv:2410.16029, algorithm 1.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, PyTree

from ..sharding.partitioning import (
    ParamPartitions,
    partitions_of,
    role_partition,
    state_partition,
    with_auto_axes,
)
from ..sharding.shard_map import check_reduced, varying_as
from ..tree.flax_boxes import is_box, rebox, unbox, with_boxes
from ..tree.leaf_spec import Basis, Core, LeafSpec, allow_no_cores, cores, is_core, replace_cores
from ..tree.state_roles import is_per_leaf_scalar, register_state, slice_shape, walk
from .basis import basis_key
from .learning_rate_check import check_learning_rate
from .lift import lift
from .projection import check_cores, gate, lower, working, working_dtype
from .refresh import Refresh
from .residual import Residual, ResidualState, is_limited, no_norms
from .transport import check_roles
from .weight_decay import inspect, update_with_decay


FORMAT_VERSION = 1  # of the state; a new one comes with a way to read the old


class SubspaceState(NamedTuple):
    """What :func:`project` remembers.

    Its arrays are float32 whatever the dtype of the params (float64 where a leaf is), so a
    checkpoint of it goes on with weights that have become bfloat16.

    Attributes:
      count: steps taken, one int32.
      basis: a tree like the params with a Basis, (*batch, m, r), at each projected leaf and None
        elsewhere.
      right_basis: the same of Q, (*batch, n, r), at leaves projected on both sides.
      refreshed: how often each matrix has got a new basis, (*batch) int32 at each projected leaf.
        Zero: it still has its random one, and the first usable gradient brings a new.
      skipped: a tree like the params, int32: how often a gradient was not finite, for each matrix
        (*batch) of a projected leaf, for each other leaf as a whole.
      inner_state: the inner transformation's state; its arrays of projected leaves are Cores.
      version: of this partitions, one int32, so that a later release knows what it reads.
    """

    count: Int[Array, ""]
    basis: PyTree
    right_basis: PyTree
    refreshed: PyTree
    skipped: PyTree
    inner_state: PyTree
    version: Int[Array, ""]


register_state(
    SubspaceState, count="scalar", refreshed="scalar", skipped="scalar", version="scalar"
)

State = SubspaceState | ResidualState

_found = contextvars.ContextVar[list | None]("engines found", default=None)


@contextlib.contextmanager
def finding() -> Iterator[list["tuple[Engine, SubspaceState, ParamPartitions]"]]:
    """Within it every engine that makes a state is noted, that state, and how its leaves lie.

    A transformation does not tell what it is composed of, but its init reaches all of it.
    """
    found: list[tuple[Engine, SubspaceState, ParamPartitions]] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


class Engine:
    """The transformation behind :func:`project`; its arguments are checked there."""

    def __init__(
        self,
        inner: optax.GradientTransformation,
        *,
        refresh: Refresh,
        scale: Any,
        residual: str | Residual | None,
    ):
        self.inner = optax.with_extra_args_support(inner)
        self.refresh = refresh
        self.scale = scale
        self.residual = residual
        self.check = None if residual is None else check_learning_rate

    def init(self, params: PyTree, specs: PyTree) -> State:
        """The state for `params`, out of their boxes seen as `specs`: LeafSpecs, or None."""
        inner, params = with_boxes(self.inner, params), unbox(params)
        partitions = partitions_of(params)

        def proxy(x, spec):
            if spec is None:
                return working(x)
            core = jnp.zeros_like(x, working_dtype(x), spec.core_shape)
            entries = role_partition("linear", spec, partitions.get(spec.path))
            return Core(partitions.place(core, entries), spec)

        def basis(x, spec, side=0):
            if spec is None or (side and not spec.both):
                return None
            index = spec.index + jnp.arange(spec.matrices)
            keys = jax.vmap(lambda i: basis_key(self.refresh.seed, i, 0, side))(index)
            view = spec.transposed if side else spec
            start = self.refresh.method.start(keys, view, working_dtype(x))
            return Basis(varying_as(start, x), view)

        def refreshed(x, spec):
            return None if spec is None else skipped(x, spec)

        def skipped(x, spec):
            shape = () if spec is None else spec.batch_shape
            zeros = jnp.zeros_like(x, jnp.int32, shape)
            return zeros if spec is None else Core(zeros, spec)

        proxies = jax.tree.map(proxy, params, specs)
        inner_state = allow_no_cores(inner.init(proxies))
        origins = inspect(inner, proxies, inner_state, self.check) if cores(proxies) else None
        if self.refresh.transport is not None:
            check_roles(inner_state, origins)
        state = SubspaceState(
            count=jnp.zeros([], jnp.int32),
            basis=jax.tree.map(basis, params, specs),
            right_basis=jax.tree.map(functools.partial(basis, side=1), params, specs),
            refreshed=jax.tree.map(refreshed, params, specs),
            skipped=jax.tree.map(skipped, params, specs),
            inner_state=inner_state,
            version=jnp.full([], FORMAT_VERSION, jnp.int32),
        )
        found = _found.get()
        if found is not None:
            found.append((self, state, partitions))
        if is_limited(self.residual):
            state = ResidualState(state, no_norms(proxies))
        return _placed(state, partitions)

    def update(
        self,
        updates: PyTree,
        state: State,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, State]:
        """The update of every leaf, in the leaf's shape and dtype, and the state after it."""
        if self.residual is not None and cores(updates):
            raise ValueError(
                "`residual` needs whole gradients, and these are cores: take those of "
                "jax.value_and_grad, or residual=None."
            )
        boxes = _as_leaves(updates, params)
        inner, leaves = with_boxes(self.inner, boxes), unbox(boxes)
        updates, params = unbox(updates), unbox(params)
        walk(state, _refuse_misfit)
        state, norm = state if isinstance(state, ResidualState) else (state, None)
        check_cores(updates, state.basis)
        check_reduced(updates, state.skipped)
        partitions = partitions_of(leaves)
        lying_as = lambda role: jax.tree_util.tree_map_with_path(
            functools.partial(_lying, role, partitions), leaves, state.basis
        )
        like = (
            *(state.basis, state.right_basis, state.refreshed, state.inner_state),
            *(lying_as("linear"), lying_as("scalar")),
        )
        down = functools.partial(self.down, partitions=partitions)
        *bases, refreshed, inner_state, projected, finite = with_auto_axes(
            down, like, updates, state
        )
        if params is None and self.check is None:
            answer, inner_state = inner.update(projected, inner_state, None, **extra_args)
            decay: list[Any] = [None] * len(cores(projected))
        else:
            proxy = lambda x, w: x.replace(jnp.zeros_like(x.value)) if is_core(x) else working(w)
            proxies = None
            if params is not None:
                proxies = jax.tree.map(proxy, projected, params, is_leaf=is_core)
            answer, decay, inner_state = update_with_decay(
                inner, projected, inner_state, proxies, self.check, **extra_args
            )
        weights = leaves if params is None else params  # whose dtypes the updates get
        answer = replace_cores(
            answer,
            [
                partitions.hint(
                    U.value, role_partition("linear", U.spec, partitions.get(U.spec.path))
                )
                for U in cores(answer)
            ],
        )
        left = () if self.residual is None else (updates, projected)
        if is_limited(self.residual):
            norm = no_norms(projected) if norm is None else norm
            left = *left, norm
        else:
            norm = None
        lifted, norm = with_auto_axes(
            functools.partial(lift, self.scale, self.residual, partitions),
            (weights, norm),
            *(answer, decay, finite, bases, weights, left),
        )
        skipped = jax.tree.map(lambda n, ok: n + (~ok).astype(n.dtype), state.skipped, finite)
        count = optax.safe_increment(state.count)
        new = SubspaceState(count, *bases, refreshed, skipped, inner_state, state.version)
        return rebox(lifted, boxes), new if norm is None else ResidualState(new, norm)

    def down(
        self, updates: PyTree, state: SubspaceState, partitions: ParamPartitions
    ) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree, PyTree]:
        """All until inner: both bases, refreshes and inner's state as they are now; the cores,
        with zeros for what is not finite; and what was."""
        *bases, projected, refreshed, inner_state, finite = lower(
            self.refresh, updates, state, partitions
        )
        return (*bases, refreshed, inner_state, *gate(projected, finite))


def _as_leaves(updates: PyTree, params: PyTree) -> PyTree:
    """`updates` with the params, boxes and all, where it has cores.

    Without params one number of the core's dtype stands there: it is asked for nothing else.
    """
    if not cores(updates):
        return updates
    if params is None:
        leaf = lambda G: jnp.zeros([], G.value.dtype) if is_core(G) else G
        return jax.tree.map(leaf, updates, is_leaf=is_core)
    stop = lambda x: is_core(x) or is_box(x)
    return jax.tree.map(lambda G, w: w if is_core(G) else G, updates, params, is_leaf=stop)


def _lying(role: str, partitions: ParamPartitions, path: tuple, G: Array, P: Basis | None) -> Any:
    """How something of a gradient lies, or of a leaf that is not projected, which has no axes."""
    if P is None:
        return partitions.get(path) if role == "linear" else PartitionSpec()
    return Core(role_partition(role, P.spec, partitions.get(path)), P.spec)


def _placed(state: State, partitions: ParamPartitions) -> State:
    """The state on the mesh of the params."""

    def at(x, role, spec):
        if spec is not None:
            return partitions.place(x, state_partition(x, role, spec, partitions.get(spec.path)))
        # An array of a leaf that is not projected is where inner made it.
        return partitions.place(x, PartitionSpec()) if jnp.ndim(x) == 0 else x

    return walk(state, at)


def _refuse_misfit(x: Any, role: Any, spec: LeafSpec | None) -> Any:
    """A checkpoint of another rank, restored as it is, would train on while its shapes agree."""
    if spec is None or is_per_leaf_scalar(x, role):
        return x
    part = x.shape[len(spec.batch) :]
    expected = slice_shape(role, spec)
    if role == "basis":
        fits = x.shape == spec.basis_shape
    elif role == "window":
        fits = part[1:2] == (spec.rank,)
    else:
        fits = expected is None or part[:1] == expected[:1]
    if not fits:
        raise ValueError(
            f"the state of `{spec.name}`, {spec.m} x {spec.n} at rank {spec.rank}, holds an array "
            f"of shape {x.shape} ({role}): it comes from a run with another `rank` or `side`."
        )
    return x
