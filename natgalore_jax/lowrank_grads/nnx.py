"""`value_and_grad` for modules of Flax NNX and `nnx.Optimizer`. Flax is needed here alone.

A pass of the loss is a function of arrays: params, and beside them all other state of the module
(statistics, random streams), which every pass of a step starts from and returns as it left it. The
state that the last of them returns is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from ..tree.leaf_spec import is_core
from . import value_and_grad as gradients


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    micro_batches: int = 1,
    refresh: str = "auto",
    on_fallback: str = "warn",
) -> Callable[..., Any]:
    """`nnx.value_and_grad`, of which the gradients of projected params are cores.

    Where matrices are due for new bases these are stored in `optimizer.opt_state`. Whatever the
    loss changes in the module beside its params is changed once, as `nnx.value_and_grad` does it,
    though a refresh takes several passes.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs)`, a real number, or that and arrays if `has_aux`.
      has_aux: whether it returns a pair.
      micro_batches: see :func:`natgalore_jax.value_and_grad`. Each starts from the state of the
        module as it is, with random streams of its own, as `nnx.split_rngs` makes them. Afterwards
        floating-point state is the mean of theirs, any other that of the last.
      refresh: see there.
      on_fallback: see there.

    Returns:
      A function `(model, optimizer, *args, **kwargs) -> loss, grads`, or `(loss, aux), grads`, with
      an `nnx.Optimizer`, to whose `update(model, grads)` they go. `grads` is a State as that of
      `nnx.grad`, by the `wrt` of the optimizer, with a Core in the Variable of a projected param.

    Raises:
      TypeError: when called, if the second argument is no `nnx.Optimizer`.
      ValueError: as :func:`natgalore_jax.value_and_grad`; or if the loss adds to the module, takes
        something from it, or changes what is no array.

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
        wrt, several = optimizer.wrt, micro_batches > 1
        graph, params, streams, rest = nnx.split(model, wrt, nnx.RngState, ...)
        streams, rest = nnx.as_pure(streams), nnx.as_pure(rest)

        def loss(pure, *args, **kwargs):
            own, *args = args if several else (streams, *args)
            inside = nnx.merge(graph, pure, own, rest)
            out = loss_fn(inside, *args, **kwargs)
            value, aux = out if has_aux else (out, None)
            after, _, *others = nnx.split(inside, wrt, nnx.RngState, ...)
            if after != graph:
                raise ValueError(
                    "the loss changes what the module is made of: what is new it "
                    "can return as `aux`."
                )
            return value, (aux, *map(nnx.as_pure, others))

        of = gradients.value_and_grad(
            loss,
            optimizer.tx,
            has_aux=True,
            micro_batches=micro_batches,
            refresh=refresh,
            on_fallback=on_fallback,
        )
        if several:
            streams, each = _split(streams, micro_batches)
            args = (each, *args)
        opt_state = nnx.as_pure(optimizer.opt_state)
        ((value, (aux, drawn, rest)), grads), opt_state = of(
            nnx.as_pure(params), opt_state, *args, **kwargs
        )
        if several:
            drawn, rest = streams, jax.tree.map(_mean_or_last, rest)
        nnx.update(optimizer.opt_state, nnx.state(opt_state))
        nnx.update(model, drawn, rest)
        return (value, aux) if has_aux else value, _boxed(grads, params)

    return fn


def _split(streams: PyTree, number: int) -> tuple[PyTree, PyTree]:
    """Random streams after one more key of each, and those that this key is split into.

    As `nnx.split_rngs`, but of the streams of stacked layers too.
    """
    after, each = dict(nnx.to_flat_state(streams)), {}
    for path in [path for path in after if path[-1] == "key"]:
        key, at = after[path], (*path[:-1], "count")
        drawn = jax.vmap(jax.random.fold_in)(key.ravel(), after[at].ravel())
        split = jax.vmap(lambda key: jax.random.split(key, number), out_axes=1)(drawn)
        each[path] = split.reshape(number, *key.shape)
        each[at] = jnp.zeros((number, *key.shape), after[at].dtype)
        after[at] = after[at] + 1
    return nnx.from_flat_state(after), nnx.from_flat_state(each)


def _mean_or_last(x: jax.Array) -> jax.Array:
    """Of what micro-batches left, on the leading axis; what none has changed is as it was."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[-1]
    mean = x.mean(axis=0, dtype=jnp.float32).astype(x.dtype)
    return jnp.where((x == x[:1]).all(axis=0), x[0], mean)


def _boxed(grads: PyTree, params: PyTree) -> PyTree:
    """Gradients in Variables as those of the params; a Core's has no metadata, which is W's."""
    put = lambda w, G: type(w)(G) if is_core(G) else w.replace(G)
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(put, params, grads, is_leaf=is_variable)
