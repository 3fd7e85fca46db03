"""A loss and its gradients, with cores in place of whole gradients, as a function of the bases."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core
from jax.sharding import AxisType
from jaxtyping import Array, PyTree

from ..sharding.shard_map import varying_as
from ..subspace.projection import core_dtype, expand_bases, working_dtype
from ..subspace.state import Bases
from ..tree.cores import Core
from ..tree.flax_boxes import rebox, unbox
from .interpreter import Use, as_arrays, evaluate
from .tangent_weight import TangentWeight, tag


Result = tuple[tuple[Any, Any], PyTree]  # (value, aux), gradients


def backward(
    loss_fn: Callable[..., Any],
    params: PyTree,
    has_aux: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    micro_batches: int = 1,
) -> tuple[Callable[..., Result], dict[tuple[str, str], None]]:
    """A pass of the loss as a function of the bases, whose gradients are cores on them.

    Args:
      loss_fn, params, has_aux, args, kwargs: of the loss.
      micro_batches: see :func:`mean`.

    Returns:
      A function (bases, iteration) -> ((value, aux), gradients), where `iteration` is the index of
      a loop around it, or None; and the uses that fell back to whole gradients, as a dict without
      values in order, which is filled when the function is traced.
    """
    paths, weights = zip(*jax.tree_util.tree_leaves_with_path(unbox(params)), strict=True)
    split = tuple(args) if micro_batches > 1 else ()
    program, shapes = program_of(loss_fn, params, args, kwargs, split)
    fallbacks: dict[tuple[str, str], None] = {}

    def report(use: Use):
        if use.fell_back:
            fallbacks.setdefault((use.operation, use.weight.name))

    def run(bases: Bases, iteration: Any = None) -> Result:
        # In a loop, a pass is tied to the iteration: the compiler would hoist what does not depend
        # on the bases, such as the head's products, onto steps without an iteration.
        tied = weights if iteration is None else lax.optimization_barrier((weights, iteration))[0]

        def zero_core(path, w):
            if path not in bases:
                return w
            P = bases[path][0]
            return varying_as(jnp.zeros(P.spec.core_shape, core_dtype(P.value, w)), w)

        def tagged(path, w, core):
            if path not in bases:
                return core
            spec, stored = bases[path][0].spec, tuple(P.value for P in bases[path])
            return tag(spec, w, core, *expand_bases(spec.unnamed, core.dtype, stored))

        def loss(differentiated: list[Array], micro_batch: PyTree):
            values = [*map(tagged, paths, tied, differentiated), *jax.tree.leaves(micro_batch)]
            outputs = evaluate(program, values, report)
            outputs[:1] = as_arrays(outputs[:1], None, report)
            outputs = [x.weight if isinstance(x, TangentWeight) else x for x in outputs]
            value = jax.tree.structure(shapes).unflatten(outputs)
            return value if has_aux else (value, None)

        differentiated = list(map(zero_core, paths, tied))
        pass_of = lambda part: jax.value_and_grad(loss, has_aux=True)(differentiated, part)
        value, grads = mean(pass_of, split, micro_batches)
        node = lambda path, x: Core(x, bases[path][0].spec) if path in bases else x
        by_path = {path: node(path, x) for path, x in zip(paths, grads, strict=True)}
        return value, like_params(params, by_path)

    return run, fallbacks


def program_of(
    loss_fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    split: tuple[Any, ...] = (),
) -> tuple[jax_core.ClosedJaxpr, PyTree]:
    """The program of a loss, and the form of its outputs.

    Its inputs are the leaves of `params`, and of one micro-batch of `split` where there are any.
    """
    treedef = jax.tree.structure(unbox(params))

    def of_leaves(leaves, part):
        return loss_fn(rebox(treedef.unflatten(leaves), params), *(part or args), **kwargs)

    part = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], split))
    return jax.make_jaxpr(of_leaves, return_shape=True)(jax.tree.leaves(unbox(params)), part)


def mean(f: Callable[[PyTree], Result], parts: PyTree, number: int) -> Result:
    """The mean of values and gradients over micro-batches, summed in float32 at least.

    Args:
      f: of a micro-batch.
      parts: arrays with micro-batches on their leading axes; the micro-batch itself if it is one.
      number: of micro-batches.

    Returns:
      As `f` does; auxiliary outputs have a leading axis of micro-batches, if there are several.
    """
    if number == 1:
        return f(parts)
    (value, _), grads = jax.eval_shape(lambda: f(jax.tree.map(lambda x: x[0], parts)))
    start = jax.tree.map(lambda x: zeros_of(x.update(dtype=working_dtype(x))), (value, grads))

    def add(total, part):
        (value, aux), grads = f(part)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (value, grads)), aux

    total, aux = lax.scan(add, start, parts)
    mean = lambda t, x: (t / number).astype(x.dtype)
    value, grads = jax.tree.map(mean, total, (value, grads))
    return (value, aux), grads


def zeros_of(x: jax.ShapeDtypeStruct) -> Any:
    """Zeros of the type of x."""
    explicit = x.sharding is not None and AxisType.Explicit in x.sharding.mesh.axis_types
    return varying_as(lax.full_like(x, 0, sharding=x.sharding if explicit else None), x)


def like_params(params: PyTree, values: dict[tuple[Any, ...], Any]) -> PyTree:
    """Values by path in the structure of `params`, in its boxes; Cores without boxes."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(unbox(params))
    return rebox(treedef.unflatten([values[path] for path, _ in flat]), params)
