"""Evaluates a program at tagged weights, so that its gradients by their cores are low-rank.

An operation on a :class:`TangentWeight` weight has a rule in `primitive_rules.py`, giving another
or an
array, and programs within the program are evaluated in the same way. Where there is no rule, or it
does not hold, the weight is an array: still exact, but the gradient of that one use is formed whole
before it is projected. Every use is reported, with or without a rule.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from ..util.jaxprs import apply, called, read
from .dot_general import plain
from .primitive_rules import USES, Value
from .tangent_weight import TangentWeight


class Use(NamedTuple):
    """Where a weight becomes part of an array.

    Attributes:
      within: the equations whose programs it is in, the outermost first.
      eqn: the operation; None where the weight leaves the last of `within`, or the program.
      place: of the weight among its operands.
      weight: as it comes there.
      whole: whether it is taken as an array, for want of a rule.
    """

    within: tuple[jax_core.JaxprEqn, ...]
    eqn: jax_core.JaxprEqn | None
    place: int
    weight: TangentWeight
    whole: bool

    @property
    def operation(self) -> str:
        named = self.within[-1:] if self.eqn is None else (self.eqn,)
        return named[0].primitive.name if named else "output"


Report = Callable[[Use], None]


def evaluate(program: jax_core.ClosedJaxpr, values: Sequence[Value], report: Report) -> list[Value]:
    """The program's outputs, which may be TangentWeight where inputs are."""
    return read(program, values, lambda x: x, functools.partial(_through, report))


def arrays(
    values: Sequence[Value],
    eqn: jax_core.JaxprEqn | None,
    report: Report,
    which: Callable[[int, TangentWeight], bool] = lambda place, v: True,
) -> list[Any]:
    """The values, operands of `eqn`, with those weights as arrays of which `which` holds."""

    def whole(place, x):
        if not isinstance(x, TangentWeight) or not which(place, x):
            return x
        report(Use((), eqn, place, x, whole=True))
        return plain(x)

    return [whole(place, x) for place, x in enumerate(values)]


def inside(report: Report, eqn: jax_core.JaxprEqn) -> Report:
    """For what is used in a program of `eqn`."""
    return lambda use: report(use._replace(within=(eqn, *use.within)))


def _through(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    if not any(isinstance(x, TangentWeight) for x in values):
        return apply(eqn, values)
    name = eqn.primitive.name
    outputs = None
    if name in CONTROL:
        outputs = CONTROL[name](report, eqn, values)
    elif name in USES:
        outputs = USES[name](eqn, *values)
        outputs = outputs if outputs is None or isinstance(outputs, list) else [outputs]
        if outputs is not None and not any(isinstance(x, TangentWeight) for x in outputs):
            for place, x in enumerate(values):
                if isinstance(x, TangentWeight):
                    report(Use((), eqn, place, x, whole=False))
    return apply(eqn, arrays(values, eqn, report)) if outputs is None else outputs


def _call(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    return evaluate(called(eqn), values, inside(report, eqn))


def _arrays_of(
    report: Report, eqn: jax_core.JaxprEqn, program: jax_core.ClosedJaxpr, values: Sequence[Value]
) -> list[Any]:
    """The outputs of a program of `eqn` that no weight may leave as such."""
    report = inside(report, eqn)
    return arrays(evaluate(program, values, report), None, report)


def _remat(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    body = lambda *values: _arrays_of(report, eqn, called(eqn), values)
    settings = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
    return jax.checkpoint(body, **settings)(*values)


def _cond(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value] | None:
    index, *operands = values
    if isinstance(index, TangentWeight):
        return None
    run = lambda branch, *xs: _arrays_of(report, eqn, branch, xs)
    branches = [functools.partial(run, branch) for branch in eqn.params["branches"]]
    return lax.switch(index, branches, *operands)


def _while(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    n = eqn.params["cond_nconsts"]
    k = n + eqn.params["body_nconsts"]
    values = arrays(values, eqn, report, lambda place, _: place >= k)
    of_cond, of_body = values[:n], values[n:k]
    run = lambda key, *xs: _arrays_of(report, eqn, eqn.params[key], xs)
    return lax.while_loop(
        lambda carry: run("cond_jaxpr", *of_cond, *carry)[0],
        lambda carry: run("body_jaxpr", *of_body, *carry),
        values[k:],
    )


def _scan(report: Report, eqn: jax_core.JaxprEqn, values: list[Value]) -> list[Value]:
    program = eqn.params["jaxpr"]
    # What is scanned over, or stacked up, has one axis more outside than inside. The parameters
    # that count them have other names from one JAX to the next.
    ndims = lambda vars: [len(var.aval.shape) for var in vars]
    grows = lambda outer, inner: sum(a > b for a, b in zip(ndims(outer), ndims(inner), strict=True))
    scanned = grows(eqn.invars, program.jaxpr.invars)
    carried = len(eqn.outvars) - grows(eqn.outvars, program.jaxpr.outvars)
    last = len(values) - scanned
    first = last - carried
    cannot = lambda place, v: place >= first and (place < last or _unscannable(v))
    values = arrays(values, eqn, report, cannot)
    constants, carry, over = values[:first], values[first:last], values[last:]
    split = [_sliced(x) for x in over]

    def body(carry, parts):
        xs = [join(part) for (_, join), part in zip(split, parts, strict=True)]
        outputs = _arrays_of(report, eqn, program, [*constants, *carry, *xs])
        return outputs[:carried], outputs[carried:]

    settings = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, carry, [parts for parts, _ in split], **settings)
    return [*carry, *stacked]


def _unscannable(v: TangentWeight) -> bool:
    """Whether the leading axis is not that of matrices: B would not be cut along it."""
    return len(v.axes[0]) != 1 or v.axes[0][0] not in v.core_axes


def _sliced(x: Value) -> tuple[Any, Callable[[Any], Value]]:
    """What a scan goes over of x, and x's slice from what it then has."""
    if not isinstance(x, TangentWeight):
        return x, lambda part: part
    ((label,), *axes) = x.axes
    factors = [x.core, *x.bases]
    of_factors = [x.core_axes, *x.bases_axes]
    places = [labels.index(label) if label in labels else None for labels in of_factors]
    moved = [
        None if place is None else jnp.moveaxis(f, place, 0)
        for f, place in zip(factors, places, strict=True)
    ]
    core_axes, *bases_axes = [tuple(n for n in labels if n != label) for labels in of_factors]

    def join(parts):
        weight, parts = parts
        core, *bases = [f if part is None else part for f, part in zip(factors, parts, strict=True)]
        return TangentWeight(
            weight, core, tuple(bases), tuple(axes), core_axes, tuple(bases_axes), x.name
        )

    return (x.weight, moved), join


CONTROL: dict[str, Callable[..., Any]] = {
    **{name: _call for name in ("jit", "pjit", "closed_call")},
    **{name: _remat for name in ("remat", "remat2", "checkpoint")},
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
