"""Which run comes next: a pure function of the runs that are done.

Each method's learning rate is looked for on its own grid of steps of two, with the first seed: four
rates, then more while the best is at an end; if asked to be finer, then those half a step from the
best. The best one is run with the other seeds. All methods are tuned before the first gets a second
seed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


FACTOR = 2.0
RATES = 4  # to begin with
MOST = 9  # rates of a method, if its best is at an end still


class Done(NamedTuple):
    """A run that has ended, as far as the search looks at it; a loss of one that broke is inf."""

    method: str
    rate: float
    seed: int
    loss: float


def grid(first: float) -> list[float]:
    return [first * FACTOR**i for i in range(RATES)]


def tuning(
    method: str, first: float, done: Sequence[Done], finer: bool = False, seed: int = 0
) -> float | None:
    """The next rate to try, or None if the best of those tried has neighbours on both sides."""
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
    """Method, rate and seed of the run to make now, or None if all is done.

    Args:
      methods: in their order, each with the first rate of its grid.
      seeds: how many runs of the best rate.
      done: the runs so far.
      finer: whether to look half a step from the best rate too.
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
    """Whether two rates are one but for rounding."""
    return math.isclose(a, b, rel_tol=1e-3)
