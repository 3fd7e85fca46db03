"""Which matrices get a new basis now, and what inner remembers carried along to it.

The work of a step on which nothing is due is one comparison: all of it stands behind one condition.
Matrices that are due come one at a time (`refresh_loop.py`), so a refresh needs the memory of one.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..sharding.partitioning import ParamPartitions
from ..tree.leaf_spec import Basis, LeafSpec, cores, replace_cores
from ..tree.state_roles import is_per_matrix, walk
from ..util.linalg import matmul, max_abs
from .basis import Method, basis_key, expand, normalised, to_core
from .refresh_loop import Leaf, map_due_matrices
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
    number = groups(refresh_every, total, stagger)
    return index * number // max(total, 1) * refresh_every // number


def groups(refresh_every: int, total: int, stagger: bool) -> int:
    """In how many groups the matrices are refreshed."""
    return min(GROUPS, refresh_every, max(total, 1)) if stagger else 1


def order(spec: LeafSpec) -> Int[np.ndarray, "*batch"]:
    """The places of a leaf's matrices in the refresh order."""
    first, last = spec.index, spec.index + spec.matrices
    return np.arange(first, last, dtype=np.int32).reshape(spec.batch_shape)


def matrices(bases: PyTree) -> int:
    """How many matrices a tree of Bases is of."""
    is_basis = lambda x: isinstance(x, Basis)
    found = jax.tree.leaves(bases, is_leaf=is_basis)
    return sum(x.spec.matrices for x in found if is_basis(x))


