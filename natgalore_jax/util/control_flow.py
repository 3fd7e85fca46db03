"""Choices in a compiled program: by the platform, or by traced predicates, cheap when false."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


T = TypeVar("T")


def by_platform(
    *args: Any,
    gpu: Callable[..., T] | None = None,
    tpu: Callable[..., T] | None = None,
    default: Callable[..., T],
) -> T:
    """`gpu(*args)` in programs for NVIDIA and AMD GPUs, `tpu(*args)` for TPUs, else `default`."""
    given = {"cuda": gpu, "rocm": gpu, "tpu": tpu}
    branches = {name: f for name, f in given.items() if f is not None}
    return lax.platform_dependent(*args, **branches, default=default)


def when(predicate: Bool[Array, ""], f: Callable[[T], T], state: T) -> T:
    """`f(state)` if `predicate`, else `state`, as a loop of one iteration or none.

    A loop's carry stays in place, so a false predicate copies nothing and needs no memory; the
    branches of `lax.cond` copy their unchanged operands. On one H200, 224 projected leaves of
    1024 x 2736 at rank 128 behind one condition need 560 MB of temporaries with `cond` and 47 MB
    with this loop (`benchmarks/speed/bench_refresh.py`).

    Under `vmap` over `predicate`, `f` runs for all if it does for one: see :func:`for_any`. So `f`
    must itself leave the state of an instance whose predicate is false.
    """
    return lax.fori_loop(0, for_any(predicate).astype(jnp.int32), lambda _, x: f(x), state)


@jax.custom_batching.custom_vmap
def for_any(predicate: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """`predicate`; under `vmap` one predicate for all instances, true if it is for any of them.

    `vmap` turns a condition on a batched predicate into both branches and a select, and a loop on
    one into a loop that selects between all of its old and new carry. An optimizer under `vmap`,
    for random seeds say, would so run or copy what no instance needs.
    """
    return predicate


@for_any.def_vmap
def _(axis_size: int, in_batched: list[bool], predicate: Array) -> tuple[Array, bool]:
    del axis_size
    return for_any(predicate.any(axis=0) if in_batched[0] else predicate), False


BRANCHES = 32  # of a node of the trees below


def run_if_due(
    due: Sequence[Bool[Array, ""]], functions: Sequence[Callable[[Any], Any]], states: list[Any]
) -> list[Any]:
    """`f(state)` for each of `functions` that is due, and possibly for others in its group.

    Each function must therefore check its own predicate. The conditions form a tree: a GPU's host
    waits for the value of each condition, for a single one if nothing is due, and for about two
    dozen of hundreds if one leaf is due.
    """

    run = functools.partial(run_each, due, functions)
    return when(functools.reduce(operator.or_, due), run, states)


def run_each(
    due: Sequence[Bool[Array, ""]], functions: Sequence[Callable[[Any], Any]], states: list[Any]
) -> list[Any]:
    """`run_if_due` where one is known to be due: without the condition at the root of the tree."""
    if len(states) <= BRANCHES:
        return [f(state) for f, state in zip(functions, states, strict=True)]
    return [new for part in _parts(due, functions, states) for new in run_if_due(*part)]


def select_value(
    selected: Sequence[Bool[Array, ""]], values: Sequence[Callable[[], T]], other: T
) -> T:
    """`value()` of the one that is selected, or `other`, by a tree of conditions.

    With `lax.switch` every branch takes the operands of all branches, so the program's size would
    be quadratic in their number. A few values need no condition: on TPUs a loop's carry has the
    default layout, and a value that is sliced from an array in another layout would need a copy of
    the array.
    """
    if len(selected) <= BRANCHES:
        for condition, value in zip(selected, values, strict=True):
            other = jax.tree.map(functools.partial(jnp.where, condition), value(), other)
        return other
    for part in _parts(selected, values):
        any_here = functools.reduce(operator.or_, part[0])
        other = when(any_here, functools.partial(select_value, *part), other)
    return other


def _parts(*lists: Sequence[Any]) -> list[list[Sequence[Any]]]:
    """Splits each list into at most BRANCHES slices."""
    size = -(-len(lists[0]) // BRANCHES)
    return [[x[i : i + size] for x in lists] for i in range(0, len(lists[0]), size)]
