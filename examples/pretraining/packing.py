"""Sequence packing: texts become batches of windows, in order, from a restorable position.

    packed = Packed(read, encode, batch_size, length)
    tokens = packed.next()               the next batch; None if the rest is shorter than a batch
    packed.seek(packed.position())       positions are JSON, for the checkpoint

The tokens of all texts, each with an end token, are concatenated and cut every `length` tokens. No
window is padded. A position contains no tokens, only the place in the texts where they are read
again, so it is small and independent of the process.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


CHUNK = 256  # texts per call of the tokenizer, which encodes them in parallel


class Packed:
    """Batches of packed texts.

    Args:
        read: place -> (text, place after the text) pairs; place None is the first text.
        encode: texts -> tokens of each text, with its end token.
        batch_size: windows per batch.
        length: tokens per window.

    Attributes:
        tokens: tokens read but not yet in a batch.
        epoch: number of completed passes over the texts.
    """

    def __init__(
        self,
        read: Callable[[Any], Iterator[tuple[str, Any]]],
        encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
        batch_size: int,
        length: int,
    ):
        self.read = read
        self.encode = encode
        self.shape = (batch_size, length)
        self.start_at(epoch=0, place=None)

    def start_at(self, epoch: int, place: Any) -> None:
        """Starts reading at a place."""
        self.epoch = epoch
        self.chunk = self.after = place  # places before and after the newest chunk of texts
        self.size = 0  # tokens of the newest chunk
        self.texts = self.read(place)
        self.tokens = np.zeros(0, np.int32)

    def extend(self) -> bool:
        """Reads and encodes the next chunk; returns False at the end of the texts."""
        chunk = list(itertools.islice(self.texts, CHUNK))
        if not chunk:
            return False
        texts, places = zip(*chunk, strict=True)
        new = np.concatenate([np.asarray(ids, np.int32) for ids in self.encode(texts)])
        self.chunk, self.after, self.size = self.after, places[-1], len(new)
        self.tokens = np.concatenate([self.tokens, new])
        return True

    def take(self, count: int) -> Int[np.ndarray, " count"] | None:
        """The next `count` tokens; None, without consuming any, if fewer remain."""
        while len(self.tokens) < count:
            if not self.extend():
                return None
        taken, self.tokens = self.tokens[:count], self.tokens[count:]
        return taken

    def next(self) -> Int[np.ndarray, "batch length"] | None:
        """The next batch; None if fewer tokens remain."""
        batch_size, length = self.shape
        tokens = self.take(batch_size * length)
        return None if tokens is None else tokens.reshape(self.shape)

    def __iter__(self) -> Iterator[Int[np.ndarray, "batch length"]]:
        """The remaining batches of this pass."""
        while (tokens := self.next()) is not None:
            yield tokens

    def batch(self, step: int) -> Int[np.ndarray, "batch length"]:
        """The next batch; after the last one, a new pass begins. `step` is not used.

        Raises:
            ValueError: the texts have fewer tokens than a batch.
        """
        tokens = self.next()
        if tokens is None:
            self.start_at(self.epoch + 1, None)
            tokens = self.next()
        if tokens is None:
            raise ValueError(f"{len(self.tokens)} tokens are fewer than a batch has")
        return tokens

    def position(self) -> dict[str, Any]:
        """Position of the next batch; all remaining tokens belong to the newest chunk."""
        return {"epoch": self.epoch, "texts": self.chunk, "used": self.size - len(self.tokens)}

    def seek(self, position: dict[str, Any]) -> None:
        """Moves to a position.

        Raises:
            ValueError: the texts end before the position.
        """
        self.start_at(position["epoch"], position["texts"])
        if self.take(position["used"]) is None:
            raise ValueError("the texts are shorter than when the checkpoint was saved")
