"""A function of many arrays that are kept in codes, a few of which are decoded at a time.

The update of an optimizer takes its state whole, and so a program that decodes it, updates it and
encodes it again may have all of it decoded at once: compilers for CPUs and GPUs did, and 8-bit
AdamW needed more memory than AdamW. But most of an update is leaf by leaf. Its program tells which
arrays are needed together for any of its results; those are a part, and each part's arrays are
decoded only when those of the part before are encoded.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core as jax_core
from jaxtyping import Array, PyTree

from ..util.jaxprs import apply, called


LEAST = 2**22  # numbers of a part but the last: below, more kernels would be launched for no gain
INLINED = ("jit", "pjit", "closed_call")


class Step(NamedTuple):
    """An equation, with the places of its values."""

    eqn: jax_core.JaxprEqn
    inputs: list[Any]
    outputs: list[int]


class Constant(NamedTuple):
    """A value that is there from the start."""

    value: Any


def in_parts(
    f: Callable[[list[Array]], tuple[PyTree, list[Array]]],
    held: Sequence[Any],
    read: Callable[[int, Any], Array],
    write: Callable[[int, Array, Array], Any],
) -> tuple[PyTree, list[Any]]:
    """`f` of what is held, read, and its results written, part by part.

    Args:
      f: of all arrays, to anything, and to the new arrays in their places.
      held: what they are read from; trees of arrays.
      read: (place, held) -> array.
      write: (place, array, new array) -> what is to be held.

    Returns:
      What f returns first, and what is to be held.
    """
    arrays = list(map(read, range(len(held)), held))
    if sum(x.size for x in arrays) < 2 * LEAST or not _is_traced(held):
        rest, new = f(arrays)
        return rest, list(map(write, range(len(held)), arrays, new))
    program, shapes = jax.make_jaxpr(f, return_shape=True)(arrays)
    steps, outputs = _steps(program)
    needs = _needs(steps, len(arrays))
    wanted = [needs.get(x, 0) for x in outputs if not isinstance(x, Constant)]
    part_of, number = _parts([x.size for x in arrays], wanted)
    when = lambda mask: max((part_of[i] for i in _bits(mask)), default=0)
    stages: list[list[Step]] = [[] for _ in range(number)]
    for step in steps:
        stages[when(needs[step.outputs[0]] if step.outputs else 0)].append(step)
    of_new = outputs[len(outputs) - len(held) :]
    values: dict[int, Any] = {}
    of = lambda x: x.value if isinstance(x, Constant) else values[x]
    done: dict[int, Any] = {}
    before: list[int] = []
    for part, stage in enumerate(stages):
        mine = [i for i in range(len(held)) if part_of[i] == part]
        given = [held[i] for i in mine]
        if before:
            given, ended = lax.optimization_barrier((given, [done[i] for i in before]))
            done |= zip(before, ended, strict=True)
        values |= {i: read(i, x) for i, x in zip(mine, given, strict=True)}
        for step in stage:
            values |= zip(step.outputs, apply(step.eqn, list(map(of, step.inputs))), strict=True)
        for i in mine:
            unchanged = of_new[i] == i
            done[i] = held[i] if unchanged else write(i, values[i], of(of_new[i]))
        before = [i for i in mine if of_new[i] != i] or before
    rest, _ = jax.tree.structure(shapes).unflatten(map(of, outputs))
    return rest, [done[i] for i in range(len(held))]


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _steps(program: jax_core.ClosedJaxpr) -> tuple[list[Step], list[Any]]:
    """The equations in order, those of programs that are merely called among them; the outputs.

    Values are the places of inputs, and from there on those of results.
    """
    steps: list[Step] = []
    places = itertools.count(len(program.jaxpr.invars))

    def go(program: jax_core.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
        known = dict(zip(program.jaxpr.invars, inputs, strict=True))
        known |= zip(program.jaxpr.constvars, map(Constant, program.consts), strict=True)
        of = lambda x: Constant(x.val) if isinstance(x, jax_core.Literal) else known[x]
        for eqn in program.jaxpr.eqns:
            values = list(map(of, eqn.invars))
            if eqn.primitive.name in INLINED:
                known |= zip(eqn.outvars, go(called(eqn), values), strict=True)
                continue
            results = [next(places) for _ in eqn.outvars]
            steps.append(Step(eqn, values, results))
            known |= zip(eqn.outvars, results, strict=True)
        return list(map(of, program.jaxpr.outvars))

    return steps, go(program, range(len(program.jaxpr.invars)))


def _needs(steps: list[Step], inputs: int) -> dict[int, int]:
    """Of each value, which of the inputs it is computed from, as bits."""
    needs = {i: 1 << i for i in range(inputs)}
    for step in steps:
        mask = 0
        for x in step.inputs:
            mask |= 0 if isinstance(x, Constant) else needs[x]
        needs |= dict.fromkeys(step.outputs, mask)
    return needs


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _parts(sizes: list[int], wanted: list[int]) -> tuple[list[int], int]:
    """The part of each array, and how many there are: those that one result needs are together."""
    together = list(range(len(sizes)))

    def root(i: int) -> int:
        while together[i] != i:
            i = together[i]
        return i

    for mask in set(wanted):
        first, *others = _bits(mask) or [0]
        for i in others:
            together[max(root(first), root(i))] = min(root(first), root(i))
    part, filled, parts = 0, 0, {}
    for i in sorted(range(len(sizes)), key=root):
        if root(i) == i and filled >= LEAST:
            part, filled = part + 1, 0
        parts[i] = part
        filled += sizes[i]
    return [parts[i] for i in range(len(sizes))], part + 1
