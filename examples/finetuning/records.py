"""Reads records from .jsonl and .tsv files.

    train = read(find(folder, "train"), parse, skip=False)

A malformed line raises an error with its file and line number; with `skip` it is skipped and
reported. Only a line feed ends a line: sentences may contain other Unicode separators.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar


Record = TypeVar("Record")
Row = dict[str, Any]


class Records(NamedTuple, Generic[Record]):
    """Contents of a file.

    Attributes:
        records: the valid records.
        skipped: one error message per skipped record.
        sha256: digest of the file.
    """

    records: list[Record]
    skipped: list[str]
    sha256: str


def find(folder: Path, *names: str) -> Path | None:
    """The first existing file name.jsonl or name.tsv in the folder; None if there is none."""
    files = [folder / f"{name}.{kind}" for name in names for kind in ("jsonl", "tsv")]
    return next((file for file in files if file.is_file()), None)


def from_json(line: str) -> Row:
    """Parses a line of a .jsonl file."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def from_tabs(line: str, columns: Sequence[str]) -> Row:
    """Parses a line of a .tsv file; quotes are ordinary characters."""
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
        file: one record per line.
        parse: row -> record; raises KeyError or ValueError for a malformed row.
        columns: column names of a .tsv file without a header.
        skip: skip malformed lines instead of raising.

    Raises:
        ValueError: a line is malformed, or no line is valid.
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
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            skipped.append(f"{file}, line {number}: {reason}")
            if not skip:
                raise ValueError(f"{skipped[0]} (--skip-malformed skips such records)") from error
    if not records:
        raise ValueError(f"{skipped[0]}; no line is valid" if skipped else f"{file} is empty")
    return Records(records, skipped, hashlib.sha256(content).hexdigest())
