"""Products of a :class:`TangentWeight`, with the term of B attached to their tangent alone.

For y = x W at W + P B Qᵀ and B = 0,

    y(B) = x W + (x P) B Qᵀ,    cotangent of B: (x P)ᵀ (ȳ Q)                                    (1)
    W(B) =   W + P B Qᵀ,        cotangent of B: Pᵀ G Q, with G formed first                     (2)

:func:`dot` computes (1). :func:`materialise` computes (2), for an operation without a rule. B = 0
enters no primal product: :func:`attach` adds the term to the tangent, so the values of the program
are bit for bit those without B.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .tangent_weight import Labels, TangentWeight


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(delta: Callable[..., Array], y: Array, core: Array, *constants: Array) -> Array:
    """y, with the tangent of y + delta(core, *constants); `delta` is linear in the core, zeros."""
    return y


@attach.defjvp
def _attach_jvp(delta, primals, tangents):
    y, _, *constants = primals
    return y, tangents[0] + delta(tangents[1], *constants).astype(y.dtype)


def materialise(v: TangentWeight) -> Array:
    """The weight as an array, with (2) attached: its full gradient is formed, then projected."""

    def delta(core, *bases):
        full = einsum_chain(core, v.core_axes, bases, v.bases_axes, _flat(v.axes))
        return full.reshape(v.weight.shape)

    return attach(delta, v.weight, v.core, *v.bases)


def dot(
    v: TangentWeight,
    x: Array,
    y: Array,
    contracted: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    first: bool,
    precision: Any,
) -> Array:
    """Attaches (1) to y, the `dot_general` of a weight and x.

    Args:
      v: the weight.
      x: the other operand.
      y: their product.
      contracted: contracted axes of the weight, and of x.
      batch: batch axes of the weight, and of x.
      first: whether the weight is the first operand.
      precision: precision of the products.
    """
    (v_contracted, x_contracted), (v_batch, x_batch) = contracted, batch
    x_axes: list[Labels] = [(v.next_label + j,) for j in range(x.ndim)]
    sizes = dict(enumerate(x.shape, v.next_label)) | v.sizes
    for i, j in zip((*v_contracted, *v_batch), (*x_contracted, *x_batch), strict=True):
        x_axes[j] = v.axes[i]
    v_free = [axis for i, axis in enumerate(v.axes) if i not in (*v_contracted, *v_batch)]
    x_free = [axis for j, axis in enumerate(x_axes) if j not in (*x_contracted, *x_batch)]
    y_axes = [*(v.axes[i] for i in v_batch), *(v_free + x_free if first else x_free + v_free)]

    # Bases with contracted labels come before B: the backward pass then needs x P, not x.
    factors_axes = (v.core_axes, *v.bases_axes)
    summed = {*_flat([v.axes[i] for i in v_contracted])} - {*v.core_axes}
    before = [i for i, axes in enumerate(factors_axes) if summed & {*axes}]
    after = [i for i in range(1, len(factors_axes)) if i not in before]
    order = (*before, 0, *after)

    def delta(core, x, *bases):
        x = x.reshape([sizes[label] for label in _flat(x_axes)])
        factors = [(core, *bases)[i].astype(x.dtype) for i in order]
        axes = [factors_axes[i] for i in order]
        out = einsum_chain(x, _flat(x_axes), factors, axes, _flat(y_axes), precision=precision)
        return out.reshape(y.shape)

    return attach(delta, y, v.core, x, *v.bases)


def einsum_chain(
    x: Array,
    axes: Labels,
    factors: Sequence[Array],
    factors_axes: Sequence[Labels],
    out: Labels,
    **settings: Any,
) -> Array:
    """x times the factors from left to right, summed over the labels that are not in `out`."""
    for i, (factor, factor_axes) in enumerate(zip(factors, factors_axes, strict=True)):
        both = tuple(dict.fromkeys((*axes, *factor_axes)))
        later = {*out}.union(*factors_axes[i + 1 :])
        to = out if i == len(factors) - 1 else tuple(label for label in both if label in later)
        place = {label: j for j, label in enumerate(both)}  # einsum takes small integers
        x_axes, y_axes, z_axes = ([place[n] for n in labels] for labels in (axes, factor_axes, to))
        x, axes = jnp.einsum(x, x_axes, factor, y_axes, z_axes, **settings), to
    return x


def _flat(axes: Sequence[Labels]) -> Labels:
    return tuple(label for group in axes for label in group)
