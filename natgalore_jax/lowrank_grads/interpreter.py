"""Evaluates a jaxpr at projected weights, so that JAX differentiates it by their cores alone.

Each projected weight enters as a :class:`TangentWeight`, which stands for

    W(B) = W + P B Qᵀ at B = 0,    dL/dB = Pᵀ G Q                                               (1)

An equation with such an operand is evaluated by a rule of `primitive_rules.py`; the jaxprs of
`scan`, `cond`, `while`, `remat` and `jit` are evaluated recursively. Without a rule, or where the
rule does not hold, the weight is materialised: the result is still exact, but that use forms its
full gradient before the projection. Every use of a weight is reported.

Kin: Quax (patrick-kidger/quax), whose interpreter dispatches primitives on custom array types; its
LoraArray is W + A B with trained A and B. This interpreter adds rules for `scan` and `remat`, and
falls back where a rule is missing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from ..util.jaxprs import JIT, REMAT, apply, called, interpret
from .dot_general import materialise
from .primitive_rules import RULES, Value
from .tangent_weight import TangentWeight


class Use(NamedTuple):
    """An operation in which a weight becomes part of an array.

    Attributes:
      enclosing: equations whose jaxprs contain the operation, the outermost first.
      eqn: the operation; None where the weight is an output of the innermost jaxpr.
      operand: position of the weight among the operands, or the outputs.
      weight: the weight, as the operation receives it.
      fell_back: whether the weight was materialised for want of a rule.
    """

    enclosing: tuple[jax_core.JaxprEqn, ...]
    eqn: jax_core.JaxprEqn | None
    operand: int
    weight: TangentWeight
    fell_back: bool

    @property
    def operation(self) -> str:
        """Name of the operation's primitive; "output" for an output of the whole program."""
        eqns = self.enclosing[-1:] if self.eqn is None else (self.eqn,)
        return eqns[0].primitive.name if eqns else "output"


Report = Callable[[Use], None]


def evaluate(program: jax_core.ClosedJaxpr, values: Sequence[Value], report: Report) -> list[Value]:
    """The outputs of a program; an output may be a TangentWeight if an input is."""
    return interpret(program, values, lambda x: x, functools.partial(_evaluate_eqn, report))


def as_arrays(
    values: Sequence[Value],
    eqn: jax_core.JaxprEqn | None,
    report: Report,
    where: Callable[[int, TangentWeight], bool] = lambda operand, v: True,
) -> list[Any]:
    """Materialises the weights among the operands of `eqn`, or the outputs if it is None.

    `where(operand, weight)` selects weights; by default all.
    """

    def as_array(operand, x):
        if not isinstance(x, TangentWeight) or not where(operand, x):
            return x
        report(Use((), eqn, operand, x, fell_back=True))
        return materialise(x)

    return [as_array(operand, x) for operand, x in enumerate(values)]


