"""Which matrices get a new basis now, and what inner remembers carried along to it.

The work of a step on which nothing is due is one comparison: all of it stands behind one condition
(:func:`where_due`), and inside, each leaf loops over its own matrices that are due. A stack's loop
works on one matrix at a time, so a refresh needs the memory of one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .basis import Method, basis_key, expand, normalised, to_core
from .control import when, where_due
from .linalg import matmul
from .placement import Layout, over_shards
from .roles import per_matrix, walk
from .spec import Basis, LeafSpec, cores, replace_cores
from .transport import Transport


GROUPS = 100  # of matrices refreshed together under `stagger`; see `phase`


def due(index: Any, count: Any, refresh_every: int, total: int, stagger: bool = True) -> Any:
    """Whether matrix `index` of `total` gets a new basis at step `count` (from 0).

    All do at step 0, and each once in every `refresh_every` steps after it. (A matrix whose first
    gradient is zero or not finite is due again as soon as it has one: see `Refresh.flags`.)
    """
    return (count == 0) | (count % refresh_every == phase(index, refresh_every, total, stagger))


def phase(index: Any, refresh_every: int, total: int, stagger: bool) -> Any:
    """The step of its period at which a matrix is due: 0, or under `stagger` its group's.

    Groups, not matrices, are spread over the period: a step with any refresh pays a fixed price for
    it (some host synchronisations on GPUs), which not every step should. So many groups that one
    is small beside a step: Llama 350m has 168 matrices.
    """
    if not stagger:
        return 0 * index
    groups = min(GROUPS, refresh_every, max(total, 1))
    return index * groups // max(total, 1) * refresh_every // groups


def order(spec: LeafSpec) -> Int[np.ndarray, "*batch"]:
    """The places of a leaf's matrices in the refresh order."""
    first, last = spec.index, spec.index + spec.matrices
    return np.arange(first, last, dtype=np.int32).reshape(spec.batch_shape)


