"""How reports are laid out: as plain text or rich tables, leaves that are alike on one line."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar


T = TypeVar("T")
Cells = Sequence[tuple[str, ...]]  # the head, the lines, and that of totals


def table(rows: Cells, numbers: int) -> str:
    """Plain text in columns, the last `numbers` of them flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush = len(widths) - numbers
    lines = [
        "  ".join(
            cell.rjust(width) if i >= flush else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def rich_table(
    rows: Cells, numbers: int, wrapped: Iterable[int], dim: Callable[[tuple[str, ...]], bool]
) -> Any:
    """The same for `rich.print` and its consoles, where rich is installed.

    Args:
      rows: cells.
      numbers: of columns, the last ones, that are flush right.
      wrapped: the columns that may break, to fit the screen.
      dim: whether a line is.
    """
    from rich import box
    from rich.table import Table

    head, *body, total = rows
    shown = Table(box=box.SIMPLE, show_footer=True, padding=0)
    for i, (name, sum_of) in enumerate(zip(head, total, strict=True)):
        numeric = "right" if i >= len(head) - numbers else "left"
        no_wrap = i not in {*wrapped}
        shown.add_column(name, sum_of, justify=numeric, overflow="fold", no_wrap=no_wrap)
    for row in body:
        shown.add_row(*row, style="dim" if dim(row) else None)
    return shown


def alike(rows: Iterable[T], name: Callable[[T], str], of: Callable[[T], Hashable]) -> Any:
    """Rows that share a line: their names differ by a number alone, and `of` is one.

    Returns:
      Pairs of what the line is called, `layers/*/mlp/up/kernel (24)`, and its rows.
    """
    found: dict[Hashable, list[T]] = {}
    for row in rows:
        found.setdefault((re.sub(r"\d+", "*", name(row)), of(row)), []).append(row)
    return [
        (name(same[0]) if len(same) == 1 else f"{pattern} ({len(same)})", same)
        for (pattern, _), same in found.items()
    ]


def human_bytes(n: int | float) -> str:
    """`36872` as `36.0 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def human_count(n: int | float) -> str:
    """`1234567` as `1.2 M`."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if n < 1000 or unit == " P":
            break
        n /= 1000
    return f"{n:.1f}{unit}" if unit else f"{n:.0f}"
