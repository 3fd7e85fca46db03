"""RoBERTa (arXiv 1907.11692) in Flax NNX, with a classification head.

    x = norm(words[tokens] + positions[position] + kind)
    for each layer:
        x = norm(x + attention(x))           bidirectional; padding is masked
        x = norm(x + down(gelu(up(x))))      exact GELU (error function)
    logits = head(tanh(dense(x of the first token)))

The layers are one stack of weights, (layers, m, n) for a matrix: an optimizer updates one array for
each kind of weight. The scan over the stack is unrolled: a loop copies each layer's gradients into
the stack.

Positions start at `padding + 1`, and padding tokens have position `padding`: a table of 514
positions serves 512 tokens. Dropout is active only with `rngs`: on the embeddings, the attention
weights, the output of each attention and MLP block, and in the head.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class RobertaConfig:
    """Shape of a RoBERTa; defaults: RoBERTa-base.

    Attributes:
        kinds: rows of the table of token types.
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        heads: attention heads.
        layers: depth.
        vocabulary: number of tokens.
        positions: rows of the position table; tokens use all except the first `padding + 1`.
        labels: outputs of the head; 1 for regression.
        padding: index of the padding token.
        epsilon: added to the variance in the norms.
        dropout, attention_dropout, classifier_dropout: dropout rates in training.
        dtype: dtype of activations and matmuls; weights are always float32.
    """

    kinds: ClassVar[int] = 1

    hidden: int = 768
    intermediate: int = 3072
    heads: int = 12
    layers: int = 12
    vocabulary: int = 50_265
    positions: int = 514
    labels: int = 2
    padding: int = 1
    epsilon: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden must be a multiple of heads, got {self.hidden} and {self.heads} heads"
            )

    @property
    def longest(self) -> int:
        """Maximum number of tokens."""
        return self.positions - self.padding - 1

    def build(self, rngs: nnx.Rngs) -> "Roberta":
        """A randomly initialised model of this shape."""
        return Roberta(self, rngs)


def linear(config: RobertaConfig, m: int, n: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(m, n, kernel_init=init, dtype=config.dtype, rngs=rngs)


def embedding(config: RobertaConfig, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    # In float32; `norm` casts. The gradient of a row is a sum over its tokens, thousands for a
    # token type, which bfloat16 would round at every addition.
    init = nnx.initializers.normal(0.02)
    return nnx.Embed(rows, config.hidden, embedding_init=init, rngs=rngs)


def layer_norm(config: RobertaConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # use_fast_variance=False subtracts the mean first: E[x²] - E[x]² loses digits in float32.
    return nnx.LayerNorm(
        config.hidden,
        epsilon=config.epsilon,
        use_fast_variance=False,
        dtype=config.dtype,
        rngs=rngs,
    )


def drop(x: Array, share: float, rngs: nnx.Rngs | None) -> Array:
    """Dropout with rate `share`; the identity without `rngs`."""
    return nnx.Dropout(share)(x, deterministic=rngs is None, rngs=rngs)


def position_ids(tokens: Int[Array, "batch length"], padding: int) -> Int[Array, "batch length"]:
    """Positions padding + 1, padding + 2, … of the tokens; `padding` for padding tokens."""
    is_token = tokens != padding
    return jnp.where(is_token, padding + jnp.cumsum(is_token, axis=1), padding)


class Layer(nnx.Module):
    """One layer: attention and MLP, both with a residual connection and post-normalisation."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config
        square = partial(linear, config, config.hidden, config.hidden, rngs)
        self.query, self.key, self.value, self.out = square(), square(), square(), square()
        self.attention_norm = layer_norm(config, rngs)
        self.up = linear(config, config.hidden, config.intermediate, rngs)
        self.down = linear(config, config.intermediate, config.hidden, rngs)
        self.mlp_norm = layer_norm(config, rngs)

    def attend(
        self,
        x: Float[Array, "batch length hidden"],
        is_token: Bool[Array, "batch length"],
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "batch length hidden"]:
        """Multi-head attention over the tokens that are not padding."""
        split = (*x.shape[:2], self.config.heads, -1)
        query, key, value = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        mixed = nnx.dot_product_attention(
            query,
            key,
            value,
            mask=is_token[:, None, None, :],
            dropout_rng=rngs and rngs.dropout(),
            dropout_rate=self.config.attention_dropout,
            deterministic=rngs is None,
            broadcast_dropout=False,
        )
        return self.out(mixed.reshape(x.shape))

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        is_token: Bool[Array, "batch length"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch length hidden"]:
        share = self.config.dropout
        x = self.attention_norm(x + drop(self.attend(x, is_token, rngs), share, rngs))
        mixed = self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.mlp_norm(x + drop(mixed, share, rngs))


class Classifier(nnx.Module):
    """The classification head on the first token.

    Args:
        config: shape of the model.
        rngs: random numbers of the weights.
        drop_input: dropout also before `dense`.
    """

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs, *, drop_input: bool = True):
        self.share = config.classifier_dropout
        self.drop_input = drop_input
        self.dense = linear(config, config.hidden, config.hidden, rngs)
        self.head = linear(config, config.hidden, config.labels, rngs)

    def __call__(
        self, x: Float[Array, "batch hidden"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch labels"]:
        x = drop(x, self.share, rngs) if self.drop_input else x
        x = jnp.tanh(self.dense(x))
        return self.head(drop(x, self.share, rngs))


class Roberta(nnx.Module):
    """The model: tokens ↦ logits of the labels."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config
        self.words = embedding(config, config.vocabulary, rngs)
        self.positions = embedding(config, config.positions, rngs)
        self.kinds = embedding(config, config.kinds, rngs)
        self.norm = layer_norm(config, rngs)
        self.layers = nnx.vmap(partial(Layer, config))(rngs.split(config.layers))
        self.classifier = Classifier(config, rngs)

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length hidden"]:
        """Sum of the embeddings of tokens, positions and token types."""
        positions = position_ids(tokens, self.config.padding)
        return self.words(tokens) + self.positions(positions) + self.kinds(jnp.zeros_like(tokens))

    def __call__(
        self, tokens: Int[Array, "batch length"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch labels"]:
        return self.classifier(self.encode(tokens, rngs)[:, 0], rngs)

    def encode(
        self, tokens: Int[Array, "batch length"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch length hidden"]:
        """The embeddings of the tokens after all layers."""
        structure, weights = nnx.split(self.layers)
        is_token = tokens != self.config.padding

        def apply(x, layer):
            weights, key = layer
            rngs = None if key is None else nnx.Rngs(dropout=key)
            return nnx.merge(structure, weights)(x, is_token, rngs), None

        x = drop(self.norm(self.embed(tokens)), self.config.dropout, rngs)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), self.config.layers)
        return jax.lax.scan(apply, x, (weights, keys), unroll=True)[0]


def abstract_params(config: RobertaConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters as a nested dict; allocates no arrays."""
    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