@dataclasses.dataclass(frozen=True)
class Refresh:
    """The refresh of one projection; see :func:`project` for its settings.

    Attributes:
      every: steps between new bases of a matrix.
      method: G -> P, and what the state keeps of P.
      transport: what states become in a new basis; None leaves them.
      stagger: whether matrices take turns.
      seed: of the random bases.
    """

    every: int
    method: Method
    transport: Transport | None
    stagger: bool
    seed: int

    def __call__(
        self, updates: PyTree, projected: PyTree, state: Any, layout: Layout
    ) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree, list[Bool[Array, "..."]]]:
        """New bases where they are due, and all that depends on them.

        Args:
          updates: the gradients.
          projected: the same, projected on the bases of `state`.
          state: the :class:`SubspaceState`.
          layout: of the gradients, as far as known.

        Returns:
          The bases, P and Q, `projected` on them, how often each has been refreshed, inner's state
          in their coordinates, and for each Core which of its matrices are finite.
        """
        leaves, treedef = jax.tree.flatten(updates)
        slots = [treedef.flatten_up_to(tree) for tree in (state.basis, state.right_basis)]
        gradients = [G for G, P in zip(leaves, slots[0], strict=True) if P is not None]
        bases = [P for P in slots[0] if P is not None]
        if not bases:
            trees = state.basis, state.right_basis, projected, state.refreshed, state.inner_state
            return *trees, []
        kept = [
            tuple(side.value for side in sides if side is not None)
            for sides in zip(*slots, strict=True)
            if sides[0] is not None
        ]
        roles, arrays = self.carried(state.inner_state, bases)
        Rs, times = cores(projected), cores(state.refreshed)
        total = sum(P.spec.matrices for P in bases)
        # The one pass over the cores that every step needs: their largest entries tell which are
        # finite, for the gate as well, and which are not zero.
        largest = [jnp.abs(R.value).max(axis=(-2, -1)) for R in Rs]
        flags = [
            self.flags(R.spec, x, n.value, state.count, total)
            for R, x, n in zip(Rs, largest, times, strict=True)
        ]

        carry = [
            (P, R.value, jnp.isfinite(x), n.value, carried)
            for P, R, x, n, carried in zip(kept, Rs, largest, times, arrays, strict=True)
        ]
        refreshes = [
            functools.partial(
                over_shards,
                functools.partial(self.refresh_leaf, leaf_roles),
                *(P.spec, layout, G, (due_now, jnp.asarray(order(P.spec)))),
            )
            for G, P, leaf_roles, due_now in zip(gradients, bases, roles, flags, strict=True)
        ]
        new_P, new_R, finite, new_n, new_arrays = zip(
            *where_due([due_now.any() for due_now in flags], refreshes, carry), strict=True
        )
        trees = []
        for side, old in enumerate(slots):
            values = iter([sides[side] for sides in new_P if side < len(sides)])
            new = [None if x is None else x.replace(next(values)) for x in old]
            trees.append(treedef.unflatten(new))
        left = {P.spec: iter(x) for P, x in zip(bases, new_arrays, strict=True)}

        def put_back(x, role, spec):
            carried = self.transport is not None and spec is not None and per_matrix(x, role, spec)
            return next(left[spec]) if carried else x

        return (
            *trees,
            replace_cores(projected, new_R),
            replace_cores(state.refreshed, new_n),
            walk(state.inner_state, put_back),
            list(finite),
        )

    def carried(
        self, state: PyTree, bases: list[Basis]
    ) -> tuple[list[list[Any]], list[list[Array]]]:
        """What transport carries of each projected leaf: roles and arrays, as `walk` meets them."""
        roles: dict[LeafSpec, list[Any]] = {P.spec: [] for P in bases}
        arrays: dict[LeafSpec, list[Array]] = {P.spec: [] for P in bases}

        def collect(x, role, spec):
            if spec is not None and per_matrix(x, role, spec):
                roles[spec].append(role)
                arrays[spec].append(x)
            return x

        if self.transport is not None:
            walk(state, collect)
        return list(roles.values()), list(arrays.values())

    def flags(
        self,
        spec: LeafSpec,
        largest: Float[Array, "*batch"],
        times: Int[Array, "*batch"],
        count: Int[Array, ""],
        total: int,
    ) -> Bool[Array, "*batch"]:
        """Which matrices of a leaf are due: by the calendar, or by their first gradient.

        A matrix that has had none yet, or none that was finite, still has its random basis; it does
        not wait for its turn. `largest`: the largest entries of the cores.
        """
        phases = jnp.asarray(phase(order(spec), self.every, total, self.stagger), jnp.int32)
        usable = jnp.isfinite(largest) & (largest > 0)
        return (count % self.every == phases) | ((times == 0) & usable)

    def refresh_leaf(
        self,
        roles: list[Any],
        spec: LeafSpec,
        G: Array,
        which: tuple[Bool[Array, "*batch"], Int[Array, "*batch"]],
        leaf: Any,
    ) -> Any:
        """Refreshes the matrices of one leaf that are due, one at a time.

        `which`: are they due, and their places in the refresh order.
        """
        due_now, index = (x.reshape(-1) for x in which)
        one = functools.partial(self.refresh_matrix, roles, spec, G, index)
        if spec.matrices == 1:
            return when(due_now[0], functools.partial(one, jnp.int32(0)), leaf)
        some = due_now.any()
        lo = jnp.argmax(due_now).astype(jnp.int32)
        hi = spec.matrices - jnp.argmax(due_now[::-1]).astype(jnp.int32)
        return lax.fori_loop(
            lo,
            jnp.where(some, hi, lo),
            lambda i, x: when(due_now[i], functools.partial(one, i), x),
            leaf,
        )

    def refresh_matrix(
        self,
        roles: list[Any],
        spec: LeafSpec,
        G: Array,
        index: Int[Array, " matrices"],
        i: Int[Array, ""],
        leaf: tuple[tuple[Array, ...], Array, Array, Array, list[Array]],
    ) -> tuple[tuple[Array, ...], Array, Array, Array, list[Array]]:
        """The i-th matrix of one leaf: its new bases and core, and its part of what is carried."""
        kept, Rs, finite, times, arrays = leaf
        n = spec.take(times, i)
        # Tied to the carry, or the compiler would take what depends on G alone, such as its largest
        # entry, out of the loop: a pass over the gradient on every step.
        G, n = lax.optimization_barrier((G, n))
        # Turned last, where the products are: before that the compiler would turn all of G for it.
        part = spec.cut(G, i).astype(Rs.dtype)
        unit, usable = normalised(part)
        gradient, unit = spec.as_matrix(part), spec.as_matrix(unit)
        olds, nexts = [], []
        for side, (view, x) in enumerate(zip((spec, spec.turned), kept, strict=False)):
            P = expand(view.take(x, i), view, Rs.dtype)
            key = basis_key(self.seed, index[i], n + 1, side)
            new = self.method.next(unit.mT if side else unit, P, key, n == 0)
            usable &= jnp.isfinite(new).all()
            olds.append(P)
            nexts.append(new)
        keep = lambda new, old: jnp.where(usable, new, old)
        kept = tuple(
            spec.put(x, i, keep(new, spec.take(x, i))) for x, new in zip(kept, nexts, strict=True)
        )
        bases = [
            expand(view.take(x, i), view, Rs.dtype)
            for view, x in zip((spec, spec.turned), kept, strict=False)
        ]
        if self.transport is not None:
            old = [spec.take(x, i) for x in arrays]
            turns = [matmul(new.mT, P) for new, P in zip(bases, olds, strict=True)]
            carried = self.transport(list(zip(roles, old, strict=True)), *turns)
            arrays = [
                spec.put(x, i, keep(new, part))
                for x, new, part in zip(arrays, carried, old, strict=True)
            ]
        R = to_core(gradient, *bases)
        return (
            kept,
            spec.put(Rs, i, R),
            spec.put(finite, i, jnp.isfinite(R).all()),
            spec.put(times, i, n + usable.astype(n.dtype)),
            arrays,
        )
