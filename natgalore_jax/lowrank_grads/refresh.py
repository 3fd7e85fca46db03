"""The refresh of a step with low-rank gradients: cores on bases that are refreshed where due.

**By passes.** An iteration of the power method needs only products with a gradient,

    R = PᵀG,    Y = G Rᵀ = G (Gᵀ P),    P' from Y and P (basis.py),    R' = P'ᵀG,              (1)

all of which are cores: R on the basis P of one side, and (G Q)ᵀ on a basis Q of the other side,

    Y = (G Q) D,    Q = Rᵀ D⁻¹,    D the norms of the rows of R.                               (2)

The columns of Q have length 1 for passes in bfloat16; D undoes it. So an iteration is two passes
of the loss, forwards and backwards, and equals that with G, to rounding; no gradient is formed. Y
is linear in G: for micro-batches it is the sum.

**From gradients.** A step with a due matrix forms whole gradients in place of cores, and refreshes
as the projection does.

Whether any matrix is due is decided on the device. A matrix without a usable gradient so far is due
once its core is neither zero nor infinite, which only a step on cores shows; then, once, a step
from gradients runs both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from ..sharding.array_partitions import with_auto_axes
from ..sharding.partitioning import ParamPartitions, aligned_partition
from ..subspace.projection import refresh_and_project
from ..subspace.refresh import MatrixState, Refresh, RefreshLeaf, number_of_matrices, refresh_due
from ..subspace.state import (
    Bases,
    Flattened,
    SubspaceState,
    bases_in,
    bases_of,
    flatten,
    settings_of,
)
from ..tree.cores import Basis, Core, cores
from ..tree.flax_boxes import unbox
from ..util.control_flow import when
from ..util.linalg import max_abs, norms
from .loss import Result, like_params, zeros_of


def refreshed_by_passes(
    run: Callable[..., Result], states: list[SubspaceState], partitions: ParamPartitions
) -> tuple[Result, list[SubspaceState]]:
    """Value and cores, on bases that are refreshed first where they are due, by passes.

    Args:
      run: (bases, iteration) -> a pass of the loss, whose gradients are cores on these bases.
      states: of each projection.
      partitions: of the weights.
    """
    start = run(bases_of(states))
    # The iterations of each matrix, 0 if it is not due; and the largest of them.
    iterations: list[list[Array]] = []
    number = jnp.int32(0)
    for state in states:
        method = _refresh_of(state).method
        iterations.append(
            [
                due * jnp.where(n.value == 0, method.first_iterations, 1)
                for due, n in zip(_due(state, start), cores(state.refreshed), strict=True)
            ]
        )
        number = functools.reduce(jnp.maximum, [x.max() for x in iterations[-1]], number)

    def iterate(k, carry):
        (_, grads), states = carry
        Q, D = opposite_bases(cores(grads))
        products = cores(run(Q, k)[1])
        Y = {x.spec.path: x.value.mT * D[x.spec.path] for x in products}  # (2)
        states = [
            _refreshed_by_products(state, partitions, Y, [k < x for x in each], k == 0)
            for state, each in zip(states, iterations, strict=True)
        ]
        return run(bases_of(states), k), states

    return lax.fori_loop(0, number, iterate, (start, states))


def opposite_bases(
    Rs: list[Core],
) -> tuple[Bases, dict[tuple[Any, ...], Float[Array, "*batch 1 r"]]]:
    """Q and D of (2), by path, of cores on the bases P."""
    bases: Bases = {}
    D = {}
    for R in Rs:
        lengths = norms(R.value, (-1,))
        rows = jnp.where(lengths > 0, R.value / jnp.where(lengths > 0, lengths, 1.0), 0.0)
        bases[R.spec.path] = (Basis(rows.mT, R.spec.transposed),)
        D[R.spec.path] = lengths.mT / jnp.maximum(lengths.max(axis=-2, keepdims=True), 1e-38)
    return bases, D


def _refreshed_by_products(
    state: SubspaceState,
    partitions: ParamPartitions,
    Y: dict[tuple[Any, ...], Float[Array, "..."]],
    due: list[Bool[Array, "..."]],
    first: Bool[Array, ""],
) -> SubspaceState:
    """One iteration of the due matrices; only the first one of a refresh counts it."""
    refresh = _refresh_of(state)
    specs, roles, states, unflatten = flatten(state, refresh.transport)
    leaves = []
    for spec, role in zip(specs, roles, strict=True):
        leaf = partitions.leaf(spec)
        leaf = leaf._replace(partition=aligned_partition("basis", spec, leaf))
        leaves.append(RefreshLeaf(spec, role, leaf))
    refreshed = functools.partial(refresh_due, refresh, tuple(leaves), "product")
    products = [Y[spec.path] for spec in specs]
    new = with_auto_axes(refreshed, states, products, due, states)
    count = lambda x, old: x._replace(refreshed=jnp.where(first, x.refreshed, old.refreshed))
    return unflatten([count(*pair) for pair in zip(new, states, strict=True)])


def refreshed_from_gradients(
    run: Callable[..., Result],
    full: Callable[[], Result],
    states: list[SubspaceState],
    partitions: ParamPartitions,
) -> tuple[Result, list[SubspaceState]]:
    """Value and cores, on bases that are refreshed first where they are due, from gradients.

    Args:
      run: bases -> a pass of the loss, whose gradients are cores.
      full: a pass with whole gradients.
      states: of each projection.
      partitions: of the weights.
    """

    def any_due(result):
        flags = [flag.any() for state in states for flag in _due(state, result)]
        return jnp.stack(flags).any()

    def refresh(carry):
        value, grads = full()
        gradients = dict(jax.tree_util.tree_leaves_with_path(unbox(grads)))
        new_states = []
        for state in carry[1]:
            flat = flatten(state, _refresh_of(state).transport)
            new = _refreshed_by_gradients(state, flat, partitions, gradients)
            gradients |= {
                spec.path: Core(x.R, spec) for spec, x in zip(flat.specs, new, strict=True)
            }
            new_states.append(flat.unflatten(new))
        return (value, like_params(grads, gradients)), new_states

    cores_only = lambda: run(bases_of(states))
    none = jax.tree.map(zeros_of, jax.eval_shape(cores_only))
    result = when(~any_due(none), lambda _: cores_only(), none)
    return when(any_due(result), refresh, (result, states))


def _refreshed_by_gradients(
    state: SubspaceState,
    flat: Flattened,
    partitions: ParamPartitions,
    gradients: dict[tuple[Any, ...], Any],
) -> list[MatrixState]:
    """The states after a refresh, with cores that have the partitions of those of a pass."""
    leaf_partitions = [partitions.leaf(spec) for spec in flat.specs]

    def refreshed(gradients, states, count):
        return refresh_and_project(
            _refresh_of(state), flat.specs, flat.roles, leaf_partitions, gradients, states, count
        ).states

    replicated = lambda x: x._replace(R=PartitionSpec(), finite=PartitionSpec())
    out_like = lambda: list(map(replicated, flat.states))
    gradients = [gradients[spec.path] for spec in flat.specs]
    new = with_auto_axes(refreshed, out_like, gradients, flat.states, state.count)
    return [x._replace(finite=None) for x in new]


def _refresh_of(state: SubspaceState) -> Refresh:
    settings = settings_of(state)
    assert settings is not None  # value_and_grad leaves out states without bases
    return settings.refresh


def _due(state: SubspaceState, result: Result) -> list[Bool[Array, "..."]]:
    """For each projected leaf which matrices are due, from a pass that has computed its cores."""
    largest = {R.spec: max_abs(R.value) for R in cores(result[1])}
    total = number_of_matrices([P.spec for P in bases_in(state.basis)])
    due = _refresh_of(state).due
    return [
        due(n.spec, largest[n.spec], n.value, state.count, total) for n in cores(state.refreshed)
    ]
