"""Interface of training data, and byte-level text.

The default text is the source code of the Python standard library (about 11 MB), which every
installation has. Every token is a byte, so there is no tokenizer and losses are in nats per byte.
A batch is a function of (seed, step): a resumed run continues with the same data.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, UInt8


VOCABULARY = 256
EXCLUDED = {  # folders that differ between distributions
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


class Coding(NamedTuple):
    """Conversion between text and tokens.

    Attributes:
        size: number of different tokens.
        encode: text -> tokens.
        decode: tokens -> bytes, normally valid UTF-8.
    """

    size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], bytes]


BYTES = Coding(
    VOCABULARY,
    encode=lambda text: list(text.encode(errors="surrogateescape")),
    decode=lambda tokens: bytes(token for token in tokens if token < VOCABULARY),
)


class Batches(Protocol):
    """Training batches, requested in the order of their steps, from 1."""

    def batch(self, step: int) -> Int[np.ndarray, "batch length"]: ...

    def position(self) -> Any:
        """Position of the next batch as JSON; None if the step determines it."""

    def seek(self, position: Any) -> None:
        """Moves to a position."""


class Source(NamedTuple):
    """The data of a run.

    Attributes:
        coding: conversion between its text and tokens.
        training: () -> training batches from the first one.
        validation: () -> held-out batches, the same at each call.
        summary: description for the log, with a `sha256`.
        about: short description for the terminal.
    """

    coding: Coding
    training: Callable[[], Batches]
    validation: Callable[[], Iterable[Int[np.ndarray, "batch length"]]]
    summary: dict[str, Any]
    about: str


class Corpus(NamedTuple):
    """A text, split into training and validation bytes.

    Attributes:
        train: training bytes.
        validation: held-out bytes: every 20th file, or the last 5 % of a single file.
        files: number of files.
        sha256: digest of the files' names and contents.
    """

    train: UInt8[np.ndarray, " tokens"]
    validation: UInt8[np.ndarray, " tokens"]
    files: int
    sha256: str

    def summary(self) -> dict[str, int | str]:
        """Description of the data for the log."""
        return {
            "files": self.files,
            "sha256": self.sha256,
            "train_bytes": len(self.train),
            "validation_bytes": len(self.validation),
        }


def standard_library() -> list[Path]:
    """The source files of the Python standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"))
    return [file for file in files if EXCLUDED.isdisjoint(file.relative_to(root).parts)]


def text_files(path: Path) -> list[Path]:
    """The file `path`, or all files in the folder `path` except hidden ones, sorted.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder at {path}")

    def hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(path).parts)

    return [file for file in sorted(path.rglob("*")) if file.is_file() and not hidden(file)]


def load(path: Path | None = None) -> Corpus:
    """Reads a text file, a folder of text files, or by default the Python standard library.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the text is empty.
    """
    files = standard_library() if path is None else text_files(path)
    texts = [file.read_bytes() for file in files]
    if not any(texts):
        raise ValueError(f"the text is empty: {path}")

    digest = hashlib.sha256()
    for file, text in zip(files, texts, strict=True):
        digest.update(f"{file.name} {len(text)}\n".encode() + text)

    if len(texts) == 1:
        end = len(texts[0]) * 95 // 100
        train, validation = texts[0][:end], texts[0][end:]
    else:
        validation = b"".join(texts[::20])
        train = b"".join(text for i, text in enumerate(texts) if i % 20)
    return Corpus(
        np.frombuffer(train, np.uint8),
        np.frombuffer(validation, np.uint8),
        len(files),
        digest.hexdigest(),
    )


def check_length(corpus: Corpus, batch_size: int, length: int) -> None:
    """Raises a ValueError if the corpus is too short.

    The training part must have `batch_size * length` bytes, the validation part `length` bytes.
    """
    for name, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        needed = batch_size * length if name == "training" else length
        if len(tokens) < needed:
            raise ValueError(
                f"the text is too short: {len(tokens)} bytes for {name}, "
                f"but {needed} are needed; use more text, or a smaller --batch-size or --seq-len"
            )


def windows(
    tokens: UInt8[np.ndarray, " tokens"], starts: Int[np.ndarray, " batch"], length: int
) -> Int[np.ndarray, "batch length"]:
    """The `length` tokens from each start."""
    return tokens[starts[:, None] + np.arange(length)].astype(np.int32)


def training_batch(
    tokens: UInt8[np.ndarray, " tokens"], batch_size: int, length: int, *, seed: int, step: int
) -> Int[np.ndarray, "batch length"]:
    """Random windows of the text, determined by seed and step."""
    random = np.random.default_rng((seed, step))
    return windows(tokens, random.integers(len(tokens) - length + 1, size=batch_size), length)


def validation_batches(
    tokens: UInt8[np.ndarray, " tokens"], batch_size: int, length: int, batches: int
) -> Iterator[Int[np.ndarray, "batch length"]]:
    """Windows spread evenly over the text, the same at each call."""
    starts = np.linspace(0, len(tokens) - length, batches * batch_size).astype(np.int64)
    for batch in np.split(starts, batches):
        yield windows(tokens, batch, length)


class RandomWindows(NamedTuple):
    """Batches determined by their step, see `training_batch`."""

    tokens: UInt8[np.ndarray, " tokens"]
    batch_size: int
    length: int
    seed: int

    def batch(self, step: int) -> Int[np.ndarray, "batch length"]:
        return training_batch(self.tokens, *self[1:3], seed=self.seed, step=step)

    def position(self) -> None:
        return None

    def seek(self, position: None) -> None:
        pass


def source(path: Path | None, batch_size: int, length: int, validation: int, seed: int) -> Source:
    """Random windows of a text (see `load`), and `validation` batches of its held-out part.

    Raises:
        FileNotFoundError: the text does not exist.
        ValueError: the text is too short.
    """
    corpus = load(path)
    check_length(corpus, batch_size, length)
    return Source(
        coding=BYTES,
        training=lambda: RandomWindows(corpus.train, batch_size, length, seed),
        validation=lambda: validation_batches(corpus.validation, batch_size, length, validation),
        summary=corpus.summary(),
        about=f"{corpus.files} files of text",
    )
