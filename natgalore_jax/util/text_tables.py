"""Tables of reports, as plain text or for rich; leaves that differ by a number share a line."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar


T = TypeVar("T")
Cells = Sequence[tuple[str, ...]]  # the head, the lines, the line of totals


def table(rows: Cells, numbers: int) -> str:
    """Plain text in columns; the last `numbers` columns are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first_number = len(widths) - numbers
    lines = [
        "  ".join(
            cell.rjust(width) if i >= first_number else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def rich_table(
    rows: Cells, numbers: int, wrapped: Iterable[int], dim: Callable[[tuple[str, ...]], bool]
) -> Any:
    """The table of :func:`table` for `rich.print`. Needs rich.

    Args:
      rows: cells.
      numbers: count of right-aligned columns, the last ones.
      wrapped: indices of columns whose cells may wrap to fit the screen.
      dim: predicate of the lines shown dim.
    """
    from rich import box
    from rich.table import Table

    head, *body, total = rows
    rendered = Table(box=box.SIMPLE, show_footer=True, padding=0)
    for i, (name, footer) in enumerate(zip(head, total, strict=True)):
        justify = "right" if i >= len(head) - numbers else "left"
        no_wrap = i not in {*wrapped}
        rendered.add_column(name, footer, justify=justify, overflow="fold", no_wrap=no_wrap)
    for row in body:
        rendered.add_row(*row, style="dim" if dim(row) else None)
    return rendered


def group_similar(
    rows: Iterable[T], name: Callable[[T], str], key: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Groups rows that share a line: equal keys, and names that differ by numbers alone.

    Returns:
      Pairs of the line's label, such as `layers/*/mlp/up/kernel (24)`, and its rows.
    """
    groups: dict[Hashable, list[T]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "*", name(row)), key(row)), []).append(row)
    return [
        (name(group[0]) if len(group) == 1 else f"{pattern} ({len(group)})", group)
        for (pattern, _), group in groups.items()
    ]


def human_bytes(n: int | float) -> str:
    """`36872` as `36.0 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
