"""A Llama that remembers: the logits of new tokens from the keys and values of those before.

    past = empty(config, batch, length)
    logits, past = extend(model, tokens, past, start)       tokens of positions start, start + 1, …

The logits are those of `model(all tokens so far)` at the new positions, for the work of these.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from examples.common import llama


class Past(NamedTuple):
    """Keys and values of the tokens so far, of all layers, or of one without the first axis.

    Attributes:
        keys: rotated; what is not there yet is zero.
        values: likewise.
    """

    keys: Float[Array, "*layers batch length kv_heads head_dim"]
    values: Float[Array, "*layers batch length kv_heads head_dim"]


def empty(config: llama.LlamaConfig, batch: int, length: int) -> Past:
    """What `extend` begins with, with room for `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads or config.heads, config.head_dim)
    return Past(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def attend(
    attention: llama.Attention,
    x: Float[Array, "batch new hidden"],
    past: Past,
    start: Int[Array, ""],
) -> tuple[Float[Array, "batch new hidden"], Past]:
    """`attention(x)` for the positions from `start` on, and the past with them in it."""
    query, key, value = attention.heads(x)
    length, new = past.keys.shape[1], x.shape[1]
    angles = jax.lax.dynamic_slice_in_dim(attention.angles(length), start, new)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    past = Past(put(past.keys, llama.rotate(key, angles)), put(past.values, value))
    seen = jnp.arange(length)[None] <= start + jnp.arange(new)[:, None]
    mixed = jax.nn.dot_product_attention(
        llama.rotate(query, angles), past.keys, past.values, mask=seen[None, None]
    )
    return attention.out(mixed.reshape(x.shape)), past


def extend_layer(
    layer: llama.Layer, x: Float[Array, "batch new hidden"], past: Past, start: Int[Array, ""]
) -> tuple[Float[Array, "batch new hidden"], Past]:
    mixed, past = attend(layer.attention, layer.attention_norm(x), past, start)
    x = x + mixed
    return x + layer.mlp(layer.mlp_norm(x)), past


def extend(
    model: llama.Llama, tokens: Int[Array, "batch new"], past: Past, start: Int[Array, ""]
) -> tuple[Float[Array, "batch new vocabulary"], Past]:
    """The logits of the tokens of positions from `start` on, and the past with them in it.

    Positions from the past's `length` on are the caller's to avoid: there is no room for them.
    """
    x = model.embed(tokens)
    if model.config.scan:

        def apply(structure, x, layer):
            weights, past = layer
            return extend_layer(nnx.merge(structure, weights), x, past, start)

        pasts, each = [], model.config.layers // model.config.stacks
        for i, stack in enumerate(model.stacks()):
            structure, weights = nnx.split(stack)
            its = jax.tree.map(lambda one, i=i: one[i * each : (i + 1) * each], past)
            x, its = jax.lax.scan(partial(apply, structure), x, (weights, its))
            pasts.append(its)
        past = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *pasts)
    else:
        pasts = []
        for i, layer in enumerate(model.layers):
            x, one = extend_layer(layer, x, Past(past.keys[i], past.values[i]), start)
            pasts.append(one)
        past = jax.tree.map(lambda *layers: jnp.stack(layers), *pasts)
    return model.head(model.norm(x)), past
