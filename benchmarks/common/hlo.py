"""Collectives of a compiled program: bytes, repetitions, and whether every step runs them."""

import math
import re
from collections import defaultdict
from functools import cache
from typing import NamedTuple


KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
# Of a start/done pair `done` is read: the result type of `start` includes its operands.
COLLECTIVE = rf"%([\w.\-]+) = (.*?) ({KINDS})(?:-done)?\((?:%([\w.\-]+))?"
STARTED = rf"%([\w.\-]+) = .*? (?:{KINDS})-start\("
TRIPS = r'known_trip_count"?:\{"n":"(\d+)"'
# XLA:TPU notes no trip counts: they are read from a loop's condition, i < constant.
CONSTANT = r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)"
BELOW = r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT"
CONDITION = r"condition=%?([\w.\-]+)"
# XLA:TPU runs a collective in parts beside other operations. Each part repeats the instruction with
# the id of its chain; it is counted where the chain starts.
LINK, CHAIN_START = 'chain_id="', 'custom_call_target="AsyncCollectiveStart"'
CALLED = r"(calls|to_apply|body|(?:true|false|branch|called)_computations?)=(\{[^}]*\}|%?[\w.\-]+)"


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: HLO's name.
      shapes: shape of each result array.
      size: bytes of the results on one device.
      group: number of devices in each group.
      hot: whether every run of the program executes it: it is in no branch, and only in loops with
        a trip count known to the compiler, such as a scan. A refresh is in a loop of zero
        iterations on most steps.
      times: executions per run, the product of those trip counts.
    """

    kind: str
    shapes: list[tuple[int, ...]]
    size: int
    group: int
    hot: bool = True
    times: int = 1

    @property
    def received(self) -> float:
        """Bytes that one device receives per execution, with an optimal algorithm."""
        others = self.group - 1
        return (
            self.size
            * {
                "all-gather": others / self.group,
                "all-reduce": 2 * others / self.group,
                "all-to-all": others / self.group,
                "reduce-scatter": others,
                "collective-permute": 1,
            }[self.kind]
        )


def collectives(program: str) -> list[Collective]:
    """All collectives that an optimised HLO program can execute, one entry per call."""
    own, calls, groups = defaultdict(list), defaultdict(list), {}
    devices = re.search(r"num_partitions=(\d+)", program)
    everyone = int(devices[1]) if devices else 1
    limits = trip_counts(program)
    here = entry = ""
    links: list[Collective] = []
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            here, links = head[2], []
            entry = here if head[1] else entry
            continue
        group = group_size(line) or everyone
        if match := re.search(STARTED, line):
            groups[match[1]] = group
        elif match := re.search(COLLECTIVE, line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[2])
            shapes = [tuple(int(n) for n in shape.split(",") if n) for _, shape in arrays]
            size = sum(
                math.prod(shape) * bits(dtype) // 8
                for (dtype, _), shape in zip(arrays, shapes, strict=True)
            )
            one = Collective(match[3], shapes, size, groups.get(match[4], group))
            if here.startswith("all-reduce-scatter"):
                # XLA:TPU's reduce-scatter: an all-reduce and a slice in one fused computation.
                one = one._replace(kind="reduce-scatter", size=size // one.group)
            (links if LINK in line else own[here]).append(one)
        elif CHAIN_START in line:
            own[here] += links
        noted, condition = re.search(TRIPS, line), re.search(CONDITION, line)
        trips = int(noted[1]) if noted else limits.get(condition[1]) if condition else None
        for how, names in re.findall(CALLED, line):
            sure = how in ("calls", "to_apply", "called_computations")
            sure |= how == "body" and trips is not None
            times = trips if how == "body" and trips is not None else 1
            calls[here] += [(name, sure, times) for name in re.findall(r"[\w.\-]+", names)]

    @cache
    def inside(computation: str) -> list[Collective]:
        return own[computation] + [
            one._replace(hot=one.hot and sure, times=one.times * times)
            for name, sure, times in calls[computation]
            for one in inside(name)
        ]

    return inside(entry)


def trip_counts(program: str) -> dict[str, int]:
    """The constant trip counts of loops that count up from 0, by the name of their condition.

    Example:
        >>> trip_counts('''%below (i: (s32[])) -> pred[] {
        ...   %four = s32[] constant(4)
        ...   %i = s32[] get-tuple-element(%arg), index=0
        ...   ROOT %lt = pred[] compare(%i, %four), direction=LT
        ... }''')
        {'below': 4}
    """
    found: dict[str, int] = {}
    here, constants = "", {}
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            here, constants = head[1], {}
        elif constant := re.search(CONSTANT, line):
            constants[constant[1]] = int(constant[2])
        elif (below := re.search(BELOW, line)) and below[1] in constants:
            found[here] = constants[below[1]]
    return found


def group_size(line: str) -> int | None:
    """Number of devices in each group of a collective; None if all, or if the line is none.

    Example:
        >>> group_size("replica_groups={{0,1},{2,3}}"), group_size("replica_groups=[2,4]<=[8]")
        (2, 4)
        >>> group_size("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([8]) {'b','c'}, ")
        8
        >>> group_size("replica_groups=mesh['a'=8] {'a':(2)4}, ")  # a part of an axis
        4
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return None


def bits(dtype: str) -> int:
    """Bits of one number of a dtype, by HLO's name.

    Example:
        >>> [bits(dtype) for dtype in ("pred", "bf16", "f8e4m3fn", "s4", "token")]
        [8, 16, 8, 4, 0]
    """
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8 * (dtype == "pred")
