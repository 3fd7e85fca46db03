"""Text to tokens: Python sources that are present wherever this runs, or C4 for who has a network.

The sources are those of the standard library and of all packages installed, less what is equal to
another. Distributions differ, so a corpus has a digest, and results of different ones are not
compared. A byte-pair encoding is trained on a part of it; tokens are kept in a file.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


LARGEST = 1_000_000  # bytes of a file: beyond are tables that a program has written
HELD_OUT = 50  # one of so many files is for validation
TAUGHT_BY = 8  # one of so many teaches the encoding
VOCABULARIES = range(257, 2**16 + 1)  # all bytes and the end of a text; tokens are uint16
C4_TEXTS = 200_000  # of C4 at most, about 90M tokens


class Corpus(NamedTuple):
    """Tokens, split.

    Attributes:
      train: tokens to train on.
      validation: tokens of texts held out.
      about: what a log should say of it.
    """

    train: UInt16[np.ndarray, " tokens"]
    validation: UInt16[np.ndarray, " tokens"]
    about: dict[str, int | str]


def python_sources(limit: int | None = None) -> Iterator[bytes]:
    """The Python files here, in an order that their contents decide; at most `limit`."""
    paths = sysconfig.get_paths()
    texts = {}
    for root in sorted({paths[name] for name in ("stdlib", "purelib", "platlib")}):
        for path in Path(root).rglob("*.py"):
            if path.is_file() and 0 < path.stat().st_size <= LARGEST:
                text = path.read_bytes()
                texts[hashlib.sha256(text).digest()] = text
    for digest in sorted(texts)[:limit]:
        yield texts[digest]


def c4(limit: int | None = None) -> Iterator[bytes]:
    """The first texts of C4's English part, streamed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("c4 needs `pip install -e '.[c4]'`, and a network") from error
    stream = load_dataset("allenai/c4", "en", split="train", streaming=True)
    for _, row in zip(range(limit or C4_TEXTS), stream, strict=False):
        yield row["text"].encode()


DATASETS = {"python": python_sources, "c4": c4}


def load(dataset: str, vocabulary: int, folder: Path, limit: int | None = None) -> Corpus:
    """Reads, encodes and keeps a corpus, or returns the kept one if its texts are the same.

    Args:
      dataset: one of DATASETS.
      vocabulary: number of tokens, one of VOCABULARIES.
      folder: where it is kept.
      limit: of texts.

    Raises:
      ValueError: there is no text, or what reads it is missing.
    """
    texts = list(DATASETS[dataset](limit))
    if not texts:
        raise ValueError(f"there is no text in {dataset}")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    sha256 = digest.hexdigest()
    kept = folder / f"{dataset}-{vocabulary}-{sha256[:12]}.npz"
    if kept.exists():
        with np.load(kept) as arrays:
            about = json.loads(str(arrays["about"]))
            return Corpus(arrays["train"], arrays["validation"], about)

    strings = [text.decode(errors="replace") for text in texts]
    encoding = taught(strings[::TAUGHT_BY], vocabulary)
    end = np.uint16(encoding.token_to_id(END))
    encoded = [
        np.append(np.array(one.ids, np.uint16), end) for one in encoding.encode_batch_fast(strings)
    ]
    held_out = encoded[::HELD_OUT]
    train = np.concatenate([tokens for i, tokens in enumerate(encoded) if i % HELD_OUT])
    about: dict[str, int | str] = {
        "dataset": dataset,
        "sha256": sha256,
        "texts": len(texts),
        "bytes": sum(map(len, texts)),
        "vocabulary": vocabulary,
        "train_tokens": len(train),
        "validation_tokens": sum(map(len, held_out)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(train, np.concatenate(held_out), about)
    part = kept.with_suffix(".part.npz")  # or a reader would find half a file
    np.savez(part, train=corpus.train, validation=corpus.validation, about=json.dumps(about))
    part.rename(kept)
    return corpus


END = "<end>"  # of a text


def taught(strings: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level byte-pair encoding of the strings."""
    encoding = Tokenizer(models.BPE())
    encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoding.decoder = decoders.ByteLevel()
    encoding.train_from_iterator(
        strings,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return encoding
