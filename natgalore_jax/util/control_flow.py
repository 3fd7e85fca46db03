"""Conditions on the device that cost the steps on which they are false next to nothing."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


T = TypeVar("T")


def when(predicate: Bool[Array, ""], f: Callable[[T], T], state: T) -> T:
    """`f(state)` where `predicate` holds, else `state`: a loop of one turn or of none.

    A loop's carry stays in place, so a false predicate moves no bytes and needs no memory; the
    branches of `lax.cond` copy what they hand through. On one H200, 224 projected leaves of
    1024 x 2736 at rank 128 behind one condition: 560 MB of temporaries with `cond`, 47 MB so
    (`benchmarks/speed/bench_refresh.py`).

    Under `vmap` over `predicate` XLA runs `f` for all and selects, as it does for `lax.cond`.
    """
    return lax.fori_loop(0, predicate.astype(jnp.int32), lambda _, x: f(x), state)


BRANCHES = 8  # of a node of the trees below


def run_if_due(
    due: Sequence[Bool[Array, ""]], functions: Sequence[Callable[[Any], Any]], states: list[Any]
) -> list[Any]:
    """`f(state)` for each of `functions`; those that are due must be run, the others may be.

    Their conditions stand in a tree. A host that launches loops, as a GPU's does, waits for the
    value of each condition: for one if nothing is due, for two dozen of hundreds if one leaf is.
    """

    def run(states):
        if len(states) <= BRANCHES:
            return [f(state) for f, state in zip(functions, states, strict=True)]
        return [new for part in _parts(due, functions, states) for new in run_if_due(*part)]

    return when(functools.reduce(operator.or_, due), run, states)


def select_value(here: Sequence[Bool[Array, ""]], values: Sequence[Callable[[], T]], other: T) -> T:
    """The value of which `here` holds, or `other`; also in a tree.

    `lax.switch` hands all that any branch needs to every branch, so that the program would grow
    with the square of their number.
    """

    def run(other):
        if len(here) <= BRANCHES:
            for is_here, value in zip(here, values, strict=True):
                other = jax.tree.map(functools.partial(jnp.where, is_here), value(), other)
            return other
        for part in _parts(here, values):
            other = select_value(*part, other)
        return other

    return when(functools.reduce(operator.or_, here), run, other)


def _parts(*lists: Sequence[Any]) -> list[list[Sequence[Any]]]:
    """At most BRANCHES slices of each list."""
    size = -(-len(lists[0]) // BRANCHES)
    return [[x[i : i + size] for x in lists] for i in range(0, len(lists[0]), size)]
