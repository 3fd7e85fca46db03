"""A refresh out of whole gradients, which a step with anything due forms in place of cores.

A matrix that has had no usable gradient yet is due once its core is neither zero nor infinite,
which is known only after a hot step; then, once, a step runs both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from ..quantization.quantized_array import decoded, recoded
from ..sharding.partitioning import ParamPartitions, with_auto_axes
from ..subspace.engine import SubspaceState
from ..subspace.projection import lower
from ..subspace.refresh import Refresh
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import cores, is_core
from ..util.control_flow import when
from .loss import Bases, Result, bases_of, blank, largest, like


FIELDS = ("basis", "right_basis", "refreshed", "inner_state")  # that a refresh changes


def refreshed(
    run: Callable[[Bases], Result],
    full: Callable[[], Result],
    refreshes: list[Refresh],
    states: list[SubspaceState],
    partitions: ParamPartitions,
) -> tuple[Result, list[SubspaceState]]:
    """Value and cores, on bases that are refreshed first where they are due.

    Args:
      run: a pass on bases.
      full: one with whole gradients.
      refreshes: of each projection.
      states: of each.
      partitions: of the weights, as far as known.
    """

    def due(result):
        pairs = zip(refreshes, states, strict=True)
        return jnp.stack([x.any_due(state, largest(result, state)) for x, state in pairs]).any()

    def refresh(carry):
        value, grads = full()
        at = dict(jax.tree_util.tree_leaves_with_path(unbox(grads)))
        changed = []
        for refresh, state in zip(refreshes, states, strict=True):
            P, Q, projected, times, inner_state = _lowered(
                refresh, _of_projected(state, at), state, partitions
            )
            at |= {R.spec.path: R for R in cores(projected)}
            changed.append((P, Q, times, inner_state))
        return (value, like(grads, at)), changed

    hot = lambda: run(bases_of(states))
    none = jax.tree.map(blank, jax.eval_shape(hot))
    result = when(~due(none), lambda _: hot(), none)
    before = [tuple(getattr(state, name) for name in FIELDS) for state in states]
    result, changed = when(due(result), refresh, (result, before))
    new = [dict(zip(FIELDS, x, strict=True)) for x in changed]
    return result, [state._replace(**x) for state, x in zip(states, new, strict=True)]


def _lowered(
    refresh: Refresh, gradients: PyTree, state: SubspaceState, partitions: ParamPartitions
) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree]:
    """Bases, cores, counts and inner state after a refresh; cores lie as those of `backward`."""
    whole = jax.tree.map(lambda n: n.replace(PartitionSpec()), state.refreshed, is_leaf=is_core)
    like = state.basis, state.right_basis, whole, state.refreshed, state.inner_state

    def down(gradients, state):
        P, Q, projected, times, inner_state, _ = lower(
            refresh, gradients, decoded(state), partitions
        )
        P, Q = recoded(P, state.basis), recoded(Q, state.right_basis)
        return P, Q, projected, times, recoded(inner_state, state.inner_state)

    return with_auto_axes(down, like, gradients, state)


def _of_projected(state: SubspaceState, at: dict[tuple[Any, ...], Any]) -> PyTree:
    """What `at` holds for each path, in the structure of a state's trees; None for other leaves."""
    of = lambda n: at[n.spec.path] if is_core(n) else None
    return jax.tree.map(of, state.skipped, is_leaf=is_core)
