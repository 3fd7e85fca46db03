"""Single matrices that are alike, as one stack: one program and one launch where hundreds were."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


TOGETHER = 24  # single matrices at most, so that one new root costs no more than so many


def alike(Rs: list[Float[Array, "..."]]) -> list[list[int]]:
    """The places of leaves that :func:`together` stacks: single matrices of one type.

    A stack of matrices is its own group, and stays where it is.
    """
    groups: dict[Any, list[int]] = {}
    for i, R in enumerate(Rs):
        groups.setdefault(i if R.ndim > 2 else jax.typeof(R), []).append(i)
    return [
        places[i : i + TOGETHER]
        for places in groups.values()
        for i in range(0, len(places), TOGETHER)
    ]


def together(
    f: Callable[..., Sequence[Array]], groups: list[list[int]], *lists: Sequence[Array]
) -> list[list[Array]]:
    """`f` of lists of the leaves' arrays, a list for each of its results.

    One program for a group and one launch, where an unrolled model has hundreds of leaves.
    """
    results: dict[int, Sequence[Array]] = {}
    for places in groups:
        if len(places) == 1:
            (i,) = places
            results[i] = f(*(xs[i] for xs in lists))
            continue
        stacks = f(*(jnp.stack([xs[i] for i in places]) for xs in lists))
        for j, i in enumerate(places):
            results[i] = [x[j] for x in stacks]
    return [list(xs) for xs in zip(*(results[i] for i in sorted(results)), strict=True)]
