"""Text to tokens: Python sources, installed or in wheels; descriptions of packages; or C4.

Installed sources are those of the standard library and all packages. Duplicate files are removed.
Installations differ, so each corpus has a digest, and results of different corpora are not
compared. A byte-pair encoding is trained on a part of the corpus; tokens are cached in a file.
"""

import hashlib
import io
import json
import lzma
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


LARGEST = 1_000_000  # bytes of a file: larger ones are generated tables
HELD_OUT = 50  # one file in 50 is for validation
TRAINED_ON_ONE_IN = 8  # one file in 8 trains the encoding
VOCABULARIES = range(257, 2**16 + 1)  # all bytes and the end token; tokens are uint16
FETCHED = Path(__file__).with_name("wheels.txt")
AT_ONCE = 4096  # texts per call of the encoder
C4_TEXTS = 200_000  # at most, about 90M tokens


class Corpus(NamedTuple):
    """Tokens for training and validation.

    Attributes:
      train: tokens to train on.
      validation: tokens of texts held out.
      about: facts for the results file.
    """

    train: UInt16[np.ndarray, " tokens"]
    validation: UInt16[np.ndarray, " tokens"]
    about: dict[str, int | str]


def installed(cache: Path, limit: int | None) -> Iterable[bytes]:
    """The Python files of the standard library and all installed packages."""
    del cache
    paths = sysconfig.get_paths()
    return distinct(
        path.read_bytes()
        for root in sorted({paths[name] for name in ("stdlib", "purelib", "platlib")})
        for path in Path(root).rglob("*.py")
        if path.is_file() and path.stat().st_size <= LARGEST
    )[:limit]


def fetched(cache: Path, limit: int | None) -> Iterable[bytes]:
    """The Python files of the wheels in the folder `wheels` of the cache."""
    folder = cache / "wheels"
    if not any(folder.glob("*.whl")):
        raise ValueError(
            f"there is no text in wheels: pip download -r {FETCHED} --no-deps --only-binary=:all: "
            f"--python-version 3.12 --platform any --implementation py --abi none -d {folder}"
        )

    def files() -> Iterator[bytes]:
        for path in sorted(folder.glob("*.whl")):
            try:
                with zipfile.ZipFile(path) as wheel:
                    for member in wheel.infolist():
                        if member.filename.endswith(".py") and member.file_size <= LARGEST:
                            yield wheel.read(member)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path}: {error}") from error

    return distinct(files())[:limit]


def distinct(texts: Iterable[bytes]) -> list[bytes]:
    """The distinct non-empty texts, ordered by their digests."""
    found = {hashlib.sha256(text).digest(): text for text in texts if text}
    return [found[digest] for digest in sorted(found)]


def descriptions(cache: Path, limit: int | None) -> Iterable[bytes]:
    """The English descriptions of Debian's packages, in apt's files in the folder `debian`.

    Prose: 64,000 texts, 27 MB.
    """
    folder = cache / "debian"
    if not any(folder.glob("*Translation-en*")):
        raise ValueError(
            "there is no text in debian: apt-get -o Dir::State::Lists=LISTS -o "
            "Acquire::Languages=en update; then for each file of LISTS: "
            f"/usr/lib/apt/apt-helper cat-file FILE >> {folder}/Translation-en"
        )
    found = []
    for path in sorted(folder.glob("*Translation-en*")):
        for entry in path.read_text().split("\n\n"):
            _, _, text = entry.partition("\nDescription-en: ")
            # Lines start with a space; one with a dot alone is empty.
            lines = [line.strip() for line in text.splitlines()]
            found.append("\n".join("" if line == "." else line for line in lines).encode())
    return distinct(found)[:limit]


def c4(cache: Path, limit: int | None) -> Iterable[bytes]:
    """The first texts of C4's English part, streamed."""
    del cache
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("c4 needs `pip install -e '.[c4]'`, and a network") from error
    stream = load_dataset("allenai/c4", "en", split="train", streaming=True)
    for _, row in zip(range(limit or C4_TEXTS), stream, strict=False):
        yield row["text"].encode()


DATASETS = {"python": installed, "wheels": fetched, "debian": descriptions, "c4": c4}


def load(dataset: str, vocabulary: int, cache: Path, limit: int | None = None) -> Corpus:
    """Reads, encodes and caches a corpus, or returns the cached one if its texts are equal.

    Args:
      dataset: one of DATASETS.
      vocabulary: number of tokens, one of VOCABULARIES.
      cache: the folder of cached tokens and of wheels.
      limit: maximum number of texts.

    Raises:
      ValueError: there is no text, or a package that reads it is missing.
    """
    texts = list(DATASETS[dataset](cache, limit))
    if not texts:
        raise ValueError(f"there is no text in {dataset}")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    sha256 = digest.hexdigest()
    cached = cache / f"{dataset}-{vocabulary}-{sha256[:12]}.npz"
    if cached.exists():
        with np.load(cached) as arrays:
            about = json.loads(str(arrays["about"]))
            return Corpus(arrays["train"], arrays["validation"], about)

    strings = [text.decode(errors="replace") for text in texts]
    encoding = trained_encoding(strings[::TRAINED_ON_ONE_IN], vocabulary)
    end = np.uint16(encoding.token_to_id(END))
    encoded = [
        np.append(np.array(one.ids, np.uint16), end)
        for start in range(
            0, len(strings), AT_ONCE
        )  # encodings take many times the bytes of a text
        for one in encoding.encode_batch_fast(strings[start : start + AT_ONCE])
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
    cache.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(train, np.concatenate(held_out), about)
    part = cached.with_suffix(".part.npz")  # so that no reader finds half a file
    np.savez(part, train=corpus.train, validation=corpus.validation, about=json.dumps(about))
    part.rename(cached)
    return corpus


def pack(corpus: Corpus, path: Path, tokens: int | None = None) -> None:
    """Writes a corpus, or its first tokens, compressed, for a machine without its texts."""
    train = corpus.train[:tokens]
    buffer = io.BytesIO()
    about = corpus.about | {"train_tokens": len(train)}
    np.savez(buffer, train=train, validation=corpus.validation, about=json.dumps(about))
    # One dictionary for the whole corpus: many files occur in several versions.
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 4, "dict_size": 2**27, "lc": 0, "lp": 1, "pb": 1}
    ]
    path.write_bytes(lzma.compress(buffer.getvalue(), filters=filters))


def unpacked(path: Path) -> Corpus:
    """The corpus that :func:`pack` wrote."""
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as arrays:
        about = json.loads(str(arrays["about"]))
        return Corpus(arrays["train"], arrays["validation"], about)


END = "<end>"  # token after each text


def trained_encoding(strings: list[str], vocabulary: int) -> Tokenizer:
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
