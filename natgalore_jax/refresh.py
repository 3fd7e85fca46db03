"""Which matrices get a new basis now, and what inner remembers carried along to it.

The work of a step on which nothing is due is one comparison: all of it stands behind one condition
(:func:`when`), and inside, each leaf loops over its own matrices that are due. A stack's loop works
on one matrix at a time, so a refresh needs the memory of one.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from .basis import FIRST_TURNS, Method, refreshed
from .control import when
from .linalg import matmul
from .spec import Basis, LeafSpec, walk
from .transport import Transport


GROUPS = 20  # of matrices refreshed together under `stagger`; see `phase`


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


@dataclasses.dataclass(frozen=True)
class Refresh:
    """The refresh of one projection; see :func:`project` for its settings.

    Attributes:
      every: steps between new bases of a matrix.
      method: G -> P.
      transport: what states become in a new basis; None leaves them.
      stagger: whether matrices take turns.
    """

    every: int
    method: Method
    transport: Transport | None
    stagger: bool

    def __call__(
        self, updates: PyTree, count: Int[Array, ""], basis: PyTree, inner_state: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The bases after step `count`'s refreshes, and `inner_state` in their coordinates."""
        leaves, treedef = jax.tree.flatten(updates)
        slots = treedef.flatten_up_to(basis)
        gradients = [G for G, P in zip(leaves, slots, strict=True) if P is not None]
        bases = [P for P in slots if P is not None]
        if not bases:
            return basis, inner_state
        roles, arrays = self.carried(inner_state, bases)
        ranges = [self.due_range(P.spec, bases, count) for P in bases]
        turns = jnp.where(count == 0, FIRST_TURNS, 1)

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
        return basis, walk(inner_state, put_back)

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
        phases = jnp.asarray(phase(index, self.every, total, self.stagger), jnp.int32)
        now, first = count % self.every, count == 0
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
        new, usable = refreshed(self.method, spec.matrix(G, i).astype(P.dtype), P, turns)
        if self.transport is not None:
            old = [spec.take(x, i) for x in arrays]
            carried = self.transport(list(zip(roles, old, strict=True)), matmul(new.mT, P))
            carried = [jnp.where(usable, x, y) for x, y in zip(carried, old, strict=True)]
            arrays = [spec.put(x, i, part) for x, part in zip(arrays, carried, strict=True)]
        return spec.put(bases, i, new), arrays
