"""A refresh out of passes none of which forms a gradient.

A turn of the power iteration needs of a gradient nothing but its products,

    R = PᵀG,    Y = G Rᵀ = G (Gᵀ P),    P' from Y and P as in `basis.py`,    R' = P'ᵀG,

and all of these are cores: R on the basis P of one side, and (G Q)ᵀ on a basis Q of the other,

    Y = (G Q) D,    Q = Rᵀ D⁻¹,    D the norms of the rows of R.

That Q has columns of length 1 is for passes in bfloat16; D undoes it. So a turn is two passes of
the loss, forwards and backwards, and gives what it gives with the gradient at hand, to rounding. Y
is linear in G: of the sum of micro-batches it is the sum.

A matrix takes as many turns as its basis does with the gradient: one, or a few when it is new.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ..quantization.quantized_array import basis_of, closed, decoded, is_quantized, opened, recoded
from ..sharding.partitioning import ParamPartitions, role_partition, with_auto_axes
from ..subspace.basis import basis_key, expand, normalised
from ..subspace.engine import SubspaceState
from ..subspace.refresh import Refresh, order
from ..subspace.refresh_loop import Leaf, map_due_matrices
from ..tree.leaf_spec import Basis, Core, LeafSpec, cores, replace_cores
from ..util.linalg import norms
from .loss import Bases, Result, bases_in, bases_of, is_basis, largest


class Turning(NamedTuple):
    """What a turn changes of a leaf's matrices, or of one of them.

    Attributes:
      kept: what the state keeps of P.
      times: of refreshes so far.
      carried: inner's state, as far as transport carries it.

    What is in 8 bits is decoded where a matrix is turned, and of no more than this matrix.
    """

    kept: Any
    times: Array
    carried: list[Any]


def refreshed(
    run: Callable[[Bases], Result],
    refreshes: list[Refresh],
    states: list[SubspaceState],
    partitions: ParamPartitions,
) -> tuple[Result, list[SubspaceState]]:
    """Value and cores, on bases that are turned first where they are due.

    Args:
      run: a pass on bases.
      refreshes: of each projection.
      states: of each.
      partitions: of the weights, as far as known.
    """
    start = run(bases_of(states))
    due, number = [], jnp.int32(0)  # turns of each matrix; the most
    for refresh, state in zip(refreshes, states, strict=True):
        flags = refresh.all_flags(state, largest(start, state))
        each = [
            flag * jnp.where(n.value == 0, refresh.method.first_iterations, 1)
            for flag, n in zip(flags, cores(state.refreshed), strict=True)
        ]
        due.append(each)
        number = functools.reduce(jnp.maximum, [x.max() for x in each], number)

    def one(k, carry):
        (_, grads), changed = carry
        now = [_with(*pair) for pair in zip(states, changed, strict=True)]
        Q, D = opposite(cores(grads))
        products = cores(run(Q, k)[1])
        Y = {x.spec.path: x.value.mT * D[x.spec.path] for x in products}
        changed = []
        for refresh, each, state in zip(refreshes, due, now, strict=True):
            made = functools.partial(turn, refresh, partitions)
            lies = state.basis, state.refreshed, state.inner_state
            of_state = [Y[P.spec.path] for P in bases_in(state.basis)]
            changed.append(
                with_auto_axes(made, lies, of_state, [k < x for x in each], k == 0, state)
            )
        now = [_with(*pair) for pair in zip(states, changed, strict=True)]
        return run(bases_of(now), k), changed

    before = [(x.basis, x.refreshed, x.inner_state) for x in states]
    result, changed = lax.fori_loop(0, number, one, (start, before))
    return result, [_with(*pair) for pair in zip(states, changed, strict=True)]


def _with(state: SubspaceState, changed: tuple[PyTree, PyTree, PyTree]) -> SubspaceState:
    P, times, inner_state = changed
    return state._replace(basis=P, refreshed=times, inner_state=inner_state)


def opposite(Rs: list[Core]) -> tuple[Bases, dict[tuple[Any, ...], Float[Array, "*batch 1 r"]]]:
    """The bases Q of the other sides and the D, by path, of cores on the bases P."""
    bases: Bases = {}
    D = {}
    for R in Rs:
        lengths = norms(R.value, (-1,))
        rows = jnp.where(lengths > 0, R.value / jnp.where(lengths > 0, lengths, 1.0), 0.0)
        bases[R.spec.path] = (Basis(rows.mT, R.spec.transposed),)
        D[R.spec.path] = lengths.mT / jnp.maximum(lengths.max(axis=-2, keepdims=True), 1e-38)
    return bases, D


def turn(
    refresh: Refresh,
    partitions: ParamPartitions,
    Y: list[Float[Array, "..."]],
    due: list[Bool[Array, "..."]],
    first: Bool[Array, ""],
    state: SubspaceState,
) -> tuple[PyTree, PyTree, PyTree]:
    """One turn of what is due: bases, counts of refreshes, and inner's state.

    Args:
      refresh: of the projection.
      partitions: of the gradients, as far as known.
      Y: the products for each basis, (*batch, m, r).
      due: which matrices of each Core are.
      first: whether it is the first turn of a refresh, which counts it.
      state: the :class:`SubspaceState`.
    """
    bases = bases_in(state.basis)
    inner_state = closed(state.inner_state)
    roles, arrays = refresh.carried(inner_state, bases)

    def step(spec, roles, part, index, old):
        product, usable = normalised(part)
        P = expand(basis_of(old.kept), spec, part.dtype)
        key = basis_key(refresh.seed, index, old.times + 1, 0)
        new = refresh.method.after(product, P, key)
        usable &= jnp.isfinite(new).all()
        new = old.kept.anew(new) if is_quantized(old.kept) else new
        kept = jax.tree.map(functools.partial(jnp.where, usable), new, old.kept)
        into = [expand(basis_of(kept), spec, part.dtype)]
        carried = refresh.carry(roles, decoded(old.carried), [P], into, usable)
        return Turning(kept, old.times + (usable & first), recoded(carried, old.carried))

    lies = {
        P.spec.path: role_partition("basis", P.spec, partitions.get(P.spec.path)) for P in bases
    }
    leaves = [
        Leaf(
            *(of_products(P.spec), tuple(kinds), y, now, jnp.asarray(order(P.spec))),
            Turning(P.value, n.value, opened(carried)),
        )
        for P, kinds, y, now, n, carried in zip(
            bases, roles, Y, due, cores(state.refreshed), arrays, strict=True
        )
    ]
    new_P, new_n, new_arrays = zip(
        *map_due_matrices(step, leaves, ParamPartitions(partitions.mesh, lies)), strict=True
    )
    left = iter(new_P)
    new_arrays = [closed(x) for x in new_arrays]
    return (
        jax.tree.map(lambda P: P.replace(next(left)), state.basis, is_leaf=is_basis),
        replace_cores(state.refreshed, new_n),
        opened(refresh.put_back(inner_state, bases, new_arrays)),
    )


def of_products(spec: LeafSpec) -> LeafSpec:
    """A leaf of the shape of the products Y, with the matrices of `spec`."""
    k = len(spec.batch)
    axes = {"batch": tuple(range(k)), "rows": (k,), "cols": (k + 1,)}
    return dataclasses.replace(spec, shape=spec.basis_shape, split=(), **axes)
