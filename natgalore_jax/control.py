"""Conditions on the device that cost the steps on which they are false next to nothing."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


T = TypeVar("T")


def when(predicate: Bool[Array, ""], f: Callable[[T], T], state: T) -> T:
    """`f(state)` where `predicate` holds, else `state`: a loop of one turn or of none.

    A loop's carry stays in place, so a false predicate moves no bytes and needs no memory; the
    branches of `lax.cond` copy what they hand through. On one H200, 224 projected leaves of
    1024 x 2736 at rank 128 behind one condition: 560 MB of temporaries with `cond`, 47 MB so
    (`benchmarks/bench_refresh.py`).

    Under `vmap` over `predicate` XLA runs `f` for all and selects, as it does for `lax.cond`.
    """
    return lax.fori_loop(0, predicate.astype(jnp.int32), lambda _, x: f(x), state)


BRANCHES = 8  # of the tree of `where_due`


def where_due(
    due: Sequence[Bool[Array, ""]], functions: Sequence[Callable[[Any], Any]], states: list[Any]
) -> list[Any]:
    """`f(state)` for each of `functions`; those that are due must be run, the others may be.

    Their conditions stand in a tree. A host that launches loops, as a GPU's does, waits for the
    value of each condition: for one if nothing is due, for two dozen of hundreds if one leaf is.
    """

    def run(states):
        if len(states) <= BRANCHES:
            return [f(state) for f, state in zip(functions, states, strict=True)]
        size = -(-len(states) // BRANCHES)
        starts = range(0, len(states), size)
        parts = [[x[i : i + size] for x in (due, functions, states)] for i in starts]
        return [new for part in parts for new in where_due(*part)]

    return when(functools.reduce(operator.or_, due), run, states)
