"""Records from files of lines, JSON or cells between tabs, none of them lost in silence.

    train = read(find(folder, "train"), parse, skip=False)

A line that cannot be read ends everything with its file and number, or with `skip` is left out and
counted. Lines end at a line feed only: sentences may have every other separator of Unicode in them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar


Record = TypeVar("Record")
Row = dict[str, Any]


class Records(NamedTuple, Generic[Record]):
    """What a file holds.

    Attributes:
        records: that could be read.
        skipped: what was wrong with the others, one message each.
        sha256: digest of the file.
    """

    records: list[Record]
    skipped: list[str]
    sha256: str


def find(folder: Path, *names: str) -> Path | None:
    """The file of one of these names in the folder, as .jsonl or .tsv; None where there is none."""
    files = [folder / f"{name}.{kind}" for name in names for kind in ("jsonl", "tsv")]
    return next((file for file in files if file.is_file()), None)


def from_json(line: str) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    return row


def from_tabs(line: str, columns: Sequence[str]) -> Row:
    """A line's cells by the names of their columns; quotes mean nothing in it."""
    cells = line.split("\t")
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells for {len(columns)} columns")
    return dict(zip(columns, cells, strict=True))


def read(
    file: Path,
    parse: Callable[[Row], Record],
    *,
    columns: Sequence[str] = (),
    skip: bool = False,
) -> Records[Record]:
    """Reads a .jsonl or .tsv file.

    Args:
        file: with one record a line.
        parse: makes a record of a row; a KeyError or ValueError of it is about that line.
        columns: names of the columns of a .tsv file without a header.
        skip: leave out lines that cannot be read, instead of raising.

    Raises:
        ValueError: a line cannot be read, or no line can.
    """
    content = file.read_bytes()
    lines = list(enumerate(content.removesuffix(b"\n").split(b"\n"), start=1))
    if file.suffix == ".tsv" and not columns:
        columns = lines.pop(0)[1].decode("utf-8", "replace").strip("\ufeff\r").split("\t")
    records, skipped = [], []
    for number, line in lines:
        try:
            text = line.decode().removesuffix("\r")
            row = from_json(text) if file.suffix == ".jsonl" else from_tabs(text, columns)
            records.append(parse(row))
        except (KeyError, ValueError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            skipped.append(f"{file}, line {number}: {said}")
            if not skip:
                raise ValueError(f"{skipped[0]} (--skip-malformed leaves such out)") from error
    if not records:
        raise ValueError(
            f"{skipped[0]}; no other line is better" if skipped else f"{file} is empty"
        )
    return Records(records, skipped, hashlib.sha256(content).hexdigest())
