"""What a state becomes when the basis of its leaf changes from P to P'.

The core of a gradient G in the new basis is P'ᵀG. Of what the state remembers only the part in the
old subspace is known, G ≈ P R, whose new core is C R with

    C = P'ᵀ P,  a contraction: rows of C∘C sum to at most 1.                                  (1)

Of a matrix projected on both sides it is C R Dᵀ with D = Q'ᵀ Q: what is done to rows by C is done
to columns by D. L, a mean of R Rᵀ, has no columns to turn.

- linear states (momentum):      m ← C m
- squares (Adam's nu):           v ← (C∘C) v + (1 − (C∘C) 1) v̄,   v̄ the mean row of v         (2)
- factored squares (Adafactor's), v = row colᵀ / mean(row), so that v stays of that form:
                                 row ← (C∘C) row + (1 − (C∘C) 1) mean(row),                   (3)
                                 col ← col · mean(row after) / mean(row before)
- the Fisher window:             H_i ← C H_i, and its Gram matrix anew
- the core Fisher:               L ← C L Cᵀ, and its root anew

(2) without its second term forgets the energy that C loses, while Adam's count says that v is
warm: after a large rotation Adam overshoots, for C = I/2 by 1.8 times for more than 50 steps. The
second term gives the part of a new direction that the old basis did not span the second moment
of a typical old one, so every new row is an average of old rows.

Without transport a training run depends on the signs the linear algebra library happens to give
to basis vectors. `keep`, which is what GaLore and the paper's code do, leaves states as they are.

`reset` forgets what belongs to the old directions: `rotate` with C = 0. All is as at the start but
squares, which become v̄ (a row of factors its mean): Adam's count is warm, and squares of zero would
make it overshoot, up to 6.5 times at its defaults.

References: Robert et al., "LDAdam", arXiv:2410.16103 (rotation of both moments).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..fisher.window import gram
from ..tree.leaf_spec import LeafSpec
from ..tree.state_roles import Role, Undeclared, is_per_leaf_scalar, slice_shape, walk
from ..util.linalg import matmul, rounded
from .weight_decay import CORE, VARIES


Transport = Callable[..., list[Array]]  # (states with roles, C) or, of both sides, (…, C, D)


def rotate(
    states: Sequence[tuple[Role, Array]], C: Float[Array, "r r"], *D: Float[Array, "r r"]
) -> list[Array]:
    """What one matrix's state arrays, each with its role, are in the new basis or bases."""
    rotated: list[Array] = []
    for role, x in states:
        match role:
            case "linear" | "window":
                turned = matmul(C, x)
                x = rounded(matmul(turned, D[0].mT) if D else turned, x.dtype)
            case "square":
                x = rotate_square(x, C)
                for d in D:
                    x = rotate_square(x.mT, d).mT
            case "square_rows":
                pass  # with the columns, which come next
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
    return rotated


def rotate_square(v: Float[Array, "r n"], C: Float[Array, "r r"]) -> Float[Array, "r n"]:
    """Equation (2). Stays nonnegative, and is exact where C permutes directions or flips signs."""
    squares = C * C
    # Rounding may let a row of an orthogonal C sum to a little more than 1.
    lost = jnp.maximum(1.0 - squares.sum(axis=-1, keepdims=True), 0.0)
    return matmul(squares, v) + lost * v.mean(axis=0, keepdims=True)


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
    turned: Float[Array, " r"], other: Float[Array, " n"], C: Float[Array, "r r"]
) -> tuple[Float[Array, " r"], Float[Array, " n"]]:
    new = rotate_square(turned[:, None], C)[:, 0]
    before = turned.mean()
    return new, other * jnp.where(before > 0, new.mean() / jnp.where(before > 0, before, 1.0), 1.0)


def reset(
    states: Sequence[tuple[Role, Array]], C: Float[Array, "r r"], *D: Float[Array, "r r"]
) -> list[Array]:
    """What one matrix's state arrays are when nothing is known in the new basis or bases."""
    forgotten: list[Array] = []
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
        forgotten.append(x)
    return forgotten


TRANSPORTS: dict[str, Transport | None] = {"rotate": rotate, "reset": reset, "keep": None}


def check_roles(state: PyTree, origins: PyTree | None) -> None:
    """Raises if something that inner remembers cannot be carried to another basis.

    Args:
      state: of inner.
      origins: a tree like it of what the first update makes each array from, as `decay.inspect`
        tells, or None where that is not known.

    Raises:
      TypeError: if an array's role is unknown or does not fit its shape, or cores are packed in it.
    """
    walk(state, _check_role)
    if origins is not None:
        walk(origins, _check_packed)


def _check_role(x: Any, role: Any, spec: LeafSpec | None) -> Any:
    if spec is None:
        return x
    if role is None or isinstance(role, Undeclared):
        raise TypeError(
            f"nothing is known of how the state {role or 'of the inner transformation'} depends on "
            f"the basis, so it cannot be carried to a new one. {ADVICE}"
        )
    part = slice_shape(role, spec)
    fits = part is None or is_per_leaf_scalar(x, role) or x.shape == (*spec.batch_shape, *part)
    if not fits:
        raise TypeError(
            f"what the inner transformation remembers of {spec.name} as {role!r} must have the "
            f"shape {(*spec.batch_shape, *part)} to be carried to a new basis, got {x.shape}. "
            "(Adafactor factors the two longest axes, which mixes the matrices of a stack that is "
            'longer than the rank: pass it `factored=False`, or `transport="keep"` to '
            "`natgalore.project`.)"
        )
    return x


def _check_packed(origin: Any, role: Any, spec: LeafSpec | None) -> Any:
    packed = spec is None and origin & CORE and origin & VARIES
    if packed and role != "scalar":
        raise TypeError(
            "the inner transformation remembers cores in an array that is not one leaf's, as "
            f"optax.flatten does, so it cannot be carried to a new basis. {ADVICE}"
        )
    return origin


ADVICE = (
    'Declare its roles with `natgalore.register_state`, or pass `transport="keep"` to '
    "`natgalore.project` to leave states as they are."
)
