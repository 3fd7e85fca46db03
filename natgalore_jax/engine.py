"""One step in the subspace, on one tree.

    due      which matrices get a new basis now
    refresh  P from G, and what inner remembers carried along (transport)
    project  R = PᵀG
    gate     a matrix whose gradient is not finite hands on a zero core instead
    inner    U = inner(R): one transformation over one tree of Cores and other leaves
    lift     P U back to the leaf's shape, and the decay that inner put on the whole weight

Inner sees float32 (float64 where a leaf is), whatever the dtype of the params: a second moment in
bfloat16 with b2 = 0.999 cannot move.

Reference: Zhao et al., "GaLore", arXiv:2403.03507, algorithm 2; Das, "Natural GaLore",
arXiv:2410.16029, algorithm 1.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, PyTree

from .basis import FIRST_TURNS, Method, matmul, refreshed, seeded
from .control import when
from .decay import update_with_decay
from .spec import Basis, Core, LeafSpec, Undeclared, cores, is_core, subspace, walk
from .transport import Transport


FORMAT_VERSION = 1  # of the state; a new one comes with a way to read the old
GROUPS = 20  # of matrices refreshed together under `stagger`; see `phase`


class SubspaceState(NamedTuple):
    """What :func:`project` remembers.

    Attributes:
      count: steps taken, one int32.
      basis: a tree like the params with a Basis, (*batch, m, r), at each projected leaf and None
        elsewhere.
      skipped: a tree like the params, int32: how often a gradient was not finite, for each matrix
        (*batch) of a projected leaf, for each other leaf as a whole.
      inner_state: the inner transformation's state; its arrays of projected leaves are Cores.
      version: of this layout, one int32, so that a later release knows what it reads.
    """

    count: Int[Array, ""]
    basis: PyTree
    skipped: PyTree
    inner_state: PyTree
    version: Int[Array, ""]


def due(index: Any, count: Any, refresh_every: int, total: int, stagger: bool = True) -> Any:
    """Whether matrix `index` of `total` gets a new basis at step `count` (from 0).

    All do at step 0, and each once in every `refresh_every` steps after it.
    """
    return (count == 0) | (count % refresh_every == phase(index, refresh_every, total, stagger))


def phase(index: Any, refresh_every: int, total: int, stagger: bool) -> Any:
    """The step of its period at which a matrix is due: 0, or under `stagger` its group's.

    Groups, not matrices, are spread over the period: a step with any refresh pays a fixed price for
    it (a host synchronisation a leaf on GPUs), which most steps should not.
    """
    if not stagger:
        return 0 * index
    groups = min(GROUPS, refresh_every, max(total, 1))
    return index * groups // max(total, 1) * refresh_every // groups


class Engine:
    """The transformation behind :func:`project`; its arguments are checked there."""

    def __init__(
        self,
        inner: optax.GradientTransformation,
        *,
        refresh_every: int,
        scale: Any,
        method: Method,
        transport: Transport | None,
        stagger: bool,
        seed: int,
    ):
        self.inner = optax.with_extra_args_support(inner)
        self.refresh_every = refresh_every
        self.scale = scale
        self.method = method
        self.transport = transport
        self.stagger = stagger
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

        def skipped(x, spec):
            none = jnp.zeros(() if spec is None else spec.batch_shape, jnp.int32)
            return none if spec is None else Core(none, spec)

        with subspace():
            inner_state = self.inner.init(jax.tree.map(proxy, params, specs))
        if self.transport is not None:
            walk(inner_state, _refuse_undeclared)
        return SubspaceState(
            count=jnp.zeros([], jnp.int32),
            basis=jax.tree.map(basis, params, specs),
            skipped=jax.tree.map(skipped, params, specs),
            inner_state=inner_state,
            version=jnp.full([], FORMAT_VERSION, jnp.int32),
        )

    def update(
        self, updates: PyTree, state: SubspaceState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SubspaceState]:
        """The update of every leaf, in the leaf's shape and dtype, and the state after it."""
        basis, inner_state = self.refresh(updates, state)
        projected, finite = gate(jax.tree.map(_project, updates, basis))
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
        return lifted, SubspaceState(count, basis, skipped, inner_state, state.version)

    def refresh(self, updates: PyTree, state: SubspaceState) -> tuple[PyTree, PyTree]:
        """New bases for the matrices that are due, and inner's state in their coordinates."""
        leaves, treedef = jax.tree.flatten(updates)
        slots = treedef.flatten_up_to(state.basis)
        gradients = [G for G, P in zip(leaves, slots, strict=True) if P is not None]
        bases = [P for P in slots if P is not None]
        if not bases:
            return state.basis, state.inner_state
        roles, arrays = self.carried(state.inner_state, bases)
        ranges = [self.due_range(P.spec, bases, state.count) for P in bases]
        turns = jnp.where(state.count == 0, FIRST_TURNS, 1)

        def refresh_due(carry):
            new = []
            for G, P, leaf_roles, (lo, hi), leaf in zip(
                gradients, bases, roles, ranges, carry, strict=True
            ):
                one = functools.partial(self.refresh_matrix, P.spec, leaf_roles, G, turns)
                new.append(lax.fori_loop(lo, hi, one, leaf))
            return new

        any_due = functools.reduce(operator.or_, [lo < hi for lo, hi in ranges])
        carry = [(P.value, x) for P, x in zip(bases, arrays, strict=True)]
        carry = when(any_due, refresh_due, carry)
        new = iter([P.replace(value) for P, (value, _) in zip(bases, carry, strict=True)])
        basis = treedef.unflatten([None if P is None else next(new) for P in slots])
        left = {P.spec: iter(x) for P, (_, x) in zip(bases, carry, strict=True)}
        put_back = lambda x, role, spec: x if spec is None else next(left[spec], x)
        return basis, walk(state.inner_state, put_back)

    def carried(
        self, state: PyTree, bases: list[Basis]
    ) -> tuple[list[list[Any]], list[list[Array]]]:
        """What transport carries of each projected leaf: roles and arrays, as `walk` meets them."""
        roles: dict[LeafSpec, list[Any]] = {P.spec: [] for P in bases}
        arrays: dict[LeafSpec, list[Array]] = {P.spec: [] for P in bases}

        def collect(x, role, spec):
            if spec is not None:
                roles[spec].append(role)
                arrays[spec].append(x)
            return x

        if self.transport is not None:
            walk(state, collect)
        return list(roles.values()), list(arrays.values())

    def due_range(self, spec: LeafSpec, bases: list[Basis], count: Int[Array, ""]) -> tuple:
        """The matrices of a leaf that are due, lo <= i < hi: phases rise with the index."""
        total = sum(P.spec.matrices for P in bases)
        index = spec.index + np.arange(spec.matrices)
        phases = jnp.asarray(phase(index, self.refresh_every, total, self.stagger), jnp.int32)
        now, first = count % self.refresh_every, count == 0
        lo = jnp.where(first, 0, (phases < now).sum(dtype=jnp.int32))
        hi = jnp.where(first, spec.matrices, (phases <= now).sum(dtype=jnp.int32))
        return lo, hi

    def refresh_matrix(
        self,
        spec: LeafSpec,
        roles: list[Any],
        G: Array,
        turns: Int[Array, ""],
        i: Int[Array, ""],
        leaf: tuple[Array, list[Array]],
    ) -> tuple[Array, list[Array]]:
        """The i-th matrix of one leaf: its new basis, and its part of every array carried."""
        bases, arrays = leaf
        P = spec.take(bases, i)
        new, usable = refreshed(self.method, _working(spec.matrix(G, i)), P, turns)
        if self.transport is not None:
            old = [spec.take(x, i) for x in arrays]
            carried = self.transport(list(zip(roles, old, strict=True)), matmul(new.mT, P))
            carried = [jnp.where(usable, x, y) for x, y in zip(carried, old, strict=True)]
            arrays = [spec.put(x, i, part) for x, part in zip(arrays, carried, strict=True)]
        return spec.put(bases, i, new), arrays

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

        def at(G, P, U, ok, w):
            if P is None:
                return U.astype(G.dtype)
            full = matmul(P.value, self.scale * U.value)
            a = next(left)
            if a is not None:
                weight = P.spec.to_view(w).astype(full.dtype)
                full += jnp.where(ok.value[..., None, None], a * weight, 0)
            return P.spec.from_view(full).astype(G.dtype)

        weights = updates if params is None else params
        return jax.tree.map(at, updates, basis, answer, finite, weights)


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
    """R = PᵀG for a projected leaf, the leaf itself for another."""
    if P is None:
        return _working(G)
    return Core(matmul(P.value.mT, P.spec.to_view(_working(G))), P.spec)


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
