"""C4, the paper's data set, in tokens of T5: read from local shards or streamed from the Hub.

    hf download google-t5/t5-base tokenizer.json --local-dir t5-base
    hf download --repo-type dataset allenai/c4 --include 'en/c4-train.0000*' \\
        'en/c4-validation.*' --local-dir c4
    python examples/pretraining/pretrain.py --dataset c4 --preset 60m --data c4 --tokenizer t5-base

Without `--data` the package `datasets` streams the texts from the Hub. Texts keep their published
order, which is random. Each text ends with an end token, and all texts are packed (`packing.py`).
Batches are sequential, so a checkpoint contains the position: the number of the shard and the line,
or the state of the stream of `datasets`. With several processes, each reads all texts and keeps its
rows.
"""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from examples.common import data, hugging_face
from examples.pretraining.packing import Packed


END = "</s>"
GET_TOKENIZER = "hf download google-t5/t5-base tokenizer.json --local-dir t5-base"
GET_SHARDS = (
    "hf download --repo-type dataset allenai/c4 "
    "--include 'en/c4-train.0000*' 'en/c4-validation.*' --local-dir c4"
)
BEGINNING = 4096  # bytes of a shard in the digest: reading whole shards takes hours


class Shards(NamedTuple):
    """Gzipped files of texts, one JSON object per line."""

    files: tuple[Path, ...]

    def read(self, place: Sequence[int] | None) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yields the texts after a place, each with the place after it (file index, line number).

        Raises:
            OSError: a file is missing or damaged, or a record has no text.
        """
        first, done = place or (0, 0)
        for i, file in enumerate(self.files[first:], first):
            try:
                with gzip.open(file) as lines:
                    for number, line in enumerate(lines, 1):
                        if i > first or number > done:
                            yield text_of(line, f"{file}, line {number}"), (i, number)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise OSError(f"{file} is truncated or damaged: download it again") from error

    def about(self) -> dict[str, Any]:
        """Number of shards, and a digest of their names and beginnings."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as opened:
                digest.update(f"{file.name}\n".encode() + opened.read(BEGINNING))
        return {"shards": len(self.files), "beginnings": digest.hexdigest()}


def text_of(line: bytes, where: str) -> str:
    """The text of a record; raises an OSError if there is none."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise OSError(f'{where}: not a record with a "text"')
    return text


class Hub(NamedTuple):
    """One split of C4's English part, streamed."""

    split: str

    def read(self, place: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the texts after a place, each with the place after it.

        Raises:
            ValueError: the package `datasets` is not installed.
            OSError: streaming failed.
        """
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                "streaming C4 needs the package datasets: pip install 'natgalore_jax[c4]'; "
                f"to download shards for --data: {GET_SHARDS}"
            ) from error
        try:
            stream = load_dataset("allenai/c4", "en", split=self.split, streaming=True)
            if place is not None:
                stream.load_state_dict(place)
            for row in stream:
                yield row["text"], stream.state_dict()
        except Exception as error:  # the type varies
            raise OSError(
                f"C4 cannot be streamed ({error}); to download shards for --data: {GET_SHARDS}"
            ) from error

    def about(self) -> dict[str, Any]:
        """Name and configuration of the data set."""
        return {"hub": "allenai/c4", "config": "en"}


def find(folder: Path | None, split: str) -> Shards | Hub:
    """The texts of a split: shards in the folder or its subfolder `en`; the Hub if folder is None.

    Raises:
        FileNotFoundError: the folder has no shards.
    """
    if folder is None:
        return Hub(split)
    pattern = f"c4-{split}.*.json.gz"
    files = sorted(folder.glob(pattern)) or sorted(folder.glob(f"en/{pattern}"))
    if not files:
        raise FileNotFoundError(f"no {pattern} in {folder}; to download it: {GET_SHARDS}")
    return Shards(tuple(files))


def tokenizer_file(path: Path | None) -> Path:
    """The tokenizer file at a path, or in the folder at the path.

    Raises:
        ValueError: path is None.
        FileNotFoundError: there is no tokenizer.
    """
    if path is None:
        raise ValueError(f"--tokenizer is required; to download it: {GET_TOKENIZER}")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}; to download it: {GET_TOKENIZER}")
    return file


def digest_of(tokenizer: Path | None) -> str:
    """SHA-256 of the tokenizer file."""
    return hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest()


def read_tokenizer(path: Path | None, sha256: str | None = None) -> Tokenizer:
    """Reads the tokenizer in a file or a folder.

    Args:
        path: the file or folder.
        sha256: expected digest of the file.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: the file is damaged, has another digest, or has no end token.
    """
    file = tokenizer_file(path)
    if sha256 not in (None, digest_of(file)):
        raise ValueError(f"{file} differs from the tokenizer of the run")
    tokenizer = hugging_face.open_tokenizer(file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.token_to_id(END) is None:
        raise ValueError(f"{file} has no end token {END}; to download T5's: {GET_TOKENIZER}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text, with an end token."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [[*one.ids, end] for one in encoded]


def coding(tokenizer: Tokenizer) -> data.Coding:
    """The tokenizer as a `data.Coding`."""

    def tokens(text: str) -> list[int]:
        text = text.encode(errors="surrogateescape").decode(errors="replace")
        return tokenizer.encode(text, add_special_tokens=False).ids

    return data.Coding(
        size=tokenizer.get_vocab_size(),
        encode=tokens,
        decode=lambda tokens: tokenizer.decode(list(tokens)).encode(),
    )


def load(
    folder: Path | None, tokenizer: Path | None, batch_size: int, length: int, validation: int
) -> data.Source:
    """Reads the tokenizer, the validation batches, and one training batch as a check.

    Args:
        folder: folder of the shards, or None for the Hub.
        tokenizer: file or folder of the tokenizer.
        batch_size: sequences per batch.
        length: tokens per sequence.
        validation: maximum number of validation batches.

    Raises:
        OSError: a file is missing or damaged, or streaming failed.
        ValueError: the tokenizer is invalid, or a split has less than one batch.
    """
    known = read_tokenizer(tokenizer)
    digest: dict[str, Any] = {"tokenizer": digest_of(tokenizer)}
    packed = {}
    for split in ("train", "validation"):
        found = find(folder, split)
        digest |= {split: found.about()}
        packed[split] = lambda read=found.read: Packed(
            read, lambda texts: encode(known, texts), batch_size, length
        )

    def first(split: str, count: int) -> list[Int[np.ndarray, "batch length"]]:
        one = packed[split]()
        batches = list(itertools.islice(one, count))
        if not batches:
            raise ValueError(
                f"C4's {split} split has {len(one.tokens):,} tokens, but a batch has "
                f"{batch_size * length:,}: use more shards, or a smaller --batch-size or --seq-len"
            )
        return batches

    first("train", 1)
    held_out = first("validation", validation)
    return data.Source(
        coding=coding(known),
        training=packed["train"],
        validation=lambda: held_out,
        summary={
            **digest,
            "sha256": hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest(),
            "validation_tokens": sum(batch.size for batch in held_out),
        },
        about=f"C4 {'from the Hub' if folder is None else f'in {folder}'}",
    )
