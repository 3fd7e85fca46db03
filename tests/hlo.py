"""Which collectives a compiled program has, and whether every run of it meets them."""

import re
from collections import defaultdict
from typing import NamedTuple


CALL = r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)"
COLLECTIVE = r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\("


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: as HLO names it.
      shapes: of what it returns, a tuple of sizes for each array.
      hot: whether it stands outside every loop: a refresh stands in one of no turn on most steps.
    """

    kind: str
    shapes: list[tuple[int, ...]]
    hot: bool


def collectives(program: str) -> list[Collective]:
    """All collectives of an optimised HLO program."""
    calls, bodies, found, here, entry = defaultdict(set), set(), [], "", ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            here = head[2]
            entry = here if head[1] else entry
            continue
        calls[here] |= set(re.findall(CALL, line))
        bodies |= set(re.findall(r"body=%?([\w.\-]+)", line))
        if match := re.search(COLLECTIVE, line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]
            found.append((here, match[2], sizes))
    hot, left = set(), [entry]
    while left:
        here = left.pop()
        if here not in hot:
            hot.add(here)
            left += calls[here] - bodies
    return [Collective(kind, shapes, where in hot) for where, kind, shapes in found]
