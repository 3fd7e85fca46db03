"""Samples text from a Llama with a sliding window, recomputing all logits for each token."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from examples.common import llama


@partial(jax.jit, static_argnames=("config", "temperature"))
def draw(
    config: llama.LlamaConfig,
    params: Any,
    window: Int[Array, " window"],
    known: Int[Array, ""],
    keys: Key[Array, " count"],
    temperature: float,
) -> Int[Array, " count"]:
    """Draws one token per key from softmax(logits / temperature) given the window.

    The first `known` tokens of the window are valid. A new token is appended; a full window drops
    its oldest token. The model is causal, so entries after the valid ones have no effect.
    """
    model = nnx.merge(llama.structure(config), params)

    def step(carry, key):
        window, known = carry
        logits = model(window[None])[0, known - 1].astype(jnp.float32)
        token = jax.random.categorical(key, logits / temperature)
        window = jnp.where(known == window.size, jnp.roll(window, -1), window)
        known = jnp.minimum(known + 1, window.size)
        return (window.at[known - 1].set(token), known), token

    return jax.lax.scan(step, (window, known), keys)[1]


def generate(
    config: llama.LlamaConfig,
    params: Any,
    prompt: Sequence[int],
    *,
    count: int,
    length: int,
    seed: int,
    temperature: float = 0.8,
) -> list[int]:
    """Samples `count` tokens after `prompt`, each from at most `length` previous tokens."""
    given = prompt[-length:]
    window = np.zeros(length, np.int32)
    window[: len(given)] = list(given)
    keys = jax.random.split(jax.random.key(seed), count)
    tokens = draw(config, params, window, np.int32(len(given)), keys, temperature)
    return np.asarray(tokens).tolist()


def printable(text: bytes) -> str:
    """Decodes UTF-8; invalid bytes and control characters become escapes.

    Example:
        >>> print(printable(b"caf\\xc3\\xa9 \\xff \\x1b[2J"))
        café \\xff \\x1b[2J
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
        for c in text.decode("utf-8", errors="backslashreplace")
    )
