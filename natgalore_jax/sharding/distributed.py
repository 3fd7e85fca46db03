"""Operations on the matrices of a leaf that is sharded over devices.

over_shards         a loop over the matrices of a stack, on each device over its own matrices
over_layers         on TPUs a loop over the layers of a stack, or several layers at a time
on_whole_matrices   products of a matrix with itself, on devices that hold the whole matrix
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import (
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
)
from jaxtyping import Array, PyTree

from ..tree.leaf_spec import LeafSpec
from ..util.control_flow import by_platform
from .partitioning import (
    LeafPartition,
    all_mesh_axes,
    are_auto,
    axis_entries,
    merged_entry,
    mesh_axes,
    place,
    shards,
    trim_partition,
)
from .tpu_layouts import in_stored_layout


LEAST_LAYER = 2**16  # numbers of a matrix; a TPU reads them in the time of an iteration, roughly


def batch_partition(spec: LeafSpec, leaf: LeafPartition) -> PartitionSpec:
    """The partition of the batch axes of a leaf; P() if they are not sharded."""
    entries = axis_entries(spec, leaf.partition)
    return trim_partition([entries[axis] for axis in spec.batch])


def over_shards(
    f: Callable[..., PyTree],
    spec: LeafSpec,
    leaf: LeafPartition,
    G: Array,
    inputs: PyTree,
    state: PyTree,
) -> PyTree:
    """`f(spec, G, inputs, state)`, on each device with its own matrices if batch axes are sharded.

    Without `shard_map`, a loop over the matrices of a sharded stack would gather the whole stack to
    slice one matrix out.

    Args:
      f: a function of a LeafSpec and arrays, which returns the new `state`.
      spec: of the leaf.
      leaf: the partition of the gradient.
      G: the gradient, in the leaf's shape.
      inputs: arrays whose batch axes come first, not returned.
      state: arrays whose batch axes come first, returned.
    """
    batch = batch_partition(spec, leaf)
    if not batch:
        return f(spec, G, inputs, state)
    entries = axis_entries(spec, leaf.partition)
    context = get_abstract_mesh()
    mesh = leaf.mesh if context.empty else context
    local_sizes = [
        size
        // math.prod(mesh.shape[name] for name in mesh_axes(entries[axis]) if axis in spec.batch)
        for axis, size in enumerate(spec.sizes)
    ]
    local_spec = dataclasses.replace(spec, shape=tuple(local_sizes), split=())
    G_partition = PartitionSpec(*[e if a in spec.batch else None for a, e in enumerate(entries)])
    return jax.shard_map(
        functools.partial(f, local_spec),
        mesh=mesh,
        in_specs=(G_partition, batch, batch),
        out_specs=batch,
        axis_names={*all_mesh_axes(batch)},
        check_vma=False,
    )(G.reshape(spec.sizes), inputs, state)


def over_layers(
    f: Callable[..., Array],
    spec: LeafSpec,
    leaf: LeafPartition,
    *arrays: PyTree,
    full: Sequence[bool] = (),
    full_result: bool = False,
    at_once: int = 1,
    kept_in: Any = None,
) -> Array:
    """`f(spec, leaf, *arrays)`, an array whose batch axes come first; on TPUs layer by layer.

    For products of a stack that is sharded inside its matrices, or not at all. One for all layers
    takes XLA:TPU several times longer to compile than one for a layer in a loop, sums or gathers
    the operands of all layers at once, and may sum where the loop reduces and scatters
    (`docs/performance.md`). It is kept for small matrices, for which an iteration takes longer than
    the product, and on a mesh whose use by the leaf is unknown: it may divide the layers.

    Args:
      f: a function of the view of a stack or of a layer, its partition, and arrays.
      spec: of the leaf.
      leaf: the partition of the leaf.
      *arrays: trees of arrays whose batch axes come first, or of the leaf's shape.
      full: for each tree whether its arrays have the leaf's shape; by default none.
      full_result: whether the result is an (*batch, m, n), whose layers are then written in the
        leaf's order of axes.
      at_once: the number of layers in an iteration, at most that of all layers. Where it does not
        divide them, the last iteration repeats some of the one before.
      kept_in: the dtype in which the loop has the first array and the result; None for their own.
    """
    batched = functools.partial(f, spec, leaf)
    entries = axis_entries(spec, leaf.partition)
    mesh = jax.typeof(jax.tree.leaves(arrays)[0]).sharding.mesh
    known = leaf.mesh is not None or mesh.empty
    if not spec.batch or spec.m * spec.n < LEAST_LAYER or entries[spec.batch[0]] or not known:
        return batched(*arrays)
    axis = spec.batch[0]
    if at_once == 1:
        layers, entries = spec.layer, entries[:axis] + entries[axis + 1 :]
    else:
        sizes = [at_once if a == axis else size for a, size in enumerate(spec.sizes)]
        layers = dataclasses.replace(spec, shape=tuple(sizes), split=())
    layers_leaf = leaf._replace(partition=trim_partition(entries))

    def mapped(first, *others):
        arrays = (first if kept_in is None else first.astype(kept_in), *others)

        def take(x, i, full):
            x, at = (x.reshape(spec.sizes), axis) if full else (x, 0)
            part = lax.dynamic_slice_in_dim(x, i * at_once, at_once, at)
            return part.squeeze(at) if at_once == 1 else part

        def one(i):
            at_i = [
                jax.tree.map(functools.partial(take, i=i, full=is_full), tree)
                for tree, is_full in itertools.zip_longest(arrays, full, fillvalue=False)
            ]
            result = f(layers, layers_leaf, *at_i)
            return layers.from_view(result) if full_result else result

        place, number = axis if full_result else 0, spec.sizes[axis]
        stack = lax.map(one, jnp.arange(-(-number // at_once)))
        stack = stack if kept_in is None else stack.astype(first.dtype)
        stack = jnp.moveaxis(stack, 0, place)
        if at_once > 1:
            shape = [*stack.shape[:place], -1, *stack.shape[place + 2 :]]
            stack = _without_repeated(stack.reshape(shape), number, at_once, place)
        if not full_result:
            return stack
        return spec.to_view(in_stored_layout(stack.reshape(spec.shape), leaf.partition, leaf))

    return by_platform(*arrays, tpu=mapped, default=batched)


def _without_repeated(stack: Array, number: int, at_once: int, axis: int) -> Array:
    """`number` layers from slices of `at_once`, the last of which began at `number - at_once`."""
    repeated = stack.shape[axis] - number
    if not repeated:
        return stack
    before = number // at_once * at_once
    parts = jnp.split(stack, [before, before + repeated], axis)
    return jnp.concatenate([parts[0], parts[2]], axis)


def on_whole_matrices(
    f: Callable[..., Array],
    spec: LeafSpec,
    leaf: LeafPartition,
    x: Array,
    *args: Any,
    kept_in: Any = None,
) -> Array:
    """`f(x, *args)` for the matrices of a leaf, (*batch, m, n), each matrix whole on some device.

    For products of a matrix with itself, each of which would gather the shards. The matrices of a
    stack are distributed over the devices that share each of them, on TPUs one layer a device at a
    time, the last ones together with earlier ones where the number is not divisible. Elsewhere each
    of these devices then computes all matrices.

    Args:
      kept_in: on TPUs, the dtype in which x and the result are stored and exchanged; None for their
        own.
    """
    context = get_abstract_mesh()
    mesh = context if isinstance(x, jax.core.Tracer) and not context.empty else leaf.mesh
    entries = axis_entries(spec, leaf.partition)
    sides = [merged_entry(spec, axes, entries) for axes in (spec.rows, spec.cols)]
    batch = [[*mesh_axes(entries[axis])] for axis in spec.batch]
    shared = all_mesh_axes(sides)
    wide = x.dtype
    of_whole = lambda x, *args: f(x.astype(wide), *args).astype(x.dtype)
    loop = functools.partial(over_layers, full_result=True, kept_in=kept_in)
    if mesh is None or not shared:
        return loop(lambda spec, leaf, *args: of_whole(*args), spec, leaf, x, *args)
    if not are_auto(mesh, [*itertools.chain(*batch), *shared]):
        return f(x, *args)
    before = [entries[axis] for axis in spec.batch]

    def after(sizes):
        """The mesh axes that divide batch axes of these sizes, the leaf's last ones."""
        divided = [[*names] for names in batch[len(batch) - len(sizes) :]]
        for name in shared:
            for names, size in zip(divided, sizes, strict=True):
                if size % shards((*names, name), mesh) == 0:
                    names.append(name)
                    break
        return divided

    def of_layers(view, leaf, x, *args):
        del leaf
        names = after(view.batch_shape)
        whole = NamedSharding(mesh, trim_partition([tuple(n) or None for n in names]))
        layers = before[len(before) - len(names) :]
        sharding = NamedSharding(mesh, PartitionSpec(*layers, *sides))
        # Without the first one XLA:TPU gathers each matrix of x, on 8 chips 8 times the bytes.
        x = place(place(x, sharding), whole)
        return place(place(of_whole(x, *args), whole), sharding)

    at_once = 1
    if batch:  # one layer on each device
        divided = after(spec.batch_shape)
        other = [name for name in shared if name not in itertools.chain(*divided)]
        most = shards((*divided[0], *other), mesh)
        number = most if most <= spec.batch_shape[0] else shards(divided[0], mesh)
        at_once = number // shards(mesh_axes(before[0]), mesh)
    return loop(of_layers, spec, leaf, x, *args, at_once=at_once)
