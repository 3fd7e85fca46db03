"""The states of inner when the basis of their leaf changes from P to P'.

The core of a gradient G in the new basis is P'ᵀG. A state contains only the part of past gradients
in the old subspace, G ≈ P R, whose new core is C R with

    C = P'ᵀ P,  a contraction: rows of C∘C sum to at most 1.                                  (1)

For a matrix projected on both sides it is C R Dᵀ with D = Q'ᵀ Q: columns are transformed by D as
rows are by C.

- linear states (momentum):      m ← C m
- squares (Adam's nu):           v ← (C∘C) v + (1 − (C∘C) 1) v̄,   v̄ the mean row of v         (2)
- factored squares (Adafactor's), v = row colᵀ / mean(row), so that v keeps this form:
                                 row ← (C∘C) row + (1 − (C∘C) 1) mean(row),                   (3)
                                 col ← col · mean(new row) / mean(old row)
- the Fisher window:             H_i ← C H_i, and its Gram matrix recomputed
- the core Fisher, L a mean of R Rᵀ:  L ← C L Cᵀ, and its root recomputed

Without its second term, v of (2) would be too small after a large rotation, and Adam's bias
correction no longer helps: for C = I/2 its steps are 1.8 times too long for more than 50 steps. The
second term gives the part of a new direction outside the old span the second moment of an average
old direction, so every new row is an average of old rows.

Without transport a training run depends on the signs of basis vectors, which the linear algebra
library chooses. `keep`, as GaLore and the paper's code do, leaves states unchanged.

`reset` sets all states to zero but squares: each row of v becomes v̄, and factors become their
means. Squares of zero would make Adam's steps up to 6.5 times too long at its defaults, since its
count continues.

Reference: Robert et al., "LDAdam", arXiv:2410.16103 (rotation of both moments).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..fisher.window import gram
from ..tree.leaf_spec import LeafSpec
from ..tree.state_roles import (
    AXES,
    Role,
    Undeclared,
    fits,
    is_per_leaf_scalar,
    is_per_matrix,
    walk,
)
from ..util.linalg import matmul, rounded, state_product
from .weight_decay import CORE, VARIES


Transport = Callable[..., list[Array]]  # (states with roles, C) or, of both sides, (…, C, D)


def rotate(
    states: Sequence[tuple[Role, Array]], C: Float[Array, "r r"], *D: Float[Array, "r r"]
) -> list[Array]:
    """The state arrays of one matrix, given with their roles, in the new basis or bases."""
    rotated: list[Array] = []
    for role, x in states:
        match role:
            case "linear" | "window":
                CR = state_product(C, x)
                x = rounded(state_product(CR, D[0].mT) if D else CR, x.dtype)
            case "square":
                x = rotate_square(x, C)
                for d in D:
                    x = rotate_square(x.mT, d).mT
            case "square_rows":
                pass  # transformed with the columns, the next array
            case "square_cols":
                rotated[-1], x = rotate_factors(rotated[-1], x, C, *D)
            case "gram":
                x = gram(rotated[-1].astype(x.dtype))
            case "fisher":
                x = matmul(matmul(C, x), C.mT)
            case "root":
                x = jnp.zeros_like(x)
            case "scalar":
                pass
            case _:
                raise TypeError(f"no rule carries a state of role {role!r} to another basis.")
        rotated.append(x)
    return [rounded(new, old.dtype) for new, (_, old) in zip(rotated, states, strict=True)]


def rotate_square(v: Float[Array, "r n"], C: Float[Array, "r r"]) -> Float[Array, "r n"]:
    """Equation (2). Stays nonnegative.

    Exact where C permutes directions or flips signs, on TPUs to 16 bits.
    """
    squares = C * C
    # Rounding may let a row of an orthogonal C sum to a little more than 1.
    lost = jnp.maximum(1.0 - squares.sum(axis=-1, keepdims=True), 0.0)
    return state_product(squares, v) + lost * v.mean(axis=0, keepdims=True)


def rotate_factors(
    row: Float[Array, " r"],
    col: Float[Array, " n"],
    C: Float[Array, "r r"],
    *D: Float[Array, "r r"],
) -> tuple[Float[Array, " r"], Float[Array, " n"]]:
    """Equation (3), and for D the same with rows and columns exchanged: the factors of (2)."""
    row, col = _rotate_factor(row, col, C)
    for d in D:
        col, row = _rotate_factor(col, row, d)
    return row, col


def _rotate_factor(
    factor: Float[Array, " r"], other: Float[Array, " n"], C: Float[Array, "r r"]
) -> tuple[Float[Array, " r"], Float[Array, " n"]]:
    new, old_mean = rotate_square(factor[:, None], C)[:, 0], factor.mean()
    ratio = jnp.where(old_mean > 0, new.mean() / jnp.where(old_mean > 0, old_mean, 1.0), 1.0)
    return new, other * ratio


def reset(
    states: Sequence[tuple[Role, Array]], C: Float[Array, "r r"], *D: Float[Array, "r r"]
) -> list[Array]:
    """The state arrays of one matrix without what belongs to the old basis or bases."""
    new: list[Array] = []
    for role, x in states:
        match role:
            case "square":
                x = jnp.broadcast_to(x.mean(axis=(0, 1) if D else 0, keepdims=True), x.shape)
            case "square_rows":
                x = jnp.broadcast_to(x.mean(), x.shape)
            case "square_cols":
                x = jnp.broadcast_to(x.mean(), x.shape) if D else x
            case _:
                x = jnp.zeros_like(x)
        new.append(x)
    return new


TRANSPORTS: dict[str, Transport | None] = {"rotate": rotate, "reset": reset, "keep": None}


def check_roles(state: PyTree, origins: PyTree | None) -> None:
    """Raises if a state of inner cannot be carried to another basis.

    Args:
      state: of inner.
      origins: a tree like `state` with the origins of the arrays after the first update, see
        :func:`weight_decay.inspect`; or None.

    Raises:
      TypeError: if an array's role is unknown or does not fit its shape, or an array packs cores.
    """
    walk(state, _check_role)
    if origins is not None:
        walk(origins, _check_packed)


def _check_role(x: Any, role: Any, spec: LeafSpec | None) -> Any:
    if spec is None:
        return x
    if role is None or isinstance(role, Undeclared):
        raise TypeError(
            f"the state {role or 'of the inner transformation'} has no declared role, so it cannot "
            f"be carried to a new basis. {ADVICE}"
        )
    varies = role == "scalar" or is_per_leaf_scalar(x, role)
    if not varies and not (fits(x, role, spec) and is_per_matrix(x, role, spec)):
        axes = ", ".join(("*batch", *AXES[role]))
        raise TypeError(
            f"a state of the inner transformation for {spec.name} with role {role!r} must have the "
            f"shape ({axes}), {spec.rank} = r, to be carried to a new basis, got {x.shape}. "
            "(Adafactor factors the two longest axes, which mixes the matrices of a stack that is "
            'longer than the rank: pass it `factored=False`, or `transport="keep"` to '
            "`natgalore.project`.)"
        )
    return x


def _check_packed(origin: Any, role: Any, spec: LeafSpec | None) -> Any:
    packed = spec is None and origin & CORE and origin & VARIES
    if packed and role != "scalar":
        raise TypeError(
            "the inner transformation packs cores of several leaves in one array, as optax.flatten "
            f"does, so its state cannot be carried to a new basis. {ADVICE}"
        )
    return origin


ADVICE = (
    'Declare its roles with `natgalore.register_state`, or pass `transport="keep"` to '
    "`natgalore.project` to leave states as they are."
)
