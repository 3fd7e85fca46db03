"""Reads records from .jsonl, .csv and .tsv files.

    train = read(find(folder, "train"), parse, skip=False)

A malformed line raises an error with its file and line number; with `skip` it is skipped and
reported. Only a line feed ends a line: sentences may contain other Unicode separators. A quoted
cell of a .csv file may contain line feeds; in a .tsv file quotes are ordinary characters.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """The first file name.jsonl, name.csv or name.tsv that the folder has; None without one."""
    files = [folder / f"{name}.{kind}" for name in names for kind in ("jsonl", "csv", "tsv")]
    return next((file for file in files if file.is_file()), None)


def from_json(line: str) -> Row:
    """Parses a line of a .jsonl file."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def from_cells(cells: Sequence[str], columns: Sequence[str]) -> Row:
    """A row of a .csv or .tsv file."""
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells for {len(columns)} columns")
    return dict(zip(columns, cells, strict=True))


def rows(
    file: Path, content: bytes, columns: Sequence[str]
) -> Iterator[tuple[int, Callable[[], Row]]]:
    """The number of each record's last line, and a function that parses the record.

    Raises:
        ValueError: a .csv file is not valid UTF-8.
    """
    if file.suffix == ".csv":
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {error}") from error
        csv.field_size_limit(2**31 - 1)  # of characters; the default is 131,072
        reader = csv.reader(io.StringIO(text, newline=""))
        columns = columns or next(reader, [])
        for cells in reader:
            yield reader.line_num, lambda cells=cells: from_cells(cells, columns)
        return
    lines = list(enumerate(content.removesuffix(b"\n").split(b"\n"), start=1))
    if file.suffix == ".tsv" and not columns:
        columns = lines.pop(0)[1].decode("utf-8", "replace").strip("\ufeff\r").split("\t")
    for number, line in lines:
        text = lambda line=line: line.decode().removesuffix("\r")
        if file.suffix == ".jsonl":
            yield number, lambda text=text: from_json(text())
        else:
            yield number, lambda text=text: from_cells(text().split("\t"), columns)


def read(
    file: Path,
    parse: Callable[[Row], Record],
    *,
    columns: Sequence[str] = (),
    skip: bool = False,
) -> Records[Record]:
    """Reads a .jsonl, .csv or .tsv file.

    Args:
        file: one record per line or row.
        parse: row -> record; raises KeyError or ValueError for a malformed row.
        columns: column names of a .csv or .tsv file without a header.
        skip: skip malformed lines instead of raising.

    Raises:
        ValueError: a line is malformed, or no line is valid.
    """
    content = file.read_bytes()
    records, skipped = [], []
    for number, row in rows(file, content, columns):
        try:
            records.append(parse(row()))
        except (KeyError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            skipped.append(f"{file}, line {number}: {reason}")
            if not skip:
                raise ValueError(f"{skipped[0]} (--skip-malformed skips such records)") from error
    if not records:
        raise ValueError(f"{skipped[0]}; no line is valid" if skipped else f"{file} is empty")
    return Records(records, skipped, hashlib.sha256(content).hexdigest())


def write(file: Path, rows: Iterable[Row]) -> None:
    """Writes a .jsonl file; creates its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def read_folder(
    folder: Path, parse: Callable[[str, str], Record], *, skip: bool = False
) -> Records[Record]:
    """Reads folder/LABEL/*.txt.

    Args:
        folder: one folder for each label, with a text in each file.
        parse: (text, label) -> record; raises ValueError for a malformed text.
        skip: skip malformed texts instead of raising.

    Raises:
        ValueError: a text is malformed, or there is none.
    """
    digest, records, skipped = hashlib.sha256(), [], []
    for file in sorted(folder.glob("*/*.txt")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
        try:
            records.append(parse(content.decode(), file.parent.name))
        except ValueError as error:
            skipped.append(f"{file}: {error}")
            if not skip:
                raise ValueError(f"{skipped[0]} (--skip-malformed skips such records)") from error
    if not records:
        raise ValueError(f"{folder} has no text LABEL/*.txt")
    return Records(records, skipped, digest.hexdigest())
