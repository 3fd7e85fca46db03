"""When the bases of a projection change, and what changes with them.

At a refresh of a matrix:

    P' from P and G, or from P and Y = G (Gᵀ P), which value_and_grad has in place of G (basis.py)
    inner's states in the coordinates of P'                                     (transport.py)
    R = P'ᵀG, if G is given

All of it is behind one condition, so a step without a due matrix costs one comparison. Due matrices
are refreshed one at a time (refresh_loop.py): a refresh needs the memory of one matrix, and an
array that is stored in 8 bits is decoded for one matrix at a time.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..quantization.quantized_array import decode_basis, dequantize, requantize
from ..sharding.partitioning import LeafPartition, state_partition
from ..sharding.tpu_layouts import in_stored_layout
from ..tree.leaf_spec import LeafSpec
from ..util.linalg import matmul
from .basis import Method, basis_key, expand, normalised, to_core
from .refresh_loop import Leaf, map_due_matrices
from .transport import Transport


GROUPS = 100  # of matrices refreshed at the same step under `stagger`; see `phase`

Source = Literal["gradient", "product"]


def phase(index: Any, refresh_every: int, total: int, stagger: bool) -> Any:
    """The step within a period at which a matrix is due: 0, or its group's under `stagger`.

    Groups are spread over the period, not single matrices: each step with a refresh has a fixed
    cost (some host synchronisations on GPUs). With GROUPS groups, one group is small beside a step:
    Llama 350m has 168 matrices.
    """
    number = groups(refresh_every, total, stagger)
    # In int64: the product exceeds int32 for periods above 2e7.
    group = np.asarray(index, np.int64) * number // max(total, 1)
    return group * refresh_every // number


def groups(refresh_every: int, total: int, stagger: bool) -> int:
    """The number of groups of matrices that are refreshed at the same step."""
    return min(GROUPS, refresh_every, max(total, 1)) if stagger else 1


def order(spec: LeafSpec) -> Int[np.ndarray, "*batch"]:
    """The places of a leaf's matrices in the refresh order."""
    first, last = spec.index, spec.index + spec.matrices
    return np.arange(first, last, dtype=np.int32).reshape(spec.batch_shape)


def number_of_matrices(specs: Sequence[LeafSpec]) -> int:
    return sum(spec.matrices for spec in specs)


class MatrixState(NamedTuple):
    """The arrays that a refresh changes: of all matrices of a leaf, (*batch, ...), or of one.

    Attributes:
      stored: P, or P and Q, as the state stores them: arrays, keys or QuantizedArrays.
      refreshed: the number of refreshes.
      carried: the arrays of inner's state that transport carries, decoded or QuantizedArrays.
      R: the core; None if Y is given in place of G.
      finite: whether R is.
    """

    stored: tuple[Any, ...]
    refreshed: Array
    carried: list[Any]
    R: Array | None = None
    finite: Array | None = None


