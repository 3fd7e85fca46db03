"""C4, the paper's text, as tokens of T5: from shards in a folder, or streamed from the Hub.

    hf download google-t5/t5-base tokenizer.json --local-dir t5-base
    hf download --repo-type dataset allenai/c4 --include 'en/c4-train.0000*' \\
        'en/c4-validation.*' --local-dir c4
    python examples/pretraining/pretrain.py --dataset c4 --preset 60m --data c4 --tokenizer t5-base

Without `--data` texts come from the Hub through the package `datasets` as they are needed. Either
way they keep their order, which is random as published; each gets an end token, and all are packed
(`packing.py`). A step reads what follows, so a checkpoint holds the place: of a shard, its number
and the line; of the Hub, what `datasets` calls the state. Every process reads all of it, and keeps
its rows.
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
BEGINNING = 4096  # bytes of a shard that its digest is made of: reading all takes hours


class Shards(NamedTuple):
    """Files of texts, one JSON object a line, compressed."""

    files: tuple[Path, ...]

    def read(self, place: Sequence[int] | None) -> Iterator[tuple[str, tuple[int, int]]]:
        """The texts from a place on, each with the place after it: number of file, and of line.

        Raises:
            OSError: a file is not there, damaged, or has a record without a text.
        """
        first, seen = place or (0, 0)
        for i, file in enumerate(self.files[first:], first):
            try:
                with gzip.open(file) as lines:
                    for number, line in enumerate(lines, 1):
                        if i > first or number > seen:
                            yield text_of(line, f"{file}, line {number}"), (i, number)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise OSError(f"{file} is cut short or damaged: download it again") from error

    def about(self) -> dict[str, Any]:
        """What tells them from others: their names, and how each begins."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as opened:
                digest.update(f"{file.name}\n".encode() + opened.read(BEGINNING))
        return {"shards": len(self.files), "beginnings": digest.hexdigest()}


def text_of(line: bytes, where: str) -> str:
    """The text of a record."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise OSError(f'{where}: no record with a "text"')
    return text


class Hub(NamedTuple):
    """One split of C4's English part, streamed."""

    split: str

    def read(self, place: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """The texts from a place on, each with the place after it.

        Raises:
            ValueError: the package is not there.
            OSError: they cannot be streamed.
        """
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                "to stream C4: pip install 'natgalore_jax[c4]' (the package datasets); "
                f"for --data: {GET_SHARDS}"
            ) from error
        try:
            stream = load_dataset("allenai/c4", "en", split=self.split, streaming=True)
            if place is not None:
                stream.load_state_dict(place)
            for row in stream:
                yield row["text"], stream.state_dict()
        except Exception as error:  # of many types, by what failed in between
            raise OSError(f"C4 cannot be streamed ({error}); for --data: {GET_SHARDS}") from error

    def about(self) -> dict[str, Any]:
        return {"hub": "allenai/c4", "config": "en"}


def find(folder: Path | None, split: str) -> Shards | Hub:
    """Where the texts of a split are: in the folder or its folder `en`; without one, at the Hub.

    Raises:
        FileNotFoundError: the folder has none.
    """
    if folder is None:
        return Hub(split)
    pattern = f"c4-{split}.*.json.gz"
    files = sorted(folder.glob(pattern)) or sorted(folder.glob(f"en/{pattern}"))
    if not files:
        raise FileNotFoundError(f"no {pattern} in {folder}: {GET_SHARDS}")
    return Shards(tuple(files))


def tokenizer_file(path: Path | None) -> Path:
    """The file at a path, which may be its folder.

    Raises:
        ValueError, FileNotFoundError: there is none.
    """
    if path is None:
        raise ValueError(f"--tokenizer is needed: {GET_TOKENIZER}")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}: {GET_TOKENIZER}")
    return file


def digest_of(tokenizer: Path | None) -> str:
    return hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest()


def read_tokenizer(path: Path | None, sha256: str | None = None) -> Tokenizer:
    """The tokenizer in a file or a folder.

    Raises:
        ValueError, FileNotFoundError: it is not there, damaged, or has another digest than is
            wanted, or no token for the end of a text.
    """
    file = tokenizer_file(path)
    if sha256 not in (None, digest_of(file)):
        raise ValueError(f"{file} is not the tokenizer that the run was given")
    tokenizer = hugging_face.open_tokenizer(file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.token_to_id(END) is None:
        raise ValueError(f"{file} has no token {END} for the end of a text: {GET_TOKENIZER}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, with its end."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [[*one.ids, end] for one in encoded]


def coding(tokenizer: Tokenizer) -> data.Coding:
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
    """Reads the tokenizer and the windows to validate on, and one batch to see that there is one.

    Args:
        folder: with the shards, or None for the Hub.
        tokenizer: its file or folder.
        batch_size, length: of a batch.
        validation: how many batches to validate on, at most.

    Raises:
        ValueError, OSError: something is not there, damaged, or too short.
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
                f"C4's {split} split has {len(one.tokens):,} tokens here, but a batch has "
                f"{batch_size * length:,}: give more shards, or a smaller batch or sequence"
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
