"""One step in the subspace, on one tree.

    refresh  P from G where it is due, and what inner remembers carried along (refresh.py)
    project  R = PᵀG
    gate     a matrix whose gradient is not finite hands on a zero core instead
    inner    U = inner(R): one transformation over one tree of Cores and other leaves
    lift     P U back to the leaf's shape, and the decay that inner put on the whole weight

Inner sees float32 (float64 where a leaf is), whatever the dtype of the params: a second moment in
bfloat16 with b2 = 0.999 cannot move.

Reference: Zhao et al., "GaLore", arXiv:2403.03507, algorithm 2; Das, "Natural GaLore",
arXiv:2410.16029, algorithm 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .basis import seeded
from .decay import update_with_decay
from .linalg import matmul
from .refresh import Refresh
from .spec import Basis, Core, LeafSpec, Undeclared, cores, is_core, subspace, walk


FORMAT_VERSION = 1  # of the state; a new one comes with a way to read the old


class SubspaceState(NamedTuple):
    """What :func:`project` remembers.

    Attributes:
      count: steps taken, one int32.
      basis: a tree like the params with a Basis, (*batch, m, r), at each projected leaf and None
        elsewhere.
      refreshed: how often each matrix has got a new basis, (*batch) int32 at each projected leaf.
        Zero: it still has its random one, and the first usable gradient brings a new.
      skipped: a tree like the params, int32: how often a gradient was not finite, for each matrix
        (*batch) of a projected leaf, for each other leaf as a whole.
      inner_state: the inner transformation's state; its arrays of projected leaves are Cores.
      version: of this layout, one int32, so that a later release knows what it reads.
    """

    count: Int[Array, ""]
    basis: PyTree
    refreshed: PyTree
    skipped: PyTree
    inner_state: PyTree
    version: Int[Array, ""]


class Engine:
    """The transformation behind :func:`project`; its arguments are checked there."""

    def __init__(
        self,
        inner: optax.GradientTransformation,
        *,
        refresh: Refresh,
        scale: Any,
        seed: int,
    ):
        self.inner = optax.with_extra_args_support(inner)
        self.refresh = refresh
        self.scale = scale
        self.seed = seed

    def init(self, params: PyTree, specs: PyTree) -> SubspaceState:
        """The state for `params` seen as `specs`: a LeafSpec or None for each leaf."""
        key = jax.random.key(self.seed)

        def proxy(x, spec):
            if spec is None:
                return _working(x)
            return Core(jnp.zeros(spec.core_shape, _working_dtype(x)), spec)

        def basis(x, spec):
            if spec is None:
                return None
            index = spec.index + jnp.arange(spec.matrices)
            value = seeded(key, index, m=spec.m, r=spec.rank, dtype=_working_dtype(x))
            return Basis(value.reshape(spec.basis_shape), spec)

        def refreshed(x, spec):
            return None if spec is None else Core(jnp.zeros(spec.batch_shape, jnp.int32), spec)

        def skipped(x, spec):
            return jnp.zeros([], jnp.int32) if spec is None else refreshed(x, spec)

        with subspace():
            inner_state = self.inner.init(jax.tree.map(proxy, params, specs))
        if self.refresh.transport is not None:
            walk(inner_state, _refuse_undeclared)
        return SubspaceState(
            count=jnp.zeros([], jnp.int32),
            basis=jax.tree.map(basis, params, specs),
            refreshed=jax.tree.map(refreshed, params, specs),
            skipped=jax.tree.map(skipped, params, specs),
            inner_state=inner_state,
            version=jnp.full([], FORMAT_VERSION, jnp.int32),
        )

    def update(
        self, updates: PyTree, state: SubspaceState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SubspaceState]:
        """The update of every leaf, in the leaf's shape and dtype, and the state after it."""
        projected = jax.tree.map(_project, updates, state.basis)
        basis, projected, refreshed, inner_state = self.refresh(updates, projected, state)
        projected, finite = gate(projected)
        if params is None:
            answer, inner_state = self.inner.update(projected, inner_state, None, **extra_args)
            decay: list[Any] = [None] * len(cores(projected))
        else:
            proxies = jax.tree.map(
                lambda x, w: x.replace(jnp.zeros_like(x.value)) if is_core(x) else _working(w),
                projected,
                params,
                is_leaf=is_core,
            )
            answer, decay, inner_state = update_with_decay(
                self.inner, projected, inner_state, proxies, **extra_args
            )
        answer = jax.tree.map(_keep_where, answer, finite, is_leaf=is_core)
        lifted = self.lift(answer, decay, finite, basis, updates, params)
        skipped = jax.tree.map(lambda n, ok: n + (~ok).astype(n.dtype), state.skipped, finite)
        count = optax.safe_increment(state.count)
        new = SubspaceState(count, basis, refreshed, skipped, inner_state, state.version)
        return lifted, new

    def lift(
        self,
        answer: PyTree,
        decay: list[Any],
        finite: PyTree,
        basis: PyTree,
        updates: PyTree,
        params: PyTree,
    ) -> PyTree:
        """P U, and a W where inner decays, in the shape and dtype of the leaf."""
        left = iter(decay)

        def at(P, U, ok, w):
            if P is None:
                return U.astype(w.dtype)
            full = matmul(P.value, self.scale * U.value)
            a = next(left)
            if a is not None:
                weight = P.spec.to_view(w).astype(full.dtype)
                full += jnp.where(ok.value[..., None, None], a * weight, 0)
            return P.spec.from_view(full).astype(w.dtype)

        weights = updates if params is None else params  # whose dtypes the updates get
        return jax.tree.map(lambda w, *x: at(*x, w), weights, basis, answer, finite)


def gate(projected: PyTree) -> tuple[PyTree, PyTree]:
    """`projected` with zeros for what is not finite, and what was: per matrix, or per other leaf.

    A core is finite where its gradient is: P mixes all rows, so one bad entry spoils its column.
    Looking at the core spares a pass over the gradient.
    """

    def finite(x):
        if is_core(x):
            return x.replace(jnp.isfinite(x.value).all(axis=(-2, -1)))
        return jnp.isfinite(x).all()

    ok = jax.tree.map(finite, projected, is_leaf=is_core)
    return jax.tree.map(_keep_where, projected, ok, is_leaf=is_core), ok


def _keep_where(x: Any, ok: Any) -> Any:
    if is_core(x):
        return x.replace(jnp.where(ok.value[..., None, None], x.value, 0))
    return jnp.where(ok, x, jnp.zeros_like(x))


def _project(G: Array, P: Basis | None) -> Any:
    """R = PᵀG for a projected leaf, in the dtype of its state; the leaf itself for another."""
    if P is None:
        return _working(G)
    return Core(matmul(P.value.mT, P.spec.to_view(G).astype(P.value.dtype)), P.spec)


def _working_dtype(x: Any) -> Any:
    """The dtype in which a leaf is worked on: at least float32, and integers as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.dtype
    return jnp.promote_types(x.dtype, jnp.float32)


def _working(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, _working_dtype(x))
    return jnp.asarray(x, _working_dtype(x))


def _refuse_undeclared(x: Any, role: Any, spec: LeafSpec | None) -> Any:
    if spec is not None and (role is None or isinstance(role, Undeclared)):
        raise TypeError(
            f"nothing is known of how the state {role or 'of the inner transformation'} depends on "
            "the basis, so it cannot be carried to a new one. Declare its roles with "
            '`natgalore.register_state`, or pass `transport="keep"` to leave states as they are.'
        )
    return x
