"""What a state becomes when the basis of its leaf changes from P to P'.

The core of a gradient G in the new basis is P'ᵀG. Of what the state remembers only the part in the
old subspace is known, G ≈ P R, whose new core is C R with

    C = P'ᵀ P,  a contraction: rows of C∘C sum to at most 1.                                  (1)

Of a matrix projected on both sides it is C R Dᵀ with D = Q'ᵀ Q: what is done to rows by C is done
to columns by D. L, a mean of R Rᵀ, has no columns to turn.

- linear states (momentum):      m ← C m
- squares (Adam's nu):           v ← (C∘C) v + (1 − (C∘C) 1) v̄,   v̄ the mean row of v         (2)
- the Fisher window:             H_i ← C H_i, and its Gram matrix anew
- the core Fisher:               L ← C L Cᵀ, and its root anew

(2) without its second term forgets the energy that C loses, while Adam's count says that v is
warm: after a large rotation Adam overshoots, for C = I/2 by 1.8 times for more than 50 steps. The
second term gives the part of a new direction that the old basis did not span the second moment
of a typical old one, so every new row is an average of old rows.

Without transport a training run depends on the signs the linear algebra library happens to give
to basis vectors. `keep`, which is what GaLore and the paper's code do, leaves states as they are.

`reset` forgets what belongs to the old directions: `rotate` with C = 0. All is as at the start but
squares, which become v̄: Adam's count is warm, and squares of zero would make it overshoot, up to
6.5 times at its defaults.

References: Robert et al., "LDAdam", arXiv:2410.16103 (rotation of both moments).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from .fisher_window import gram
from .linalg import matmul, rounded
from .spec import Role


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


def reset(
    states: Sequence[tuple[Role, Array]], C: Float[Array, "r r"], *D: Float[Array, "r r"]
) -> list[Array]:
    """What one matrix's state arrays are when nothing is known in the new basis or bases."""
    return [
        jnp.broadcast_to(x.mean(axis=(0, 1) if D else 0, keepdims=True), x.shape)
        if role == "square"
        else jnp.zeros_like(x)
        for role, x in states
    ]


TRANSPORTS: dict[str, Transport | None] = {"rotate": rotate, "reset": reset, "keep": None}
