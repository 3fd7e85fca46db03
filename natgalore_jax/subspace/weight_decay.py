"""Weight decay of an inner optimizer, which never sees the weights.

Inner works on cores, but `optax.adamw` also decays weights, and decay belongs on the whole weight.
So inner gets core-shaped weights w = 0, and its jaxpr shows how its answer depends on them.
Decoupled decay gives

    u(w) = u(0) + a w,    a a number (−lr · weight_decay, 0 where masked)                       (1)

and the engine adds a W for the whole weight W. An inner without (1) (LAMB's trust ratio, coupled
L2, clipping after decay), or whose state contains weights (schedule-free, MADGRAD), is refused: it
would read weights that it is not given.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core as jax_core
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from ..sharding.array_partitions import with_auto_axes
from ..tree.cores import core_arrays, cores, is_core, replace_cores
from ..util.jaxprs import CALLS, called, interpret


# The origins of a value, as bits. Numbers, and arrays of one repeated number, have none.
WEIGHT = 1  # a core's weights times a number
READ = 2  # a core's weights in any other way
VARIES = 4  # its elements differ
CORE = 8  # its elements are those of a core's gradient or state

# Primitives whose result is linear in all their inputs, element by element.
LINEAR = {
    *("add", "add_any", "sub", "neg", "copy", "copy_p", "convert_element_type"),
    *("broadcast_in_dim", "reshape", "squeeze", "pvary"),
}


# (updates, state, params) -> (answer, new state)
Update = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class Misread(ValueError):
    """The inner transformation needs what cores do not have."""


def refuse(reason: str) -> None:
    raise Misread(
        f"the inner transformation cannot work on cores: {reason}. Decoupled weight decay as in "
        "optax.adamw is carried to the whole weight, and optax.adafactor works with "
        "multiply_by_parameter_scale=False. What reads weights in any other way belongs outside of "
        "`natgalore.project`: as a stage after `natgalore.project_back()`, or, as "
        "optax.contrib.schedule_free and other wrappers, around the whole optimizer."
    )


def refuse_evaluation(*args: Any, **kwargs: Any) -> None:
    """Stands for functions among inner's extra arguments, such as `value_fn` of a line search."""
    refuse("it evaluates the loss or its gradients, at weights that it is not given")


# The extra arguments that Optax's own transformations require, which accept no others.
OPTAX_ARGS = ((), ("value",), ("value", "grad", "value_fn"), ("grad_fn",), ("obj_fn",))


def update_with_decay(
    update: Update, updates: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, list[Float[Array, ""] | None], PyTree]:
    """Inner's answer at w = 0, the a of (1) for each Core (None where it is 0), its new state.

    Args:
      update: of inner; jitted, so that reading its program and calling it trace it once.
      updates: its input, with Cores.
      state: its state.
      params: like `updates`: zeros in the Cores, weights elsewhere; or None.

    Raises:
      ValueError: if (1) does not hold for inner.
    """
    if params is None:
        answer, new_state = update(updates, state, None)
        return answer, [None] * len(cores(updates)), new_state
    answer_origins, _ = _read_update(update, updates, state, params, ())
    is_decayed = [origin & WEIGHT for origin in core_arrays(answer_origins)]
    if not any(is_decayed):
        answer, new_state = update(updates, state, params)
        return answer, [None] * len(is_decayed), new_state

    def of_weights(values):
        answer, new_state = update(updates, state, replace_cores(params, values))
        return core_arrays(answer), (answer, new_state)

    zeros = core_arrays(params)
    ones = [jnp.ones_like(x) for x in zeros]
    _, slopes, (answer, new_state) = jax.jvp(of_weights, (zeros,), (ones,), has_aux=True)
    first = lambda x: with_auto_axes(lambda x: x.ravel()[0], PartitionSpec(), x)
    decay = [first(x) if own else None for x, own in zip(slopes, is_decayed, strict=True)]
    return answer, decay, new_state


def inspect(
    inner: optax.GradientTransformationExtraArgs, params: PyTree, state: PyTree
) -> PyTree | None:
    """Refuses an inner that misreads weights as soon as its state is made.

    Args:
      inner: the transformation.
      params: what it was initialised with: Cores and other leaves; shapes suffice.
      state: its state.

    Returns:
      A tree like `state` with the origins of the new state. None if inner requires extra
      arguments of its own: then the first update is inspected.

    Raises:
      ValueError: if `inner` misreads weights.
    """
    closed = jax.make_jaxpr(inner.init)(params)
    memory = _origins(closed, [WEIGHT if of_core else 0 for of_core in _of_cores(params)])
    for names in OPTAX_ARGS:
        values = {"value": np.float32(0.0), "grad": params}
        extra_args = {name: values.get(name, refuse_evaluation) for name in names}
        update = functools.partial(inner.update, **extra_args)
        try:
            return _read_update(update, params, state, params, memory)[1]
        except Misread:
            raise
        except (TypeError, ValueError):  # these are not the arguments that inner requires
            continue
    _refuse_memory(memory)
    return None


