"""Llama in Flax NNX, in the sizes of the GaLore papers.

    x = embed(tokens)
    for each layer:
        x = x + attention(rms_norm(x))      causal, rotary position embeddings
        x = x + mlp(rms_norm(x))            down(silu(gate(x)) * up(x))
    logits = head(rms_norm(x))

No biases, and every weight of a layer is one matrix; the head is a matrix of its own, or `tied` to
the embedding. With `scan=True` the layers are one stack of weights (layers, m, n) with one compiled
body, so compile time does not grow with depth; the function is the same. `stacks=4` splits the
layers into four stacks, which limits the temporary arrays of the optimizer to a quarter of the
layers. `hugging_face.py` reads and writes Hugging Face's Llamas.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama and options of its computation.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width inside the gated MLP.
        heads: attention heads; `hidden / heads` must be even, for the rotary embedding.
        layers: depth.
        vocabulary: number of tokens.
        scan: stack the layers and scan over them, instead of unrolling them.
        stacks: number of stacks of equally many layers, with `scan`.
        remat: recompute each layer in the backward pass instead of storing its activations.
        dtype: dtype of activations and matmuls.
        param_dtype: dtype of weights.
        attention: implementation in `jax.nn.dot_product_attention`: `"xla"` or `"cudnn"` (NVIDIA
            GPUs, bfloat16 only; on one H100 a training step of Llama 33m took 18 ms instead of 34).
        activations: sharding of the embedded tokens, from which the compiler infers the other
            activations; None: the compiler infers all.
        kv_heads: heads of keys and values, each shared by `heads / kv_heads` queries (grouped-query
            attention, arXiv 2305.13245); None: one per query head.
        theta: base of the rotary frequencies.
        epsilon: added to the mean square in the norms.
        tied: the head is the transposed embedding.
    """

    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocabulary: int = 32_000
    scan: bool = False
    stacks: int = 1
    remat: bool = False
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    attention: Literal["xla", "cudnn"] = "xla"
    activations: jax.sharding.NamedSharding | None = None
    kv_heads: int | None = None
    theta: float = 10_000.0
    epsilon: float = 1e-6
    tied: bool = False

    def __post_init__(self):
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden must be a multiple of 2 * heads, got {self.hidden} and {self.heads} heads"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.kv_heads}")
        if self.layers % self.stacks:
            raise ValueError(f"layers must be a multiple of stacks, got {self.stacks}")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def key_width(self) -> int:
        return self.head_dim * (self.kv_heads or self.heads)


CONFIGS = {
    "tiny": LlamaConfig(128, 344, heads=4, layers=4, vocabulary=256),
    "60m": LlamaConfig(512, 1376, heads=8, layers=8),
    "130m": LlamaConfig(768, 2048, heads=12, layers=12),
    "350m": LlamaConfig(1024, 2736, heads=16, layers=24),
    "1b": LlamaConfig(2048, 5461, heads=32, layers=24),
    "7b": LlamaConfig(4096, 11008, heads=32, layers=32),
    "tinyllama": LlamaConfig(2048, 5632, heads=32, layers=22, kv_heads=4, epsilon=1e-5),
}


