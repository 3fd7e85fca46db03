"""What the gradient of one use of a weight costs: floating-point operations of products, and bytes.

Of y = x W with T rows in x, a gradient takes 2 T m n, and its core takes

    x P:  2 T m r,        (x P)ᵀ ȳ:  2 T r n,        on both sides (x P)ᵀ (ȳ Q):  2 T r (m + n + r)

which is read off the labels of the product, as it is computed: stacks, heads and blocks have more.
Whatever is not a product counts for nothing.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jax_core
from jaxtyping import Array

from ..subspace.lift import expanded
from ..subspace.projection import core_dtype
from ..tree.leaf_spec import Basis, LeafSpec, path_name
from .dot_general import steps, terms
from .interpreter import Use, arrays, evaluate
from .loss import Bases
from .primitive_rules import axes_of
from .tangent_weight import Labels, TangentWeight, reshape, tag


class Cost(NamedTuple):
    """Of a use, as often as it is made in a step.

    Attributes:
      operation: its name.
      times: how often: the turns of the scans around it.
      in_while: whether a `while` is around it too, whose turns are not known: it counts as one.
      fell_back: whether its gradient is formed whole, for want of a rule.
      whole_flops: of the gradient.
      core_flops: of the core; with `fell_back` of the gradient and of projecting it.
      whole_bytes: of the gradient, of one turn.
    """

    operation: str
    times: int
    in_while: bool
    fell_back: bool
    whole_flops: int
    core_flops: int
    whole_bytes: int


def costs_of(
    program: jax_core.ClosedJaxpr, leaves: Sequence[tuple[Any, Array]], bases: Bases
) -> dict[str, list[Cost]]:
    """The cost of each use of each leaf in a program of them, by its name.

    Args:
      program: whose first output is the loss.
      leaves: paths and arrays, traced: of what is returned nothing is computed.
      bases: of those that are projected.
    """
    found: dict[Any, tuple[str, Cost]] = {}

    def report(use: Use):  # JAX may trace the body of a loop twice: each place counts once
        at = (*map(id, use.within), id(use.eqn), use.place)
        found[at] = use.weight.name, _cost(use)

    for projected in (True, False):  # apart: a product of two tagged weights has no rule
        values = [
            w if (path in bases) != projected else _tagged(path, w, bases.get(path, ()))
            for path, w in leaves
        ]
        arrays(evaluate(program, values, report)[:1], None, report)
    costs: dict[str, list[Cost]] = {path_name(path): [] for path, _ in leaves}
    for name, each in found.values():
        costs[name].append(each)
    return costs


def _tagged(path: tuple[Any, ...], w: Array, sides: Sequence[Basis]) -> TangentWeight:
    """A weight at W + P B Qᵀ or, where it is not projected, at W + B: then the core is G."""
    if sides:
        P, *_ = sides
        dtype = core_dtype(P, w)
        return tag(P.spec, w, jnp.zeros(P.spec.core_shape, dtype), *expanded(dtype, *sides))
    axes = tuple(range(w.ndim))
    v = TangentWeight(
        w, jnp.zeros_like(w), (), tuple((i,) for i in axes), axes, (), path_name(path)
    )
    as_is = reshape(v, w.shape)  # axes of length 1 have no label
    assert as_is is not None
    return as_is


def _cost(use: Use) -> Cost:
    v, names = use.weight, [eqn.primitive.name for eqn in use.within]
    lengths = [eqn.params["length"] for eqn in use.within if eqn.primitive.name == "scan"]
    times = math.prod(lengths)
    whole, core = _products(use)
    if use.whole:
        core = whole + _lifting(v, v.sizes)
    return Cost(
        use.operation,
        times,
        "while" in names,
        use.whole,
        times * whole,
        times * core,
        v.weight.size * v.weight.dtype.itemsize,
    )


def projecting(spec: LeafSpec) -> int:
    """The operations of PᵀG, or PᵀG Q, of all matrices of a leaf."""
    second = spec.rank**2 * spec.n if spec.both else 0
    return 2 * spec.matrices * (spec.m * spec.n * spec.rank + second)


def _products(use: Use) -> tuple[int, int]:
    """The operations of the gradient, and of the core where there is a rule."""
    v, eqn = use.weight, use.eqn
    if eqn is None:
        return 0, 0
    of = FLOPS.get(eqn.primitive.name)
    return of(eqn, v, use.place) if of else (0, 0)


def _dot_general(eqn: jax_core.JaxprEqn, v: TangentWeight, place: int) -> tuple[int, int]:
    first = place == 0
    x = eqn.invars[1 - place].aval
    x_axes, _, axes, out, sizes = terms(v, x.shape, *axes_of(eqn, first), first)
    whole = 2 * math.prod(sizes[n] for n in {*x_axes, *_flat(v)})
    return whole, _along(x_axes, axes, out, sizes)


def _gather(eqn: jax_core.JaxprEqn, v: TangentWeight, place: int) -> tuple[int, int]:
    """Of its rows, as of weights: what the gradient adds up is no product."""
    (axis, *_), indices = eqn.params["dimension_numbers"].start_index_map, eqn.invars[1].aval
    rows = dict.fromkeys(v.axes[axis], math.prod(indices.shape[:-1]))
    return 0, _lifting(v, v.sizes | rows)


def _conv(eqn: jax_core.JaxprEqn, v: TangentWeight, place: int) -> tuple[int, int]:
    """Of a kernel, or of what it goes over: each entry of the result has one term for each weight
    that is not of another output channel."""
    kernel = eqn.invars[1].aval
    channels = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * kernel.size // channels, 0


FLOPS: dict[str, Any] = {
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "gather": _gather,
}


def _flat(v: TangentWeight) -> Labels:
    return tuple(label for group in v.axes for label in group)


def _along(x_axes: Labels, axes: Sequence[Labels], out: Labels, sizes: dict[int, int]) -> int:
    """Of a :func:`product`, and as much of the other way through it."""
    of = lambda labels: 2 * math.prod(sizes[n] for n in labels)
    return sum(of({*x, *y}) for x, y, _ in steps(x_axes, axes, out))


def _lifting(v: TangentWeight, sizes: dict[int, int]) -> int:
    """Of P B Qᵀ, and as much of the other way through it: of Pᵀ G Q."""
    return _along(v.core_axes, v.bases_axes, _flat(v), sizes)