class MatrixState(NamedTuple):
    """What a refresh changes of a leaf's matrices, or of one of them.

    Attributes:
      kept: what the state keeps of P, or of P and Q.
      R: the core.
      finite: whether that is.
      times: of refreshes so far.
      carried: inner's state, as far as transport carries it.
    """

    kept: tuple[Array, ...]
    R: Array
    finite: Array
    times: Array
    carried: list[Array]


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
        self,
        updates: PyTree,
        projected: PyTree,
        state: Any,
        partitions: ParamPartitions,
        of: PyTree = None,
    ) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree, list[Bool[Array, "..."]]]:
        """New bases where they are due, and all that depends on them.

        Args:
          updates: the gradients.
          projected: the same, projected on the bases of `state`.
          state: the :class:`SubspaceState`.
          partitions: of the gradients, as far as known.
          of: a tree with all Bases of the projection, if `state` is only given some.

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
        total = matrices(state.basis if of is None else of)
        # The one pass over the cores that every step needs: their largest entries tell which are
        # finite, for the gate as well, and which are not zero.
        largest = [max_abs(R.value) for R in Rs]
        flags = [
            self.flags(R.spec, x, n.value, state.count, total)
            for R, x, n in zip(Rs, largest, times, strict=True)
        ]

        leaves = [
            Leaf(
                *(P.spec, tuple(leaf_roles), G, due_now, jnp.asarray(order(P.spec))),
                MatrixState(x, R.value, jnp.isfinite(most), n.value, carried),
            )
            for G, P, leaf_roles, due_now, x, R, most, n, carried in zip(
                gradients, bases, roles, flags, kept, Rs, largest, times, arrays, strict=True
            )
        ]
        new_P, new_R, finite, new_n, new_arrays = zip(
            *map_due_matrices(self.refresh_matrix, leaves, partitions), strict=True
        )
        trees = []
        for side, old in enumerate(slots):
            values = iter([sides[side] for sides in new_P if side < len(sides)])
            new = [None if x is None else x.replace(next(values)) for x in old]
            trees.append(treedef.unflatten(new))
        return (
            *trees,
            replace_cores(projected, new_R),
            replace_cores(state.refreshed, new_n),
            self.put_back(state.inner_state, bases, new_arrays),
            list(finite),
        )

    def carried(self, state: PyTree, bases: list[Basis]) -> tuple[list[list[Any]], list[list[Any]]]:
        """What transport carries of each projected leaf: roles and arrays, as `walk` meets them."""
        roles: dict[LeafSpec, list[Any]] = {P.spec: [] for P in bases}
        arrays: dict[LeafSpec, list[Any]] = {P.spec: [] for P in bases}

        def collect(x, role, spec):
            if spec in roles and is_per_matrix(x, role, spec):
                roles[spec].append(role)
                arrays[spec].append(x)
            return x

        if self.transport is not None:
            walk(state, collect)
        return list(roles.values()), list(arrays.values())

    def put_back(self, state: PyTree, bases: list[Basis], arrays: Sequence[list[Any]]) -> PyTree:
        """The state with the arrays that `carried` found replaced."""
        left = {P.spec: iter(x) for P, x in zip(bases, arrays, strict=True)}

        def put(x, role, spec):
            carried = self.transport is not None and spec in left and is_per_matrix(x, role, spec)
            return next(left[spec]) if carried else x

        return walk(state, put)

    def any_due(self, state: Any, largest: list[Array]) -> Bool[Array, ""]:
        """Whether any matrix of a :class:`SubspaceState` is; `largest` of each Core, in order."""
        flags = [x.any() for x in self.all_flags(state, largest)]
        return functools.reduce(operator.or_, flags, jnp.zeros([], bool))

    def all_flags(self, state: Any, largest: list[Array]) -> list[Bool[Array, "..."]]:
        """`flags` of each Core."""
        total = matrices(state.basis)
        return [
            self.flags(n.spec, x, n.value, state.count, total)
            for n, x in zip(cores(state.refreshed), largest, strict=True)
        ]

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

    def refresh_matrix(
        self,
        spec: LeafSpec,
        roles: tuple[Any, ...],
        part: Array,
        index: Int[Array, ""],
        old: "MatrixState",
    ) -> "MatrixState":
        """What a refresh makes of one matrix, whose gradient lies in `part` as in the leaf."""
        # Tied to the state, or the compiler would take what depends on the gradient alone, such as
        # its largest entry, out of the loop: a pass over the gradient on every step.
        part, n = lax.optimization_barrier((part, old.times))
        dtype = old.R.dtype
        # Turned last, where the products are: before that the compiler would turn all of G for it.
        part = part.astype(dtype)
        unit, usable = normalised(part)
        G, unit = spec.as_matrix(part), spec.as_matrix(unit)
        views = (spec, spec.transposed)
        olds, nexts = [], []
        for side, (view, x) in enumerate(zip(views, old.kept, strict=False)):
            P = expand(x, view, dtype)
            key = basis_key(self.seed, index, n + 1, side)
            new = self.method.next(unit.mT if side else unit, P, key, n == 0)
            usable &= jnp.isfinite(new).all()
            olds.append(P)
            nexts.append(new)
        keep = lambda new, old: jnp.where(usable, new, old)
        kept = tuple(keep(new, x) for new, x in zip(nexts, old.kept, strict=True))
        bases = [expand(x, view, dtype) for view, x in zip(views, kept, strict=False)]
        carried = self.carry(roles, old.carried, olds, bases, usable)
        R = to_core(G, *bases)
        return MatrixState(kept, R, jnp.isfinite(R).all(), n + usable.astype(n.dtype), carried)

    def carry(
        self,
        roles: Sequence[Any],
        carried: list[Array],
        olds: Sequence[Array],
        news: Sequence[Array],
        usable: Bool[Array, ""],
    ) -> list[Array]:
        """A matrix's states in its new basis or bases, where those are usable."""
        if self.transport is None:
            return carried
        turns = [matmul(new.mT, P) for new, P in zip(news, olds, strict=True)]
        new = self.transport(list(zip(roles, carried, strict=True)), *turns)
        return [jnp.where(usable, x, before) for x, before in zip(new, carried, strict=True)]