def linear(config: LlamaConfig, m: int, n: int, stddev: float, rngs: nnx.Rngs) -> nnx.Linear:
    """x ↦ x W without bias; W (m, n) is normally distributed."""
    return nnx.Linear(
        m,
        n,
        use_bias=False,
        kernel_init=nnx.initializers.normal(stddev),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden,
        epsilon=config.epsilon,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def inner_stddev(config: LlamaConfig) -> float:
    """Standard deviation of the matrices that read the residual stream (arXiv 1910.05895)."""
    return math.sqrt(2 / (5 * config.hidden))


def outer_stddev(config: LlamaConfig) -> float:
    """Standard deviation of the matrices that write to it, scaled for 2 * layers summands."""
    return inner_stddev(config) / math.sqrt(2 * config.layers)


def rotary_angles(
    length: int, head_dim: int, theta: float = 10_000.0
) -> Float[Array, "length half"]:
    """Angle of each position and frequency i: position / theta^(2 i / head_dim)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return jnp.outer(jnp.arange(length, dtype=jnp.float32), frequencies)


def rotate(
    x: Float[Array, "batch length heads head_dim"], angles: Float[Array, "length half"]
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (x_i, x_{i + half}) by their angle, in float32.

    The inner product of a rotated query and key depends only on the distance of their positions
    (arXiv 2104.09864).
    """
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal multi-head attention; query and out are (hidden, hidden)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        inner = partial(linear, config, config.hidden, stddev=inner_stddev(config), rngs=rngs)
        self.query = inner(config.hidden)
        self.key = inner(config.key_width)
        self.value = inner(config.key_width)
        self.out = linear(config, config.hidden, config.hidden, outer_stddev(config), rngs)

    def heads(self, x: Float[Array, "batch length hidden"]) -> list[Array]:
        """Queries, keys and values, (batch, length, heads, head_dim) each."""
        split = (*x.shape[:2], -1, self.config.head_dim)
        return [f(x).reshape(split) for f in (self.query, self.key, self.value)]

    def angles(self, length: int) -> Float[Array, "length half"]:
        return rotary_angles(length, self.config.head_dim, self.config.theta)

    def __call__(
        self, x: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length hidden"]:
        query, key, value = self.heads(x)
        angles = self.angles(x.shape[1])
        mixed = jax.nn.dot_product_attention(
            rotate(query, angles),
            rotate(key, angles),
            value,
            is_causal=True,
            implementation=self.config.attention,
        )
        return self.out(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """The gated MLP of Llama (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        m, n = config.hidden, config.intermediate
        self.gate = linear(config, m, n, inner_stddev(config), rngs)
        self.up = linear(config, m, n, inner_stddev(config), rngs)
        self.down = linear(config, n, m, outer_stddev(config), rngs)

    def __call__(
        self, x: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length hidden"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One layer: attention and MLP, both with pre-normalisation and a residual connection."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length hidden"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """The model: tokens ↦ logits of the next token."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocabulary,
            config.hidden,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        make_layer = partial(Layer, config)
        make_stack = lambda: nnx.vmap(make_layer)(rngs.split(config.layers // config.stacks))
        if config.scan and config.stacks > 1:
            self.layers = nnx.List([make_stack() for _ in range(config.stacks)])
        elif config.scan:
            self.layers = make_stack()
        else:
            self.layers = nnx.List([make_layer(rngs) for _ in range(config.layers)])
        self.norm = rms_norm(config, rngs)
        if not config.tied:
            # Logits of size 1/sqrt(hidden): the initial loss is ln(vocabulary) at any width.
            self.head = linear(config, config.hidden, config.vocabulary, 1 / config.hidden, rngs)

    def __call__(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length vocabulary"]:
        def apply(structure, x, weights):
            return nnx.merge(structure, weights)(x), None

        if self.config.remat:
            apply = jax.checkpoint(apply, static_argnums=0)

        x = self.embed(tokens)
        if self.config.activations is not None:
            x = jax.lax.with_sharding_constraint(x, self.config.activations)
        if self.config.scan:
            for stack in self.stacks():
                structure, weights = nnx.split(stack)
                x, _ = jax.lax.scan(partial(apply, structure), x, weights)
        else:
            for layer in self.layers:
                structure, weights = nnx.split(layer)
                x, _ = apply(structure, x, weights)
        return self.logits(x)

    def logits(
        self, x: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length vocabulary"]:
        """Logits from the output of the last layer."""
        x = self.norm(x)
        return self.embed.attend(x) if self.config.tied else self.head(x)

    def stacks(self) -> list[Layer]:
        """The stacks of layers to scan over."""
        return [self.layers] if self.config.stacks == 1 else [*self.layers]


def next_token_loss(model: Llama, tokens: Int[Array, "batch length"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of each token, except the first, given the previous ones."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(log_likelihood)


def structure(config: LlamaConfig) -> nnx.GraphDef:
    """Graph definition of the model, for `nnx.merge` with its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))[0]


def abstract_params(config: LlamaConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters as a nested dict; allocates no arrays."""
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def galore_dimension_numbers(params: dict[str, Any]) -> dict[str, Any]:
    """Dimension numbers for Optax's own GaLore: the same matrices that natgalore projects."""
    matrix = optax.contrib.GaLoreDimensionNumbers()
    return jax.tree.map_with_path(
        lambda path, w: matrix if path[0].key == "layers" and w.ndim == 2 else None, params
    )


def muon_dimension_numbers(params: dict[str, Any]) -> dict[str, Any]:
    """Dimension numbers for Optax's Muon: the matrices that natgalore projects, also stacked."""

    def of(path, w):
        is_matrix = path[0].key == "layers" and path[-1].key == "kernel"
        return optax.contrib.MuonDimensionNumbers(w.ndim - 2, w.ndim - 1) if is_matrix else None

    return jax.tree.map_with_path(of, params)
