"""Interpretation of jaxprs on values other than arrays."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend import core as jax_core


T = TypeVar("T")

# Names of primitives in different JAX versions.
JIT = ("jit", "pjit", "closed_call")
REMAT = ("remat", "remat2", "checkpoint")
CALLS = {*JIT, *REMAT, "custom_jvp_call", "custom_vjp_call", "custom_vmap_call"}


def interpret(
    program: jax_core.ClosedJaxpr,
    inputs: Sequence[T],
    of_constant: Callable[[jax.typing.ArrayLike], T],
    through: Callable[[jax_core.JaxprEqn, list[T]], list[T]],
) -> list[T]:
    """Interprets a program: the values of its outputs.

    Args:
      program: the closed jaxpr.
      inputs: a value for each input.
      of_constant: the value of a constant or literal.
      through: the values of an equation's outputs, from the equation and its operands' values.
    """
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= zip(jaxpr.constvars, map(of_constant, program.consts), strict=True)
    value = lambda var: of_constant(var.val) if isinstance(var, jax_core.Literal) else values[var]
    for eqn in jaxpr.eqns:
        values |= zip(eqn.outvars, through(eqn, [value(var) for var in eqn.invars]), strict=True)
    return [value(var) for var in jaxpr.outvars]


def called(eqn: jax_core.JaxprEqn) -> jax_core.ClosedJaxpr:
    """The jaxpr of an equation of `CALLS`."""
    call = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "call") if key in eqn.params)
    return call if isinstance(call, jax_core.ClosedJaxpr) else jax_core.ClosedJaxpr(call, ())


def apply(eqn: jax_core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on arrays, as JAX evaluates a jaxpr of that equation alone.

    So the equation keeps its name stack and its context, through JAX's public interface.
    """
    inputs = {
        var: x
        for var, x in zip(eqn.invars, values, strict=True)
        if not isinstance(var, jax_core.Literal)
    }
    jaxpr = _empty().replace(
        invars=list(inputs), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects
    )
    return jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(jaxpr, ()))(*inputs.values())


@functools.cache
def _empty() -> jax_core.Jaxpr:
    """An empty jaxpr, to `replace` from."""
    return jax.make_jaxpr(lambda: ())().jaxpr
