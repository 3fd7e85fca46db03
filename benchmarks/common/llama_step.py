"""The training step whose memory the benchmarks measure."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

import natgalore_jax as natgalore
from examples.common import llama


def llama_step(
    tx: optax.GradientTransformation, config: llama.LlamaConfig, low_rank_gradients: bool
) -> Callable[..., Any]:
    """(params, state, tokens, **extra_args) -> (params, state, loss) of a Llama.

    The extra arguments are those of `tx.update`.

    Args:
      tx: the optimizer.
      config: of the model.
      low_rank_gradients: whether gradients of projected weights are cores.
    """
    structure = llama.structure(config)

    def loss_fn(params, tokens):
        return llama.next_token_loss(nnx.merge(structure, params), tokens)

    if low_rank_gradients:
        gradients = natgalore.value_and_grad(loss_fn, tx, on_fallback="error")
    else:
        gradients = lambda params, state, tokens: (
            jax.value_and_grad(loss_fn)(params, tokens),
            state,
        )

    def step(params, state, tokens, **extra_args):
        (loss, grads), state = gradients(params, state, tokens)
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, loss

    return step
