"""Goes over the matrices that are due, one at a time, with one program for leaves that are alike.

The program that refreshes a matrix is long. The layers of an unrolled model are hundreds of leaves
whose names differ in their numbers alone, and nothing else of them does. Such leaves share one: a
loop over the matrices of all of them, which copies one out, works on it, and puts it back.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ..sharding.distributed import batch_partition, over_shards
from ..sharding.partitioning import ParamPartitions
from ..tree.leaf_spec import LeafSpec
from ..util.control_flow import run_if_due, select_value, when


class Leaf(NamedTuple):
    """A projected leaf in a map_due_matrices.

    Attributes:
      spec: how it is seen as matrices.
      kind: of its state; leaves of other kinds are not alike.
      G: its gradient, in its shape.
      due: which of its matrices are, (*batch).
      order: their places in the refresh order, (*batch).
      state: a tree of arrays whose batch axes come first.
    """

    spec: LeafSpec
    kind: Hashable
    G: Array
    due: Bool[Array, "*batch"]
    order: Int[Array, "*batch"]
    state: Any


# Of a matrix: (spec, kind, gradient as `LeafSpec.cut` gives it, place in the order, state) -> state
Step = Callable[[LeafSpec, Any, Array, Array, Any], Any]


def map_due_matrices(step: Step, leaves: list[Leaf], partitions: ParamPartitions) -> list[Any]:
    """The states after `step` was taken on each matrix that is due."""
    groups: dict[Hashable, list[int]] = {}
    for place, leaf in enumerate(leaves):
        groups.setdefault(_likeness(leaf, partitions), []).append(place)
    runs = [
        functools.partial(_over_group, step, [leaves[i] for i in places], partitions)
        for places in groups.values()
    ]
    due = [
        functools.reduce(jnp.logical_or, [leaves[i].due.any() for i in places])
        for places in groups.values()
    ]
    states = [[leaves[i].state for i in places] for places in groups.values()]
    new = run_if_due(due, runs, states)
    swept = {
        i: state
        for places, group in zip(groups.values(), new, strict=True)
        for i, state in zip(places, group, strict=True)
    }
    return [swept[i] for i in range(len(leaves))]


def _likeness(leaf: Leaf, partitions: ParamPartitions) -> Hashable:
    """Equal for leaves that one program serves, which lie alike as far as names and types tell."""
    if batch_partition(leaf.spec, partitions):
        return leaf.spec  # its matrices stay where they are, so it is a group of its own
    pattern = re.sub(r"\d+", "#", leaf.spec.name)
    shape = dataclasses.replace(leaf.spec, path=(), index=0)
    types = tuple(jax.typeof(x) for x in (leaf.G, *jax.tree.leaves(leaf.state)))
    return pattern, shape, leaf.kind, types, partitions.get(leaf.spec.path)


def _over_group(
    step: Step, leaves: list[Leaf], partitions: ParamPartitions, states: list[Any]
) -> list[Any]:
    spec, kind = leaves[0].spec, leaves[0].kind
    if len(leaves) == 1:
        (leaf,) = leaves
        over_leaf = functools.partial(_over_leaf, step, kind)
        return [over_shards(over_leaf, spec, partitions, leaf.G, (leaf.due, leaf.order), *states)]
    order = jnp.concatenate([leaf.order.reshape(-1) for leaf in leaves])

    def at(e, states):
        which, i = e // spec.matrices, e % spec.matrices
        here = [which == j for j in range(len(leaves))]
        cuts = [
            lambda G=leaf.G, state=state: (spec.cut(G, i), spec.take_all(state, i))
            for leaf, state in zip(leaves, states, strict=True)
        ]
        none = jax.tree.map(jnp.zeros_like, jax.eval_shape(cuts[0]))
        part, old = select_value(here, cuts, none)
        new = step(spec, kind, part, order[e], old)

        def put(is_here, state):
            part = jax.tree.map(functools.partial(jnp.where, is_here), new, spec.take_all(state, i))
            return spec.put_all(state, i, part)

        puts = [functools.partial(put, is_here) for is_here in here]
        return run_if_due(here, puts, states)

    return _where(jnp.concatenate([leaf.due.reshape(-1) for leaf in leaves]), at, states)


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
        new = step(spec, kind, spec.cut(G, i), order[i], spec.take_all(state, i))
        return spec.put_all(state, i, new)

    return _where(due, at, state)


def _where(due: Bool[Array, " matrices"], at: Callable[[Any, Any], Any], state: Any) -> Any:
    """`at(i, state)` for each i that is due, in order."""
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
