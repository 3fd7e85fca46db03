"""RoBERTa (arXiv 1907.11692) in Flax NNX, with the head that classifies sentences.

    x = norm(words[tokens] + positions[position] + kind)
    for each layer:
        x = norm(x + attention(x))           both ways, padding not seen
        x = norm(x + down(gelu(up(x))))      gelu by the error function
    logits = head(tanh(dense(x of the first token)))

Positions count from `padding + 1` on, and padding stands at `padding`: a row of 514 positions has
room for 512 tokens. Dropout acts where `rngs` are given, and only there: in the embeddings, on the
attention, on what each half of a layer adds, and in the head.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class RobertaConfig:
    """The shape of a RoBERTa; by default that of RoBERTa-base.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        heads: attention heads.
        layers: depth.
        vocabulary: number of tokens.
        positions: rows of the position table, `padding + 1` of which no token uses.
        labels: classes of the head; 1 for a number.
        padding: the token that is not there.
        epsilon: what the norms add to a variance.
        dropout, attention_dropout, classifier_dropout: shares that are left out in training.
        dtype: dtype of activations and matmuls; weights are float32 always.
    """

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
        """Tokens that there are positions for."""
        return self.positions - self.padding - 1


def linear(config: RobertaConfig, m: int, n: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(m, n, kernel_init=init, dtype=config.dtype, rngs=rngs)


def embedding(config: RobertaConfig, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(0.02)
    return nnx.Embed(rows, config.hidden, embedding_init=init, dtype=config.dtype, rngs=rngs)


def layer_norm(config: RobertaConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The mean is subtracted before squares are taken: float32 keeps its digits.
    return nnx.LayerNorm(
        config.hidden,
        epsilon=config.epsilon,
        use_fast_variance=False,
        dtype=config.dtype,
        rngs=rngs,
    )


def drop(x: Array, share: float, rngs: nnx.Rngs | None) -> Array:
    """A share of the entries set to zero, and the others scaled up; `x` itself without `rngs`."""
    return nnx.Dropout(share)(x, deterministic=rngs is None, rngs=rngs)


def position_ids(tokens: Int[Array, "batch length"], padding: int) -> Int[Array, "batch length"]:
    """padding + 1, padding + 2, … for the tokens that are there, and padding for the others."""
    there = tokens != padding
    return jnp.where(there, padding + jnp.cumsum(there, axis=1), padding)


class Layer(nnx.Module):
    """One layer: attention and MLP, each added to what it reads and normalised after."""

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
        there: Bool[Array, "batch length"],
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "batch length hidden"]:
        """Each token's mean of the values, weighted by how well its query fits their keys."""
        split = (*x.shape[:2], self.config.heads, -1)
        query, key, value = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        mixed = nnx.dot_product_attention(
            query,
            key,
            value,
            mask=there[:, None, None, :],
            dropout_rng=rngs and rngs.dropout(),
            dropout_rate=self.config.attention_dropout,
            deterministic=rngs is None,
            broadcast_dropout=False,
        )
        return self.out(mixed.reshape(x.shape))

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        there: Bool[Array, "batch length"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch length hidden"]:
        share = self.config.dropout
        x = self.attention_norm(x + drop(self.attend(x, there, rngs), share, rngs))
        mixed = self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.mlp_norm(x + drop(mixed, share, rngs))


class Classifier(nnx.Module):
    """The head, on the first token."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.share = config.classifier_dropout
        self.dense = linear(config, config.hidden, config.hidden, rngs)
        self.head = linear(config, config.hidden, config.labels, rngs)

    def __call__(
        self, x: Float[Array, "batch hidden"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch labels"]:
        x = jnp.tanh(self.dense(drop(x, self.share, rngs)))
        return self.head(drop(x, self.share, rngs))


class Roberta(nnx.Module):
    """Tokens to the logits of the labels."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config
        self.words = embedding(config, config.vocabulary, rngs)
        self.positions = embedding(config, config.positions, rngs)
        self.kinds = embedding(config, 1, rngs)
        self.norm = layer_norm(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.classifier = Classifier(config, rngs)

    def __call__(
        self, tokens: Int[Array, "batch length"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch labels"]:
        padding = self.config.padding
        kind = self.kinds(jnp.zeros_like(tokens))
        x = self.norm(self.words(tokens) + self.positions(position_ids(tokens, padding)) + kind)
        x = drop(x, self.config.dropout, rngs)
        for layer in self.layers:
            x = layer(x, tokens != padding, rngs)
        return self.classifier(x[:, 0], rngs)


def abstract_params(config: RobertaConfig) -> dict[str, Any]:
    """The parameters of a config as a nested dict of shapes and dtypes, without their memory."""
    model = nnx.eval_shape(lambda: Roberta(config, nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
