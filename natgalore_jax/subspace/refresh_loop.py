"""Maps a function over the due matrices, one at a time, with one program for equal matrices.

The program that refreshes a matrix is long: on TPUs it takes seconds to compile. A model has many
leaves with matrices of one shape, in stacks or not. Such leaves share one program: a loop over the
matrices of all of them, which slices one out, refreshes it and writes it back.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout
from jaxtyping import Array, Bool, Int

from ..sharding.distributed import batch_partition, over_shards
from ..sharding.partitioning import LeafPartition, axis_entries, merged_entry
from ..sharding.shard_map import varying_axes
from ..sharding.tpu_layouts import in_layout_on_tpu, stored_layout_of_matrix
from ..tree.leaf_spec import LeafSpec
from ..util.control_flow import for_any, run_each, run_if_due, select_value, when


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
      in_layout: of a state, a constraint of its layout on TPUs.
    """

    spec: LeafSpec
    kind: Hashable
    partition: LeafPartition
    G: Array
    due: Bool[Array, "*batch"]
    order: Int[Array, "*batch"]
    state: Any
    in_layout: Callable[[Any], Any] = lambda state: state


# For one matrix: (spec, kind, G as `spec.cut` slices it, place in the order, due, state) -> state.
# `due` is false only under `vmap`, where another instance's matrix is due.
Step = Callable[[LeafSpec, Any, Array, Array, Array, Any], Any]


# Up to so many leaves of a group write without a condition, which costs a GPU's host a wait and on
# TPUs 0.17 GiB of the peak of galore (350m, v5e:2x4). For more the program would grow: each write
# has a copy of the refresh's last operations.
FEW = 8


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
    """Equal for leaves whose matrices can share one program.

    Under `jit` on Auto axes partitions are unknown. Leaves that then differ in their partition cost
    a refresh the move of one matrix.
    """
    spec = leaf.spec
    if batch_partition(spec, leaf.partition):
        return spec  # refreshed where its matrices are, by itself
    entries = axis_entries(spec, leaf.partition.partition)
    sides = [merged_entry(spec, axes, entries) for axes in (spec.rows, spec.cols)]
    arrays, structure = jax.tree.flatten(leaf.state)
    shapes = [x.shape[len(spec.batch) :] for x in arrays]
    types = [(x.dtype, jax.typeof(x).memory_space, varying_axes(x)) for x in (leaf.G, *arrays)]
    return spec.matrix, leaf.kind, structure, *shapes, *types, leaf.partition.mesh, *sides


def _over_group(step: Step, leaves: list[Leaf], states: list[Any]) -> list[Any]:
    if len(leaves) == 1:
        (leaf,) = leaves
        inside_shards = batch_partition(leaf.spec, leaf.partition)
        in_layout = (lambda state: state) if inside_shards else leaf.in_layout
        layout = stored_layout_of_matrix(leaf.spec, leaf.partition, leaf.G)
        over_leaf = functools.partial(_over_leaf, step, leaf.kind, layout, in_layout)
        inputs = (leaf.due, leaf.order)
        return [over_shards(over_leaf, leaf.spec.unnamed, leaf.partition, leaf.G, inputs, *states)]
    matrix, kind = leaves[0].spec.matrix, leaves[0].kind
    order = jnp.concatenate([leaf.order.reshape(-1) for leaf in leaves])
    due = jnp.concatenate([leaf.due.reshape(-1) for leaf in leaves])
    sizes = [leaf.spec.matrices for leaf in leaves]
    leaf_of = jnp.asarray(np.repeat(np.arange(len(leaves), dtype=np.int32), sizes))
    first = np.cumsum([0, *sizes[:-1]], dtype=np.int32)
    layouts = [stored_layout_of_matrix(leaf.spec, leaf.partition, leaf.G) for leaf in leaves]

    def at(e, states):
        here = [leaf_of[e] == j for j in range(len(leaves))]
        # Of the leaf that has matrix e; the slices of the others are not used.
        own = [jnp.clip(e - start, 0, size - 1) for start, size in zip(first, sizes, strict=True)]
        cuts = [
            functools.partial(_take, leaf.spec.unnamed, layout, leaf.G, i, state)
            for leaf, layout, i, state in zip(leaves, layouts, own, states, strict=True)
        ]
        none = jax.tree.map(jnp.zeros_like, jax.eval_shape(cuts[0]))
        part, old = select_value(here, cuts, none)
        new = step(matrix, kind, part, order[e], due[e], old)
        put = _put_or_keep if len(leaves) <= FEW else _put_if
        puts = [
            functools.partial(put, leaf.spec.unnamed, is_here, i, new)
            for leaf, is_here, i in zip(leaves, here, own, strict=True)
        ]
        states = run_each(here, puts, states)
        return [leaf.in_layout(state) for leaf, state in zip(leaves, states, strict=True)]

    return _where(due, at, states)


def _cut(spec: LeafSpec, layout: Layout | None, G: Array, i: Int[Array, ""]) -> Array:
    """The gradient of the i-th matrix.

    XLA:TPU would else choose the layout of the refresh and copy the whole stack to it on every
    step: 0.84 GiB more temporaries in the update of a Llama 350m on one chip.
    """
    return in_layout_on_tpu(spec.cut(G, i), layout)


@functools.partial(jax.jit, static_argnames=("spec", "layout"))
def _take(
    spec: LeafSpec, layout: Layout | None, G: Array, i: Int[Array, ""], state: Any
) -> tuple[Array, Any]:
    """The gradient and the state of the i-th matrix."""
    return _cut(spec, layout, G, i), spec.take_all(state, i)


@functools.partial(jax.jit, static_argnames="spec")
def _put_or_keep(
    spec: LeafSpec, here: Bool[Array, ""], i: Int[Array, ""], new: Any, state: Any
) -> Any:
    """`state` with the i-th matrix's part replaced by `new` if `here`, else by itself."""
    old = spec.take_all(state, i)
    return spec.put_all(state, i, jax.tree.map(functools.partial(jnp.where, here), new, old))


@functools.partial(jax.jit, static_argnames="spec")
def _put_if(spec: LeafSpec, here: Bool[Array, ""], i: Int[Array, ""], new: Any, state: Any) -> Any:
    """As `_put_or_keep`, under a condition."""
    return when(here, lambda state: spec.put_all(state, i, new), state)


def _over_leaf(
    step: Step,
    kind: Any,
    layout: Layout | None,
    in_layout: Callable[[Any], Any],
    spec: LeafSpec,
    G: Array,
    which: tuple[Bool[Array, "*batch"], Int[Array, "*batch"]],
    state: Any,
) -> Any:
    due, order = (x.reshape(-1) for x in which)

    def at(i, state):
        new = step(spec, kind, _cut(spec, layout, G, i), order[i], due[i], spec.take_all(state, i))
        return in_layout(spec.put_all(state, i, new))

    return _where(due, at, state)


def _where(due: Bool[Array, " matrices"], at: Callable[[Any, Any], Any], state: Any) -> Any:
    """`at(i, state)` for each i that is due, in order."""
    due = for_any(due)
    if len(due) == 1:
        return when(due[0], functools.partial(at, jnp.int32(0)), state)
    places = jnp.arange(len(due))

    def next_due(_, carry):
        i, state = carry
        i = jnp.argmax(due & (places > i)).astype(jnp.int32)
        return i, at(i, state)

    number = due.sum(dtype=jnp.int32)
    return lax.fori_loop(0, number, next_due, (jnp.full_like(number, -1), state))[1]
