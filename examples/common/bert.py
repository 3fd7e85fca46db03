"""BERT (arXiv 1810.04805) in Flax NNX, with a classification head.

The layers of roberta.py, with other embeddings and another head:

    x = norm(words[tokens] + positions[0, 1, …] + kinds[segment])
    logits = head(dropout(tanh(dense(x of the first token))))

Segment 0 is the first text with its [CLS] and [SEP], segment 1 the second text with its [SEP].
`dense` is BERT's pooler.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from examples.common import roberta


@dataclass(frozen=True)
class BertConfig(roberta.RobertaConfig):
    """Shape of a BERT; defaults: BERT-base, uncased.

    Attributes:
        separator: index of the token [SEP], which ends a segment; the default is that of Google's
            vocabularies.
    """

    kinds: ClassVar[int] = 2

    vocabulary: int = 30_522
    positions: int = 512
    padding: int = 0
    epsilon: float = 1e-12
    separator: int = 102

    @property
    def longest(self) -> int:
        """Maximum number of tokens."""
        return self.positions

    def build(self, rngs: nnx.Rngs) -> "Bert":
        """A randomly initialised model of this shape."""
        return Bert(self, rngs)


def segments(
    tokens: Int[Array, "batch length"], separator: int, padding: int
) -> Int[Array, "batch length"]:
    """1 for the tokens after the first separator, else 0; 0 for padding.

    Example:
        >>> segments(jnp.array([[7, 5, 9, 6, 9, 0]]), separator=9, padding=0).tolist()
        [[0, 0, 0, 1, 1, 0]]
    """
    is_separator = tokens == separator
    separators_before = jnp.cumsum(is_separator, axis=1) - is_separator
    return ((separators_before > 0) & (tokens != padding)).astype(jnp.int32)


class Bert(roberta.Roberta):
    """The model: tokens ↦ logits of the labels."""

    config: BertConfig

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.classifier = roberta.Classifier(config, rngs, drop_input=False)

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length hidden"]:
        """Sum of the embeddings of tokens, positions and segments."""
        config = self.config
        positions = self.positions(jnp.arange(tokens.shape[1])[None])
        kinds = self.kinds(segments(tokens, config.separator, config.padding))
        return self.words(tokens) + positions + kinds
