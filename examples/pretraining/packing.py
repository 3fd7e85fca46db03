"""Texts as batches of windows, in their order, from a place in them that can be come back to.

    packed = Packed(read, encode, batch_size, length)
    tokens = packed.next()               the windows that follow, or None where no whole batch does
    packed.seek(packed.position())       to where it was: JSON, to be kept in a checkpoint

The tokens of all texts, each with its end, are one line that is cut every `length` tokens: no
window is padded, and none is shared by two batches. A position does not hold tokens but where to
read them again, so it stays small, and is the same whoever reads.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


CHUNK = 256  # texts that are encoded together, in parallel


class Packed:
    """Batches, and the place in the texts.

    Args:
        read: position -> texts, each with the position after it; None is that of the first.
        encode: texts -> the tokens of each, with its end.
        batch_size: windows in a batch.
        length: tokens in a window.

    Attributes:
        tokens: read, and not in a batch yet.
        epoch: how often the texts have been read from first to last.
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
        self.epoch = epoch
        self.chunk = self.after = place  # before and after the texts of the newest chunk
        self.size = 0  # tokens of that chunk
        self.texts = self.read(place)
        self.tokens = np.zeros(0, np.int32)

    def extend(self) -> bool:
        """Reads a chunk; False where there is none."""
        chunk = list(itertools.islice(self.texts, CHUNK))
        if not chunk:
            return False
        texts, places = zip(*chunk, strict=True)
        new = np.concatenate([np.asarray(ids, np.int32) for ids in self.encode(texts)])
        self.chunk, self.after, self.size = self.after, places[-1], len(new)
        self.tokens = np.concatenate([self.tokens, new])
        return True

    def take(self, count: int) -> Int[np.ndarray, " count"] | None:
        """The next tokens, or None, and no change, where there are not so many."""
        while len(self.tokens) < count:
            if not self.extend():
                return None
        taken, self.tokens = self.tokens[:count], self.tokens[count:]
        return taken

    def next(self) -> Int[np.ndarray, "batch length"] | None:
        """The next batch, or None where what is left of the texts is less."""
        batch_size, length = self.shape
        tokens = self.take(batch_size * length)
        return None if tokens is None else tokens.reshape(self.shape)

    def __iter__(self) -> Iterator[Int[np.ndarray, "batch length"]]:
        """The batches that are left, once."""
        while (tokens := self.next()) is not None:
            yield tokens

    def batch(self, step: int) -> Int[np.ndarray, "batch length"]:
        """The next batch, whatever the step: after the last one of the texts, the first again.

        Raises:
            ValueError: the texts are less than a batch.
        """
        tokens = self.next()
        if tokens is None:
            self.start_at(self.epoch + 1, None)
            tokens = self.next()
        if tokens is None:
            raise ValueError(f"{len(self.tokens)} tokens are less than a batch")
        return tokens

    def position(self) -> dict[str, Any]:
        """Where the next batch begins; the tokens that are left are all of the newest chunk."""
        return {"epoch": self.epoch, "texts": self.chunk, "used": self.size - len(self.tokens)}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes to where the next batch began.

        Raises:
            ValueError: the texts end before.
        """
        self.start_at(position["epoch"], position["texts"])
        if self.take(position["used"]) is None:
            raise ValueError("the texts are shorter than when the checkpoint was saved")
