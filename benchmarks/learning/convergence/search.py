"""Chooses the next run, a pure function of the finished runs.

Each method's learning rate is searched with the first seed on a grid in steps of two: four rates,
then more while the best is at an end, then, if `finer`, the rates half a step from the best. The
best rate is run with the other seeds. All methods are tuned before any gets a second seed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


FACTOR = 2.0
RATES = 4  # at first
MOST = 9  # rates of a method, if its best is still at an end


class Done(NamedTuple):
    """A finished run; the loss is inf if it diverged."""

    method: str
    rate: float
    seed: int
    loss: float


def grid(first: float) -> list[float]:
    return [first * FACTOR**i for i in range(RATES)]


def tuning(
    method: str, first: float, done: Sequence[Done], finer: bool = False, seed: int = 0
) -> float | None:
    """The next rate to try, or None if the best has tried neighbours on both sides."""
    losses = {run.rate: run.loss for run in done if (run.method, run.seed) == (method, seed)}
    if untried := [rate for rate in grid(first) if not any(near(rate, r) for r in losses)]:
        return untried[0]
    best = min(losses, key=lambda rate: losses[rate])
    if len(losses) >= MOST or math.isinf(losses[best]):
        return None
    if near(best, max(losses)):
        return best * FACTOR
    if near(best, min(losses)):
        return best / FACTOR
    between = [best * math.sqrt(FACTOR), best / math.sqrt(FACTOR)] if finer else []
    return next((rate for rate in between if not any(near(rate, r) for r in losses)), None)


def best_rate(method: str, done: Sequence[Done], seed: int = 0) -> float | None:
    """The rate with the lowest loss so far."""
    runs = [run for run in done if (run.method, run.seed) == (method, seed)]
    return min(runs, key=lambda run: run.loss).rate if runs else None


def next_run(
    methods: dict[str, float], seeds: int, done: Sequence[Done], finer: bool = False
) -> tuple[str, float, int] | None:
    """Method, rate and seed of the next run, or None if the search is complete.

    Args:
      methods: first rate of the grid of each method, in order.
      seeds: number of runs at the best rate.
      done: the finished runs.
      finer: whether to try rates half a step from the best too.
    """
    for method, first in methods.items():
        if (rate := tuning(method, first, done, finer)) is not None:
            return method, rate, 0
    for seed in range(1, seeds):
        for method in methods:
            rate = best_rate(method, done)
            if rate is not None and not any(
                run.method == method and run.seed == seed and near(run.rate, rate) for run in done
            ):
                return method, rate, seed
    return None


def near(a: float, b: float) -> bool:
    """Whether two rates are equal up to rounding."""
    return math.isclose(a, b, rel_tol=1e-3)
