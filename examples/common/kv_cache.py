"""Key-value cache for a Llama: logits of new tokens without recomputing the previous ones.

    cache = empty(config, batch, length)
    logits, cache = extend(model, tokens, cache, start)     tokens at positions start, start + 1, …

The logits equal those of `model(all tokens so far)` at the new positions, up to rounding.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from examples.common import llama


class KVCache(NamedTuple):
    """Keys and values of the previous tokens, for all layers (leading axis) or for one layer.

    Attributes:
        keys: after the rotary embedding; zero at unused positions.
        values: zero at unused positions.
    """

    keys: Float[Array, "*layers batch length kv_heads head_dim"]
    values: Float[Array, "*layers batch length kv_heads head_dim"]


def empty(config: llama.LlamaConfig, batch: int, length: int) -> KVCache:
    """A cache of zeros for `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads or config.heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def attend(
    attention: llama.Attention,
    x: Float[Array, "batch new hidden"],
    cache: KVCache,
    start: Int[Array, ""],
) -> tuple[Float[Array, "batch new hidden"], KVCache]:
    """`attention(x)` for positions `start` onwards, and the cache with their keys and values."""
    query, key, value = attention.heads(x)
    length, new = cache.keys.shape[1], x.shape[1]
    angles = jax.lax.dynamic_slice_in_dim(attention.angles(length), start, new)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    cache = KVCache(put(cache.keys, llama.rotate(key, angles)), put(cache.values, value))
    visible = jnp.arange(length)[None] <= start + jnp.arange(new)[:, None]
    mixed = jax.nn.dot_product_attention(
        llama.rotate(query, angles), cache.keys, cache.values, mask=visible[None, None]
    )
    return attention.out(mixed.reshape(x.shape)), cache


def extend_layer(
    layer: llama.Layer, x: Float[Array, "batch new hidden"], cache: KVCache, start: Int[Array, ""]
) -> tuple[Float[Array, "batch new hidden"], KVCache]:
    """`layer(x)` for positions `start` onwards, and the layer's updated cache."""
    mixed, cache = attend(layer.attention, layer.attention_norm(x), cache, start)
    x = x + mixed
    return x + layer.mlp(layer.mlp_norm(x)), cache


def extend(
    model: llama.Llama, tokens: Int[Array, "batch new"], cache: KVCache, start: Int[Array, ""]
) -> tuple[Float[Array, "batch new vocabulary"], KVCache]:
    """Logits of the tokens at positions `start` onwards, and the updated cache.

    The caller must keep `start + new` within the cache's `length`; this is not checked.
    """
    x = model.embed(tokens)
    if model.config.scan:

        def apply(structure, x, layer):
            weights, cache = layer
            return extend_layer(nnx.merge(structure, weights), x, cache, start)

        caches, depth = [], model.config.layers // model.config.stacks
        for i, stack in enumerate(model.stacks()):
            structure, weights = nnx.split(stack)
            of_stack = jax.tree.map(lambda x, i=i: x[i * depth : (i + 1) * depth], cache)
            x, of_stack = jax.lax.scan(partial(apply, structure), x, (weights, of_stack))
            caches.append(of_stack)
        cache = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *caches)
    else:
        caches = []
        for i, layer in enumerate(model.layers):
            x, of_layer = extend_layer(layer, x, KVCache(cache.keys[i], cache.values[i]), start)
            caches.append(of_layer)
        cache = jax.tree.map(lambda *layers: jnp.stack(layers), *caches)
    return model.logits(x), cache
