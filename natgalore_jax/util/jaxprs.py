"""Reads a program, with its values replaced by what is known of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend import core as jax_core


T = TypeVar("T")

CALLS = {
    *("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"),
    *("remat", "remat2", "checkpoint"),  # one by different releases
}


def read(
    program: jax_core.ClosedJaxpr,
    inputs: Sequence[T],
    of_constant: Callable[[jax.typing.ArrayLike], T],
    through: Callable[[jax_core.JaxprEqn, list[T]], list[T]],
) -> list[T]:
    """What is known of a program's outputs from what is of its inputs.

    Args:
      program: with its constants.
      inputs: what is known of each.
      of_constant: what is known of a number or array in it.
      through: what is known of the results of an equation from what is of its inputs.
    """
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= zip(jaxpr.constvars, map(of_constant, program.consts), strict=True)
    of = lambda var: of_constant(var.val) if isinstance(var, jax_core.Literal) else known[var]
    for eqn in jaxpr.eqns:
        known |= zip(eqn.outvars, through(eqn, [of(var) for var in eqn.invars]), strict=True)
    return [of(var) for var in jaxpr.outvars]


def called(eqn: jax_core.JaxprEqn) -> jax_core.ClosedJaxpr:
    """The program that one of `CALLS` calls."""
    call = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params)
    return call if isinstance(call, jax_core.ClosedJaxpr) else jax_core.ClosedJaxpr(call, ())


def apply(eqn: jax_core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The results of one equation on arrays, by JAX's own evaluation of a program of just that."""
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
    """A program of nothing, with all that JAX wants to know of one."""
    return jax.make_jaxpr(lambda: ())().jaxpr