def _evaluate_eqn(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    weights = [(i, x) for i, x in enumerate(values) if isinstance(x, TangentWeight)]
    if not weights:
        return apply(eqn, values)
    name = eqn.primitive.name
    if name in CONTROL_FLOW:
        outputs = CONTROL_FLOW[name](report, eqn, values)
    else:
        outputs = RULES[name](eqn, *values) if name in RULES else None
        if outputs is not None and not isinstance(outputs, list):
            outputs = [outputs]
        if outputs is not None and not any(isinstance(x, TangentWeight) for x in outputs):
            for operand, x in weights:
                report(Use((), eqn, operand, x, fell_back=False))
    return apply(eqn, as_arrays(values, eqn, report)) if outputs is None else outputs


# Control flow: `(report, eqn, operands)` to the outputs, or None where the rule does not hold.


def _call(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    return evaluate(called(eqn), values, _report_within(eqn, report))


def _remat(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    body = lambda *values: _array_outputs(report, eqn, called(eqn), values)
    settings = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
    return jax.checkpoint(body, **settings)(*values)


def _cond(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value] | None:
    index, *operands = values
    if isinstance(index, TangentWeight):
        return None
    run = lambda branch, *values: _array_outputs(report, eqn, branch, values)
    branches = [functools.partial(run, branch) for branch in eqn.params["branches"]]
    return lax.switch(index, branches, *operands)


def _while(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    n = eqn.params["cond_nconsts"]
    k = n + eqn.params["body_nconsts"]
    values = as_arrays(values, eqn, report, lambda operand, _: operand >= k)
    cond_constants, body_constants, carry = values[:n], values[n:k], values[k:]
    run = lambda key, *values: _array_outputs(report, eqn, eqn.params[key], values)
    return lax.while_loop(
        lambda carry: run("cond_jaxpr", *cond_constants, *carry)[0],
        lambda carry: run("body_jaxpr", *body_constants, *carry),
        carry,
    )


def _scan(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    program = eqn.params["jaxpr"]
    # Scanned inputs and stacked outputs have one axis more outside the body than inside. The
    # params that count them are named differently in different JAX versions.
    ndims = lambda vars: [len(var.aval.shape) for var in vars]
    count_longer = lambda outer, inner: sum(
        a > b for a, b in zip(ndims(outer), ndims(inner), strict=True)
    )
    scanned = count_longer(eqn.invars, program.jaxpr.invars)
    carried = len(eqn.outvars) - count_longer(eqn.outvars, program.jaxpr.outvars)
    j = len(values) - scanned
    i = j - carried
    where = lambda operand, v: operand >= i and (operand < j or not _scannable(v))
    values = as_arrays(values, eqn, report, where)
    constants, carry, stacks = values[:i], values[i:j], values[j:]
    split = [_split_stack(x) for x in stacks]

    def body(carry, layers):
        xs = [join(layer) for (_, join), layer in zip(split, layers, strict=True)]
        outputs = _array_outputs(report, eqn, program, [*constants, *carry, *xs])
        return outputs[:carried], outputs[carried:]

    settings = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, carry, [arrays for arrays, _ in split], **settings)
    return [*carry, *stacked]


def _scannable(v: TangentWeight) -> bool:
    """Whether the leading axis counts matrices, so that B is scanned along it too."""
    return len(v.axes[0]) == 1 and v.axes[0][0] in v.core_axes


def _split_stack(x: Value) -> tuple[Any, Callable[[Any], Value]]:
    """The arrays of a stack for `lax.scan`, and a function from their slices to the stack's slice.

    A factor without the stack's axis is not scanned: every slice has it whole.
    """
    if not isinstance(x, TangentWeight):
        return x, lambda layer: layer
    ((label,), *axes) = x.axes
    factors = (x.core, *x.bases)
    factors_axes = (x.core_axes, *x.bases_axes)
    scanned = [
        jnp.moveaxis(factor, labels.index(label), 0) if label in labels else None
        for factor, labels in zip(factors, factors_axes, strict=True)
    ]
    core_axes, *bases_axes = [tuple(n for n in labels if n != label) for labels in factors_axes]

    def join(layer):
        weight, slices = layer
        core, *bases = [
            factor if part is None else part for factor, part in zip(factors, slices, strict=True)
        ]
        return TangentWeight(
            weight, core, tuple(bases), tuple(axes), core_axes, tuple(bases_axes), x.name
        )

    return (x.weight, scanned), join


def _array_outputs(
    report: Report, eqn: jax_core.JaxprEqn, program: jax_core.ClosedJaxpr, values: Sequence[Value]
) -> list[Any]:
    """The outputs of a jaxpr of `eqn`, with weights among them materialised."""
    report = _report_within(eqn, report)
    return as_arrays(evaluate(program, values, report), None, report)


def _report_within(eqn: jax_core.JaxprEqn, report: Report) -> Report:
    """Reports uses in a jaxpr of `eqn`."""
    return lambda use: report(use._replace(enclosing=(eqn, *use.enclosing)))


CONTROL_FLOW: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(JIT, _call),
    **dict.fromkeys(REMAT, _remat),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
