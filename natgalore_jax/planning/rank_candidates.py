"""Candidate ranks, from the smallest to the largest, as rules; and how far up a budget reaches."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ..selection.select import Rank
from ..tree.leaf_spec import LeafSpec
from .spectra import smallest_rank


STEPS = 64  # of a ladder
Ranks = dict[str, int]  # of each projected leaf, by its name


def by_fraction(specs: Sequence[LeafSpec], multiple: int) -> list[Ranks]:
    """The fractions i/64 of each short side, rounded to a multiple, but at most that side.

    Example:
      >>> spec = LeafSpec(("up",), (20, 64), (), (0,), (1,), rank=1)
      >>> by_fraction([spec], 8)
      [{'up': 8}, {'up': 16}, {'up': 20}]
    """
    nearest = lambda x: max(multiple, multiple * math.floor(x / multiple + 0.5))
    return _distinct(
        {spec.name: min(nearest(i / STEPS * _short(spec)), _short(spec)) for spec in specs}
        for i in range(1, STEPS + 1)
    )


def by_energy(
    specs: Sequence[LeafSpec], spectra: Mapping[str, np.ndarray], energy: float, multiple: int
) -> list[Ranks]:
    """The least ranks that hold the shares i/64 of `energy`, rounded up to a multiple."""
    above = lambda r: multiple * math.ceil(r / multiple)
    least = lambda spec, target: above(smallest_rank(spectra[spec.name], target))
    return _distinct(
        {spec.name: min(least(spec, i / STEPS * energy), _short(spec)) for spec in specs}
        for i in range(1, STEPS + 1)
    )


def largest_that_fits(count: int, fits: Callable[[int], bool]) -> int:
    """A candidate of `count` that fits, and the next, if there is one, does not; 0 if none does.

    It is the largest that fits, if what is larger than one that does not fit does not either.

    Example:
      >>> largest_that_fits(10, lambda i: i * i <= 30)
      5
    """
    low, high = 0, count  # all below `low` are taken to fit, and none from `high` on
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(middle) else (low, middle)
    return max(low - 1, 0)


def rules(ranks: Ranks) -> Rank:
    """`rank` of a recipe that says this of each leaf: one number, where it is the same for all.

    It is 1 where there is no leaf. Leaves whose names differ by numbers alone share a rule, where
    they share a rank.

    Example:
      >>> rules({"layers/0/up": 8, "layers/1/up": 8, "down": 16})
      [('^layers/\\\\d+/up$', 8), ('^down$', 16)]
    """
    if len({*ranks.values()}) <= 1:
        return next(iter(ranks.values()), 1)
    alike: dict[str, list[str]] = {}
    for name in ranks:
        alike.setdefault(re.sub(r"\d+", r"\\d+", re.escape(name)), []).append(name)
    said = []
    for pattern, names in alike.items():
        each = [(re.escape(name), ranks[name]) for name in names]
        same = len(names) > 1 and len({rank for _, rank in each}) == 1
        said += [(pattern, ranks[names[0]])] if same else each
    return [(f"^{pattern}$", rank) for pattern, rank in said]


def _short(spec: LeafSpec) -> int:
    return min(spec.m, spec.n)


def _distinct(candidates: Iterable[Ranks]) -> list[Ranks]:
    return [ranks for ranks, _ in itertools.groupby(candidates)]
