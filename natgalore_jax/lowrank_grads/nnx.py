"""`value_and_grad` for Flax NNX modules and `nnx.Optimizer`. The only module that imports Flax.

The loss becomes a pure function of the params and of the module's other state (statistics, random
streams). Every pass of a step starts from the same other state and returns the changed one; the
module receives the one of the last pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from ..tree.cores import is_core
from .value_and_grad import value_and_grad as pure_value_and_grad


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    micro_batches: int = 1,
    refresh: str = "auto",
    on_fallback: str = "warn",
) -> Callable[..., Any]:
    """`nnx.value_and_grad` whose gradients of projected params are cores.

    New bases are stored in `optimizer.opt_state` on steps where a refresh is due. The module's
    other state advances once per step, as under `nnx.value_and_grad`, although a refresh takes
    several passes.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs)`, which returns a real number, or that and a tree of
        arrays if `has_aux`.
      has_aux: whether `loss_fn` returns a pair.
      micro_batches: see :func:`natgalore_jax.value_and_grad`. Each micro-batch starts from the
        module's state, with random streams of its own as from `nnx.split_rngs`. Afterwards
        floating-point state is the mean over micro-batches, any other state that of the last.
      refresh: see :func:`natgalore_jax.value_and_grad`.
      on_fallback: see :func:`natgalore_jax.value_and_grad`.

    Returns:
      A function `(model, optimizer, *args, **kwargs) -> loss, grads`, or `(loss, aux), grads`, for
      an `nnx.Optimizer`; pass `grads` to `optimizer.update(model, grads)`. `grads` is a State as
      from `nnx.grad` for the optimizer's `wrt`, with a Core in the Variable of a projected param.

    Raises:
      TypeError: when called, if the second argument is not an `nnx.Optimizer`.
      ValueError: as :func:`natgalore_jax.value_and_grad`; or if the loss changes the structure of
        the module or a static attribute.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore
      >>> from flax import nnx
      >>> model = nnx.Linear(16, 64, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, natgalore.galore(1e-3, rank=8), wrt=nnx.Param)
      >>> gradients = natgalore.nnx.value_and_grad(lambda model, x: jnp.sum(model(x) ** 2))
      >>> loss, grads = nnx.jit(gradients)(model, optimizer, jnp.ones((4, 16)))
      >>> grads["kernel"].get_value().value.shape, grads["bias"].shape
      ((8, 64), (64,))
      >>> updates = optimizer.update(model, grads)
    """

    def fn(model: Any, optimizer: Any, *args: Any, **kwargs: Any):
        if not isinstance(optimizer, nnx.Optimizer):
            raise TypeError(
                "arguments are (model, optimizer, *args): the second must be an nnx.Optimizer, got "
                f"{type(optimizer).__name__}."
            )
        graph, params, streams, rest = nnx.split(model, optimizer.wrt, nnx.RngState, ...)
        streams, rest = nnx.as_pure(streams), nnx.as_pure(rest)
        split = micro_batches > 1

        def pure_loss(params, *args, **kwargs):
            own_streams, *args = args if split else (streams, *args)
            merged = nnx.merge(graph, params, own_streams, rest)
            output = loss_fn(merged, *args, **kwargs)
            value, aux = output if has_aux else (output, None)
            new_graph, _, *new_state = nnx.split(merged, optimizer.wrt, nnx.RngState, ...)
            if new_graph != graph:
                raise ValueError(
                    "the loss changes the structure of the module: return new values as `aux`."
                )
            return value, (aux, *map(nnx.as_pure, new_state))

        gradients = pure_value_and_grad(
            pure_loss,
            optimizer.tx,
            has_aux=True,
            micro_batches=micro_batches,
            refresh=refresh,
            on_fallback=on_fallback,
        )
        if split:
            streams, streams_of_each = _split_streams(streams, micro_batches)
            args = (streams_of_each, *args)
        opt_state = nnx.as_pure(optimizer.opt_state)
        ((value, (aux, new_streams, rest)), grads), opt_state = gradients(
            nnx.as_pure(params), opt_state, *args, **kwargs
        )
        if split:
            new_streams, rest = streams, jax.tree.map(_mean_or_last, rest)
        nnx.update(optimizer.opt_state, nnx.state(opt_state))
        nnx.update(model, new_streams, rest)
        return (value, aux) if has_aux else value, _in_variables(grads, params)

    return fn


def _split_streams(streams: PyTree, number: int) -> tuple[PyTree, PyTree]:
    """Draws a key from each random stream and splits it into `number` new streams.

    As `nnx.split_rngs`, also for the streams of stacked layers.

    Returns:
      The streams after the draw, and the new streams, stacked on a leading axis.
    """
    advanced, split = dict(nnx.to_flat_state(streams)), {}
    for path in [path for path in advanced if path[-1] == "key"]:
        key, count = advanced[path], (*path[:-1], "count")
        drawn = jax.vmap(jax.random.fold_in)(key.ravel(), advanced[count].ravel())
        keys = jax.vmap(lambda key: jax.random.split(key, number), out_axes=1)(drawn)
        split[path] = keys.reshape(number, *key.shape)
        split[count] = jnp.zeros((number, *key.shape), advanced[count].dtype)
        advanced[count] = advanced[count] + 1
    return nnx.from_flat_state(advanced), nnx.from_flat_state(split)


def _mean_or_last(x: jax.Array) -> jax.Array:
    """The mean over micro-batches, on the leading axis, of floating-point state; else the last.

    An entry that is equal in all micro-batches stays exact.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[-1]
    mean = x.mean(axis=0, dtype=jnp.float32).astype(x.dtype)
    return jnp.where((x == x[:1]).all(axis=0), x[0], mean)


def _in_variables(grads: PyTree, params: PyTree) -> PyTree:
    """Gradients in Variables of the params' types; a Core's carries none of W's metadata."""
    put = lambda w, G: type(w)(G) if is_core(G) else w.replace(G)
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(put, params, grads, is_leaf=is_variable)
