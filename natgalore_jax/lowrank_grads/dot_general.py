"""Where a tagged weight is used: an array that has what the weight could add attached to it.

Of y = x W at W + P B Qᵀ and B = 0 that is the second term of

    y(B) = x W + (x P) B Qᵀ,    dy(B)/dB is linear,    B's cotangent: (x P)ᵀ (ȳ Q)               (1)

and a weight that is taken whole has P B Qᵀ itself attached. B = 0 is never multiplied: `attach`
adds to the tangent alone, so values are those of the program as it was, to the bit.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .tangent_weight import Labels, TangentWeight


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(delta: Callable[..., Array], y: Array, core: Array, *constants: Array) -> Array:
    """y + delta(core, *constants), for a `delta` linear in the core, which is zero: y."""
    return y


@attach.defjvp
def _attach_jvp(delta, primals, tangents):
    y, _, *constants = primals
    return y, tangents[0] + delta(tangents[1], *constants).astype(y.dtype)


def plain(v: TangentWeight) -> Array:
    """The weight as an array that hands its gradient, whole, on to the core."""
    axes = tuple(label for group in v.axes for label in group)
    along = lambda core, *bases: product(core, v.core_axes, bases, v.bases_axes, axes)
    delta = lambda core, *bases: along(core, *bases).reshape(v.weight.shape)
    return attach(delta, v.weight, v.core, *v.bases)


def product(
    x: Array,
    axes: Labels,
    others: Sequence[Array],
    others_axes: Sequence[Labels],
    out: Labels,
    **settings: Any,
) -> Array:
    """x times the others, one after the other, summed over the labels that are not in `out`."""
    for y, (x_axes, y_axes, to) in zip(others, steps(axes, others_axes, out), strict=True):
        place = {label: j for j, label in enumerate(dict.fromkeys((*x_axes, *y_axes)))}
        of = lambda labels, place=place: [place[label] for label in labels]
        x = jnp.einsum(x, of(x_axes), y, of(y_axes), of(to), **settings)
    return x


def steps(
    axes: Labels, others_axes: Sequence[Labels], out: Labels
) -> Iterator[tuple[Labels, Labels, Labels]]:
    """Of a `product`: the labels of both factors of each, and of what comes out."""
    for i, y_axes in enumerate(others_axes):
        later = {label for rest in others_axes[i + 1 :] for label in rest}
        kept = tuple(n for n in dict.fromkeys((*axes, *y_axes)) if n in later or n in out)
        to = out if i == len(others_axes) - 1 else kept
        yield axes, y_axes, to
        axes = to


class Terms(NamedTuple):
    """What (1) is in labels, for the `dot_general` of a weight and x.

    Attributes:
      x_axes: the labels of x, in one row.
      order: of the factors (B, P) or (B, P, Q): those that x is summed with come before B.
      axes: the labels of the factors, in that order.
      out: those of the result, in one row.
      sizes: of each label.
    """

    x_axes: Labels
    order: tuple[int, ...]
    axes: tuple[Labels, ...]
    out: Labels
    sizes: dict[int, int]


def terms(
    v: TangentWeight,
    shape: Sequence[int],
    contracted: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    first: bool,
) -> Terms:
    """The labels of a product with an x of that shape; the other arguments are those of `dot`."""
    of_x: list[Labels] = [(v.fresh + i,) for i in range(len(shape))]
    for at_v, at_x in (contracted, batch):
        for i, j in zip(at_v, at_x, strict=True):
            of_x[j] = v.axes[i]
    sizes = {n: size for size, group in zip(shape, of_x, strict=True) for n in group} | v.sizes
    in_v, in_x = {*contracted[0], *batch[0]}, {*contracted[1], *batch[1]}
    free_v = [group for i, group in enumerate(v.axes) if i not in in_v]
    free_x = [group for i, group in enumerate(of_x) if i not in in_x]
    shared = [v.axes[i] for i in batch[0]]
    groups = [*shared, *(free_v + free_x if first else free_x + free_v)]
    summed = {label for i in contracted[0] for label in v.axes[i]} - {*v.core_axes}
    factors = (v.core_axes, *v.bases_axes)
    before = [i for i, axes in enumerate(factors) if i and summed & {*axes}]
    after = [i for i, axes in enumerate(factors) if i and not summed & {*axes}]
    order = (*before, 0, *after)
    flat = lambda groups: tuple(label for group in groups for label in group)
    return Terms(flat(of_x), order, tuple(factors[i] for i in order), flat(groups), sizes)


def dot(
    v: TangentWeight,
    x: Array,
    y: Array,
    contracted: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    first: bool,
    precision: Any,
) -> Array:
    """y, the `dot_general` of a weight and x, with (1) attached to it.

    Args:
      v: the weight.
      x: the other operand.
      y: their product.
      contracted: axes of the weight, and of x.
      batch: the same of batch axes.
      first: whether the weight is the first operand.
      precision: of the products.
    """
    x_axes, order, axes, out, sizes = terms(v, x.shape, contracted, batch, first)

    def delta(core, x, *bases):
        factors = (core, *bases)
        arrays = [factors[i].astype(x.dtype) for i in order]  # x P comes first, and is kept for x
        x = x.reshape([sizes[label] for label in x_axes])
        return product(x, x_axes, arrays, axes, out, precision=precision).reshape(y.shape)

    return attach(delta, y, v.core, x, *v.bases)