def _read_update(
    update: Update, updates: PyTree, state: PyTree, params: PyTree, memory: Sequence[int]
) -> tuple[PyTree, PyTree]:
    """The origins of the answer and of the new state; refuses what (1) does not hold for.

    `memory` are the origins of the state's arrays, if known.
    """
    try:
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(updates, state, params)
    except Misread:
        raise
    except Exception as error:
        error.add_note(
            "natgalore.project: this is from its `inner`, which is given cores, arrays of r x n, "
            "and zeros in place of their weights. What needs whole weights belongs outside of it."
        )
        raise
    inputs = [
        (VARIES if np.ndim(x) else 0) | (CORE if of_core else 0)
        for tree in (updates, state)
        for x, of_core in zip(jax.tree.leaves(tree), _of_cores(tree), strict=True)
    ]
    for place, bits in enumerate(memory, start=len(inputs) - len(memory)):
        inputs[place] |= bits & (WEIGHT | READ)
    inputs += [WEIGHT if of_core else VARIES for of_core in _of_cores(params)]
    origins = jax.tree.structure(shapes).unflatten(_origins(closed, inputs))
    _refuse_other_shapes(updates, shapes[0])
    _refuse_memory(origins[1])
    if any(bits & READ for bits in core_arrays(origins[0])):
        refuse("what it adds is not a number times the weight")
    others = jax.tree.map(lambda x: None if is_core(x) else x, origins[0], is_leaf=is_core)
    if any(bits & (WEIGHT | READ) for bits in jax.tree.leaves(others)):
        refuse("the update of one leaf depends on the weights of another")
    return origins


def _refuse_memory(state_origins: PyTree) -> None:
    if any(bits & (WEIGHT | READ) for bits in jax.tree.leaves(state_origins)):
        refuse("its state would remember weights")


def _refuse_other_shapes(updates: PyTree, answer: PyTree) -> None:
    if jax.tree.structure(updates) != jax.tree.structure(answer):
        refuse("its answer has another structure than its input")
    for x, u in zip(jax.tree.leaves(updates), jax.tree.leaves(answer), strict=True):
        if x.shape != u.shape:
            refuse(f"it answers a gradient of shape {x.shape} with one of shape {u.shape}")


def _of_cores(tree: PyTree) -> list[bool]:
    """For each array of a tree whether it belongs to a Core."""
    nodes = jax.tree.leaves(tree, is_leaf=is_core)
    return [is_core(node) for node in nodes for _ in jax.tree.leaves(node)]


def _origins(closed: jax_core.ClosedJaxpr, origins: Sequence[int]) -> list[int]:
    """The origins of a program's outputs from those of its inputs."""
    return interpret(closed, origins, lambda x: VARIES if np.ndim(x) else 0, _through)


def _through(eqn: jax_core.JaxprEqn, inputs: list[int]) -> list[int]:
    """The origins of an equation's outputs from those of its inputs."""
    name = eqn.primitive.name
    if name == "cond":
        branches = [_origins(branch, inputs[1:]) for branch in eqn.params["branches"]]
        outputs = [_chosen(inputs[0], list(cases)) for cases in zip(*branches, strict=True)]
    elif name in CALLS:
        outputs = _origins(called(eqn), inputs)
    elif name in RULES:
        outputs = [RULES[name](eqn, inputs)]
    else:
        outputs = [_misread(inputs) | VARIES] * len(eqn.outvars)
    # The elements of a scalar do not differ.
    return [
        bits if var.aval.shape else bits & (WEIGHT | READ)
        for var, bits in zip(eqn.outvars, outputs, strict=True)
    ]


def _union(inputs: Sequence[int]) -> int:
    return int(np.bitwise_or.reduce(list(inputs))) if inputs else 0


def _misread(inputs: Sequence[int]) -> int:
    bits = _union(inputs)
    return bits | READ if bits & WEIGHT else bits


def _chosen(index: int, cases: list[int]) -> int:
    """The origins of a selection: those of the cases, if the index is one for all elements."""
    return _misread([index, *cases]) if index else _union(cases)


def _linear(eqn: jax_core.JaxprEqn, inputs: list[int]) -> int:
    real = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
    return _union(inputs) if real else _misread(inputs)


def _product(eqn: jax_core.JaxprEqn, inputs: list[int]) -> int:
    if any(_is_zero(var) for var in eqn.invars):
        return 0  # a weight decay of zero, say
    return _union(inputs) if 0 in inputs else _misread(inputs)


def _quotient(eqn: jax_core.JaxprEqn, inputs: list[int]) -> int:
    return _union(inputs) if inputs[1] == 0 else _misread(inputs)


def _is_zero(var: Any) -> bool:
    return isinstance(var, jax_core.Literal) and np.ndim(var.val) == 0 and bool(var.val == 0)


RULES: dict[str, Callable[[jax_core.JaxprEqn, list[int]], int]] = {
    **dict.fromkeys(LINEAR, _linear),
    "mul": _product,
    "div": _quotient,
    "select_n": lambda eqn, inputs: _chosen(inputs[0], inputs[1:]),
}