@dataclasses.dataclass(frozen=True)
class Refresh:
    """When and how the bases of a projection change; the arguments of :func:`project`.

    Attributes:
      every: T, steps between refreshes of a matrix.
      method: G -> P, and what the state stores of P.
      transport: of inner's states to a new basis; None leaves them.
      stagger: whether groups of matrices take turns.
      seed: of random bases.
    """

    every: int
    method: Method
    transport: Transport | None
    stagger: bool
    seed: int

    def due(
        self,
        spec: LeafSpec,
        largest: Float[Array, "*batch"],
        refreshed: Int[Array, "*batch"],
        count: Int[Array, ""],
        total: int,
    ) -> Bool[Array, "*batch"]:
        """Which matrices of a leaf are due, by the calendar or by a first usable gradient.

        Args:
          spec: of the leaf.
          largest: the largest absolute entries of the cores; not finite if a core is not.
          refreshed: the numbers of refreshes so far. At 0 the basis is still random, and the matrix
            does not wait for its step of the period.
          count: of steps.
          total: the number of matrices of the projection.
        """
        phases = jnp.asarray(phase(order(spec), self.every, total, self.stagger), jnp.int32)
        usable = jnp.isfinite(largest) & (largest > 0)
        return (count % self.every == phases) | ((refreshed == 0) & usable)

    def refresh_matrix(
        self,
        source: Source,
        spec: LeafSpec,
        roles: tuple[Any, ...],
        part: Array,
        index: Int[Array, ""],
        due: Bool[Array, ""],
        old: MatrixState,
    ) -> MatrixState:
        """Refreshes one matrix.

        Args:
          source: whether `part` is G ("gradient"), laid out as in the leaf, or Y ("product").
          spec: of the leaf that `part` is a slice of.
          roles: of the `carried` arrays.
          part: G (m x n entries) or Y (m x r), in any units.
          index: of the matrix, in the refresh order.
          due: whether the matrix is.
          old: the state of the matrix.

        Returns:
          The new state; the old one if the matrix is not due, G is zero or not finite, or a new
          basis is not finite.
        """
        # Tied to the state: the compiler would hoist operations on the gradient alone, such as its
        # largest entry, out of the loop, a pass over the gradient on every step.
        part, refreshed = lax.optimization_barrier((part, old.refreshed))
        part = part if old.R is None else part.astype(old.R.dtype)
        dtype = part.dtype
        unit, usable = normalised(part)
        usable &= due
        # Transposed last, next to the products: earlier the compiler would transpose all of G.
        G, unit = spec.as_matrix(part), spec.as_matrix(unit)
        olds, news = [], []
        for side, (view, stored) in enumerate(zip(spec.sides, old.stored, strict=True)):
            P = expand(decode_basis(stored), view, dtype)
            key = basis_key(self.seed, index, refreshed + 1, side)
            if source == "gradient":
                new = self.method.next(unit.mT if side else unit, P, key, refreshed == 0)
            else:
                new = self.method.after(unit, P, key)
            usable &= jnp.isfinite(new).all()
            olds.append(P)
            news.append(requantize(new, stored))
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(usable, new, old))
        stored = tuple(keep(new, x) for new, x in zip(news, old.stored, strict=True))
        pairs = zip(spec.sides, stored, strict=True)
        bases = [expand(decode_basis(x), view, dtype) for view, x in pairs]
        R = None if old.R is None else to_core(G, *bases)
        return MatrixState(
            stored=stored,
            refreshed=refreshed + usable.astype(refreshed.dtype),
            carried=self.carry(roles, old.carried, olds, bases, usable),
            R=R,
            finite=None if R is None else jnp.isfinite(R).all(),
        )

    def carry(
        self,
        roles: Sequence[Any],
        carried: list[Any],
        olds: Sequence[Array],
        news: Sequence[Array],
        usable: Bool[Array, ""],
    ) -> list[Any]:
        """The carried arrays of a matrix in its new basis or bases, if those are usable."""
        if self.transport is None:
            return carried
        rotations = [matmul(new.mT, P) for new, P in zip(news, olds, strict=True)]  # C and D
        arrays = dequantize(carried)
        new = self.transport(list(zip(roles, arrays, strict=True)), *rotations)
        new = [jnp.where(usable, x, old) for x, old in zip(new, arrays, strict=True)]
        # Encoded anew even where nothing changed, which does not change codes: decoded values are
        # exact in their own code.
        return requantize(new, carried)


class RefreshLeaf(NamedTuple):
    """The static part of the refresh of one leaf.

    Attributes:
      spec: the leaf's.
      roles: of the carried arrays.
      partition: of the leaf.
    """

    spec: LeafSpec
    roles: tuple[Any, ...]
    partition: LeafPartition


@functools.partial(jax.jit, static_argnames=("refresh", "leaves", "source"))
def refresh_due(
    refresh: Refresh,
    leaves: tuple[RefreshLeaf, ...],
    source: Source,
    gradients: list[Array],
    due: list[Bool[Array, "..."]],
    states: list[MatrixState],
) -> list[MatrixState]:
    """Refreshes every due matrix.

    Args:
      refresh: of the projection.
      leaves: static; one entry for each projected leaf, as in the lists that follow.
      source: of `gradients`, see :meth:`Refresh.refresh_matrix`.
      gradients: G in the leaf's shape, or Y, (*batch, m, r).
      due: which matrices are.
      states: of the matrices.
    """
    step = functools.partial(refresh.refresh_matrix, source)
    entries = [
        Leaf(
            spec=leaf.spec if source == "gradient" else of_products(leaf.spec),
            kind=leaf.roles,
            partition=leaf.partition,
            G=G,
            due=due_now,
            order=jnp.asarray(order(leaf.spec)),
            state=state,
            in_layout=functools.partial(in_stored_layouts, leaf),
        )
        for leaf, G, due_now, state in zip(leaves, gradients, due, states, strict=True)
    ]
    return map_due_matrices(step, entries)


def in_stored_layouts(leaf: RefreshLeaf, state: MatrixState) -> MatrixState:
    """The state of all matrices of a leaf, its cores and moments as :func:`in_stored_layout`."""
    spec, roles, partition = leaf

    def in_layout(role, x):
        stored = state_partition(x.shape, role, spec, partition)
        return in_stored_layout(x, stored, partition)

    carried = [
        jax.tree.map(functools.partial(in_layout, role), x)
        for x, role in zip(state.carried, roles, strict=True)
    ]
    R = None if state.R is None else in_layout("linear", state.R)
    return state._replace(carried=carried, R=R)


def of_products(spec: LeafSpec) -> LeafSpec:
    """The spec of an array with the shape of Y, (*batch, m, r), for the matrices of `spec`."""
    k = len(spec.batch)
    axes = {"batch": tuple(range(k)), "rows": (k,), "cols": (k + 1,)}
    return dataclasses.replace(spec, shape=spec.basis_shape, split=(), **axes)
