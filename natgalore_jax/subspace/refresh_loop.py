"""Maps a function over the due matrices, one at a time, with one program for equal leaves.

The program that refreshes a matrix is long. An unrolled model has hundreds of leaves that differ
only by the numbers in their names. Such leaves share one program: a loop over the matrices of all
of them, which slices one out, refreshes it and writes it back.
"""

import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ..sharding.distributed import batch_partition, over_shards
from ..sharding.partitioning import LeafPartition
from ..tree.leaf_spec import LeafSpec
from ..util.control_flow import for_any, run_if_due, select_value, when


class Leaf(NamedTuple):
    """A projected leaf in the loop.

    Attributes:
      spec: of G.
      kind: of the state; leaves of different kinds do not share a program.
      partition: of G.
      G: the gradient, or another array, in the shape of `spec`.
      due: which matrices are, (*batch).
      order: the places of the matrices in the refresh order, (*batch).
      state: a tree of arrays whose batch axes come first.
    """

    spec: LeafSpec
    kind: Hashable
    partition: LeafPartition
    G: Array
    due: Bool[Array, "*batch"]
    order: Int[Array, "*batch"]
    state: Any


# For one matrix: (spec, kind, G as `LeafSpec.cut` slices it, place in the order, due, state) ->
# state. `due` is false only under `vmap`, where another instance's matrix is due.
Step = Callable[[LeafSpec, Any, Array, Array, Array, Any], Any]


def map_due_matrices(step: Step, leaves: list[Leaf]) -> list[Any]:
    """The states after `step` on every due matrix."""
    groups: dict[Hashable, list[int]] = {}
    for place, leaf in enumerate(leaves):
        groups.setdefault(_group_key(leaf), []).append(place)
    runs = [
        functools.partial(_over_group, step, [leaves[i] for i in places])
        for places in groups.values()
    ]
    due = [
        functools.reduce(jnp.logical_or, [leaves[i].due.any() for i in places])
        for places in groups.values()
    ]
    states = [[leaves[i].state for i in places] for places in groups.values()]
    new_states: dict[int, Any] = {}
    for places, new in zip(groups.values(), run_if_due(due, runs, states), strict=True):
        new_states |= zip(places, new, strict=True)
    return [new_states[i] for i in range(len(leaves))]


def _group_key(leaf: Leaf) -> Hashable:
    """Equal for leaves that can share one program.

    The name counts, up to numbers: under `jit` on Auto axes partitions are unknown, and the layers
    of one weight are likely to share theirs.
    """
    if batch_partition(leaf.spec, leaf.partition):
        return leaf.spec  # refreshed where its matrices are, by itself
    pattern = re.sub(r"\d+", "#", leaf.spec.name)
    types = tuple(jax.typeof(x) for x in (leaf.G, *jax.tree.leaves(leaf.state)))
    return pattern, leaf.spec.unnamed, leaf.kind, types, leaf.partition


def _over_group(step: Step, leaves: list[Leaf], states: list[Any]) -> list[Any]:
    spec, kind = leaves[0].spec.unnamed, leaves[0].kind
    if len(leaves) == 1:
        (leaf,) = leaves
        over_leaf = functools.partial(_over_leaf, step, kind)
        inputs = (leaf.due, leaf.order)
        return [over_shards(over_leaf, spec, leaf.partition, leaf.G, inputs, *states)]
    order = jnp.concatenate([leaf.order.reshape(-1) for leaf in leaves])
    due = jnp.concatenate([leaf.due.reshape(-1) for leaf in leaves])

    def at(e, states):
        which, i = e // spec.matrices, e % spec.matrices
        here = [which == j for j in range(len(leaves))]
        cuts = [
            functools.partial(_take, spec, leaf.G, i, state)
            for leaf, state in zip(leaves, states, strict=True)
        ]
        none = jax.tree.map(jnp.zeros_like, jax.eval_shape(cuts[0]))
        part, old = select_value(here, cuts, none)
        new = step(spec, kind, part, order[e], due[e], old)
        puts = [functools.partial(_put_if, spec, is_here, i, new) for is_here in here]
        return run_if_due(here, puts, states)

    return _where(due, at, states)


@functools.partial(jax.jit, static_argnames="spec")
def _take(spec: LeafSpec, G: Array, i: Int[Array, ""], state: Any) -> tuple[Array, Any]:
    """The gradient and the state of the i-th matrix."""
    return spec.cut(G, i), spec.take_all(state, i)


@functools.partial(jax.jit, static_argnames="spec")
def _put_if(spec: LeafSpec, here: Bool[Array, ""], i: Int[Array, ""], new: Any, state: Any) -> Any:
    """`state` with the i-th matrix's part replaced by `new`, if `here`."""
    part = jax.tree.map(functools.partial(jnp.where, here), new, spec.take_all(state, i))
    return spec.put_all(state, i, part)


def _over_leaf(
    step: Step,
    kind: Any,
    spec: LeafSpec,
    G: Array,
    which: tuple[Bool[Array, "*batch"], Int[Array, "*batch"]],
    state: Any,
) -> Any:
    due, order = (x.reshape(-1) for x in which)

    def at(i, state):
        new = step(spec, kind, spec.cut(G, i), order[i], due[i], spec.take_all(state, i))
        return spec.put_all(state, i, new)

    return _where(due, at, state)


def _where(due: Bool[Array, " matrices"], at: Callable[[Any, Any], Any], state: Any) -> Any:
    """`at(i, state)` for each i that is due, in order."""
    due = for_any(due)
    if len(due) == 1:
        return when(due[0], functools.partial(at, jnp.int32(0)), state)
    first = jnp.argmax(due).astype(jnp.int32)
    last = len(due) - jnp.argmax(due[::-1]).astype(jnp.int32)
    return lax.fori_loop(
        first,
        jnp.where(due.any(), last, first),
        lambda i, x: when(due[i], functools.partial(at, i), x),
        state,
    )
