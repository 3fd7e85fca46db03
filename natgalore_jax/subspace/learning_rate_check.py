"""Whether inner's answer goes against the gradient: a learning rate is in it.

A residual is to be measured before the learning rate, and is added with the gradient's sign. What
`optax.adamw` answers has the other sign, and a schedule's size besides, which the limit on the
residual's growth would take for growth. Nothing in a state says so, but the program does: Optax's
learning rates are numbers below zero that its last products have. So the program is read, for each
value, for

    what it is made of:   the gradient's cores, or remembered ones, or neither;
    whether it is minus:  a product of an odd number of what is, a sum of nothing that is not,  (1)
                          a choice between cases of which one is;

where of a sum only that counts which is most of the gradient: not the decay or noise beside it.
What is made of it in any other way is taken as it is: √v, a root of a Fisher, a mask.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jax_core
from jaxtyping import PyTree

from ..tree.leaf_spec import is_core
from ..util.jaxprs import CALLS, called, read
from .weight_decay import Misread


ZERO, OTHER, MEMORY, GRADIENT = range(4)


class Sign(NamedTuple):
    """What is known of a value.

    Attributes:
      source: what it is made of: the last of ZERO, OTHER, MEMORY, GRADIENT.
      minus: whether it is minus something.
    """

    source: int
    minus: bool = False


# Primitives that keep signs, and of several inputs the sign of all.
SUMS = {
    *("add", "add_any", "max", "min", "clamp", "concatenate", "reduce_sum", "cumsum", "psum"),
    *("broadcast_in_dim", "reshape", "squeeze", "transpose", "rev", "slice", "dynamic_slice"),
    *("dynamic_update_slice", "gather", "pad", "split", "copy", "copy_p", "convert_element_type"),
    *("reduce_precision", "pvary", "sign", "tanh", "erf", "cbrt"),
}
PRODUCTS = {"mul", "div", "dot_general"}


def check_learning_rate(
    program: jax_core.ClosedJaxpr, updates: PyTree, state: PyTree, params: PyTree, answer: PyTree
) -> None:
    """Raises if what a program answers at some Core is minus its gradient.

    Args:
      program: of an update, of the arrays of the next three.
      updates: its input, with Cores.
      state: its state.
      params: those it is given.
      answer: a tree like what it returns: the updates and the new state.

    Raises:
      ValueError: with what to do instead.
    """
    inputs = [
        Sign(source if is_core(node) else OTHER)
        for tree, source in ((updates, GRADIENT), (state, MEMORY), (params, OTHER))
        for node in jax.tree.leaves(tree, is_leaf=is_core)
        for _ in jax.tree.leaves(node)
    ]
    signs = jax.tree.structure(answer).unflatten(_signs(program, inputs))[0]
    for node in jax.tree.leaves(signs, is_leaf=lambda x: is_core(x) or isinstance(x, Sign)):
        if is_core(node) and node.value.minus and node.value.source >= MEMORY:
            raise Misread(
                f"`residual` takes inner's answer before the learning rate, but at "
                f"`{node.spec.name}` it is minus the gradient already. Put the learning rate after "
                "`natgalore.project_back()`: natgalore.chain(natgalore.project(residual=...), "
                "optax.scale_by_adam(), natgalore.project_back(), "
                "optax.add_decayed_weights(...), optax.scale_by_learning_rate(...)) in place of "
                "optax.adamw."
            )


def _signs(program: jax_core.ClosedJaxpr, inputs: Sequence[Sign]) -> list[Sign]:
    """Of a program's outputs from those of its inputs."""
    return read(program, inputs, _of_number, _through)


def _through(eqn: jax_core.JaxprEqn, inputs: list[Sign]) -> list[Sign]:
    """One equation of it."""
    name = eqn.primitive.name
    if name == "cond":
        branches = [_signs(branch, inputs[1:]) for branch in eqn.params["branches"]]
        return [_either(cases) for cases in zip(*branches, strict=True)]
    if name in CALLS:
        return _signs(called(eqn), inputs)
    if name == "optimization_barrier":
        return inputs
    return [_of(name, eqn, inputs)] * len(eqn.outvars)


def _of(name: str, eqn: jax_core.JaxprEqn, inputs: list[Sign]) -> Sign:
    if name == "neg":
        return _minus(inputs[0])
    if name == "sub":
        return _sum([inputs[0], _minus(inputs[1])])
    if name == "select_n":
        return _either(inputs[1:])
    if name in PRODUCTS:
        return _product(inputs)
    if name == "integer_pow" and eqn.params["y"] % 2:
        return inputs[0]
    if name in SUMS:
        return _sum(inputs)
    return Sign(max((x.source for x in inputs), default=OTHER) or OTHER)


def _minus(x: Sign) -> Sign:
    return x if x.source == ZERO else Sign(x.source, not x.minus)


def _sum(inputs: Iterable[Sign]) -> Sign:
    """Of (1): minus where all of it is that is most of the gradient."""
    inputs = list(inputs)
    source = max(x.source for x in inputs)
    return Sign(source, all(x.minus for x in inputs if x.source == source) and source != ZERO)


def _either(cases: Sequence[Sign]) -> Sign:
    """Of a condition: minus where a case is, since it may be that one."""
    source = max(x.source for x in cases)
    return Sign(source, any(x.minus for x in cases if x.source == source))


def _product(inputs: list[Sign]) -> Sign:
    if any(x.source == ZERO for x in inputs):
        return Sign(ZERO)
    return Sign(max(x.source for x in inputs), math.prod(-1 if x.minus else 1 for x in inputs) < 0)


def _of_number(x: Any) -> Sign:
    """Of a constant: of an array, or one that is traced, nothing is known."""
    if np.ndim(x) or isinstance(x, jax.core.Tracer) or not np.isrealobj(x):
        return Sign(OTHER)
    return Sign(OTHER, bool(x < 0)) if x else Sign(ZERO)
