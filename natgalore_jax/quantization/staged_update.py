"""A function of many QuantizedArrays, evaluated so that a few of them are decoded at a time.

An update takes the whole state, so a program that decodes it, updates it and encodes it may hold
all of it decoded at once: compilers for CPUs and GPUs scheduled 8-bit AdamW that way, and it needed
more memory than AdamW. But most of an update is leaf by leaf. Its jaxpr shows which QuantizedArrays
a result depends on; those form a stage. An optimization barrier makes the codes that a stage reads
available only when the previous stage has written its own.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core as jax_core
from jaxtyping import PyTree

from ..util.jaxprs import JIT, apply, called
from .quantized_array import QuantizedArray


LEAST = 2**22  # entries of a stage; smaller stages would only add kernel launches
FEW = 4  # arrays; a leaf has at most so many in Optax's optimizers and the core Fisher


class Equation(NamedTuple):
    """An equation with the numbers of its values; a constant input stands as itself."""

    eqn: jax_core.JaxprEqn
    inputs: list[Any]
    outputs: list[int]


class Constant(NamedTuple):
    value: Any


def update_in_stages(
    update: Callable[[list[Any]], tuple[PyTree, list[Any]]], leaves: list[Any], places: list[int]
) -> tuple[PyTree, list[Any]]:
    """`update(leaves)` of a state, which decodes and encodes the QuantizedArrays at `places`.

    `update` returns anything, and the new leaves. Its program decodes a stage at a time.
    """

    def on_arrays(arrays: list[QuantizedArray]):
        others, new = update(_replaced(leaves, places, arrays))
        return (others, _replaced(new, places, [None] * len(places))), [new[i] for i in places]

    (others, new), arrays = in_stages(on_arrays, [leaves[i] for i in places])
    return others, _replaced(new, places, arrays)


def _replaced(values: list[Any], places: list[int], new: list[Any]) -> list[Any]:
    """The list with the values at `places` replaced."""
    replaced = dict(zip(places, new, strict=True))
    return [replaced.get(i, x) for i, x in enumerate(values)]


def in_stages(
    f: Callable[[list[QuantizedArray]], tuple[PyTree, list[QuantizedArray]]],
    arrays: list[QuantizedArray],
) -> tuple[PyTree, list[QuantizedArray]]:
    """`f(arrays)`, whose program decodes the arrays of one stage at a time.

    Args:
      f: returns anything, and the new arrays in the places of the old.
      arrays: concrete, or few entries in all: `f` is called as it is.
    """
    leaves = jax.tree.leaves(arrays)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    if not traced or sum(x.size for x in arrays) < 2 * LEAST:
        return f(arrays)
    program, shapes = jax.make_jaxpr(f, return_shape=True)(arrays)
    owner = [i for i, x in enumerate(arrays) for _ in jax.tree.leaves(x)]
    equations, outputs, needs = _inlined(program, owner)
    wanted = [needs[x] for x in outputs if not isinstance(x, Constant)]
    stage_of, number = _stages([x.size for x in arrays], wanted)
    stage_of_mask = lambda mask: max((stage_of[i] for i in _bits(mask)), default=0)
    stages: list[list[Equation]] = [[] for _ in range(number)]
    for equation in equations:
        mask = needs[equation.outputs[0]] if equation.outputs else 0
        stages[stage_of_mask(mask)].append(equation)
    new_leaves = outputs[len(outputs) - len(leaves) :]
    values: dict[int, Any] = {}
    value_of = lambda x: x.value if isinstance(x, Constant) else values[x]
    before: list[int] = []
    for stage, its_equations in enumerate(stages):
        own = [i for i, array in enumerate(owner) if stage_of[array] == stage]
        inputs = [leaves[i] for i in own]
        if before:
            inputs, written = lax.optimization_barrier((inputs, [values[i] for i in before]))
            values |= zip(before, written, strict=True)
        values |= zip(own, inputs, strict=True)
        for eqn, places, results in its_equations:
            values |= zip(results, apply(eqn, list(map(value_of, places))), strict=True)
        changed = [new_leaves[i] for i in own if new_leaves[i] != i]
        before = [x for x in changed if not isinstance(x, Constant)] or before
    return jax.tree.structure(shapes).unflatten(map(value_of, outputs))


def _inlined(
    program: jax_core.ClosedJaxpr, owner: list[int]
) -> tuple[list[Equation], list[Any], dict[int, int]]:
    """The equations in order, the outputs, and for each value the arrays it needs, as bits.

    A call that needs more than FEW arrays, such as that of a jitted optimizer, is replaced by its
    equations. Values are numbered: first the inputs, then the results.
    """
    equations: list[Equation] = []
    needs = {i: 1 << array for i, array in enumerate(owner)}
    numbers = itertools.count(len(owner))

    def visit(program: jax_core.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
        known = dict(zip(program.jaxpr.invars, inputs, strict=True))
        known |= zip(program.jaxpr.constvars, map(Constant, program.consts), strict=True)
        read = lambda x: Constant(x.val) if isinstance(x, jax_core.Literal) else known[x]
        for eqn in program.jaxpr.eqns:
            values = list(map(read, eqn.invars))
            mask = 0
            for x in values:
                mask |= 0 if isinstance(x, Constant) else needs[x]
            if eqn.primitive.name in JIT and mask.bit_count() > FEW:
                known |= zip(eqn.outvars, visit(called(eqn), values), strict=True)
                continue
            results = [next(numbers) for _ in eqn.outvars]
            equations.append(Equation(eqn, values, results))
            known |= zip(eqn.outvars, results, strict=True)
            needs.update(dict.fromkeys(results, mask))
        return list(map(read, program.jaxpr.outvars))

    outputs = visit(program, range(len(program.jaxpr.invars)))
    return equations, outputs, needs


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _stages(sizes: list[int], wanted: list[int]) -> tuple[list[int], int]:
    """The stage of each array, and their number.

    Arrays that one result needs share a stage; consecutive ones are joined up to LEAST entries.
    """
    parent = list(range(len(sizes)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for mask in set(wanted):
        first, *others = _bits(mask) or [0]
        for i in others:
            parent[max(root(first), root(i))] = min(root(first), root(i))
    stage, filled, stage_of = 0, 0, {}
    for i in sorted(range(len(sizes)), key=root):
        if root(i) == i and filled >= LEAST:
            stage, filled = stage + 1, 0
        stage_of[i] = stage
        filled += sizes[i]
    return [stage_of[i] for i in range(len(sizes))], stage + 1
