"""What the projection left out, added in proportion to what was made of the rest.

A core R = PᵀG keeps r of the m directions of a gradient. Of the others nothing is remembered, so
inner cannot say how far to go along them, but it has said so of the column they are in:

    S = φ ∘ (G − P R),    φ_j = |U_j| / |R_j| for each column j, 0 where |R_j| = 0             (1)

with U inner's answer to R. A column that the basis has just lost would leap, so that S may grow by
no more than 1 % a step:

    S ← S min(1, γ |S_before| / |S|),    γ = 1.01                                              (2)

in the Frobenius norm, |S_before| as (2) left it at the last step on which there was an S; before
the first there is no limit. The update is scale · (P U + S).

It costs no product of its own, and no array of m x n:

    P U + φ ∘ (G − P R) = P (U − φ ∘ R) + φ ∘ G,                                               (3)
    |G_j − P R_j|² = |G_j|² − |R_j|² = (|G_j| − |R_j|) (|G_j| + |R_j|)                         (4)

for an orthonormal P. What (4) loses is rounding of |G_j|²: it is wrong where less than a
thousandth of a column is left, of which S then is less than a thousandth of P U.

A core on both sides, PᵀG Q, has no columns of G: φ = |U| / |R| is then one number for a matrix,
and G − P R Qᵀ is left out.

Reference: Chen et al., "Fira", arXiv:2410.01623, equations (7) to (9).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .basis import from_core
from .linalg import norms
from .roles import register_state
from .spec import is_core


# (G − P R, R, U) -> S, of one matrix
Residual = Callable[
    [Float[Array, "m n"], Float[Array, "r k"], Float[Array, "r k"]], Float[Array, "m n"]
]
RESIDUALS = ("fira",)

GROWTH = 1.01  # γ of (2), Fira's
# Of a column of G: what is less of it in the core is rounding of the sums there, and is no |R_j|.
RESOLUTION = 16


class ResidualState(NamedTuple):
    """What :func:`project` remembers with a `residual`.

    A state of its own, so that one without has the structure that it has always had: Orbax
    restores no field that was not saved, an empty one neither.

    Attributes:
      subspace: the :class:`SubspaceState`.
      norm: a tree like the params with a Core, (*batch) in the dtype of the cores, at each
        projected leaf and None elsewhere: |S_before| of (2), 0 before the first S.
    """

    subspace: PyTree
    norm: PyTree


register_state(ResidualState, norm="scalar")


def no_norms(cores: PyTree) -> PyTree:
    """The norms before the first S; `cores` is like the params, with a Core at projected leaves."""
    zeros = lambda x: x.replace(jnp.zeros_like(x.value, shape=x.value.shape[:-2]))
    return jax.tree.map(lambda x: zeros(x) if is_core(x) else None, cores, is_leaf=is_core)


def added(
    residual: str | Residual,
    G: Float[Array, "*batch m n"],
    R: Float[Array, "*batch r k"],
    U: Float[Array, "*batch r k"],
    finite: Bool[Array, "*batch"],
    before: Float[Array, "*batch"],
    *bases: Array,
) -> tuple[Float[Array, "*batch r k"], Float[Array, "*batch m n"], Float[Array, "*batch"]]:
    """P U + S as P U' + S': U', S', and the norm of S.

    Args:
      residual: "fira", or a function that makes S, to which (2) is applied as well.
      G: gradients.
      R: their cores, k = n, or r on both sides; 0 where not finite.
      U: inner's answers; 0 where not finite.
      finite: where they are; elsewhere S is 0, which leaves the norm as it was.
      before: |S_before|.
      *bases: P, or P and Q.
    """
    whole = finite[..., None, None]
    G = jnp.where(whole, G, 0)
    if callable(residual):
        S = _each(residual, len(finite.shape))(G - from_core(G.dtype, R, *bases), R, U)
        if jnp.shape(S) != G.shape:
            m_n, got = G.shape[finite.ndim :], jnp.shape(S)[finite.ndim :]
            raise ValueError(f"`residual` must return an array of shape {m_n}, got {got}.")
        S = jnp.where(whole, S, 0).astype(G.dtype)
        size = norms(S, (-2, -1))
        limit, norm = limited(size[..., 0, 0], before)
        return U, limit[..., None, None] * S, norm
    phi, size = fira(G, R, U, two_sided=len(bases) == 2)
    limit, norm = limited(size, before)
    phi = limit[..., None, None] * phi
    return U - phi * R, phi * G, norm


def fira(
    G: Float[Array, "*batch m n"],
    R: Float[Array, "*batch r k"],
    U: Float[Array, "*batch r k"],
    two_sided: bool,
) -> tuple[Float[Array, "*batch 1 c"], Float[Array, "*batch"]]:
    """φ of (1), for each column or the one of a matrix, and |S| by (4)."""
    axes = (-2, -1) if two_sided else (-2,)
    of_R, of_U = norms(R, axes), norms(U, axes)
    of_G = norms(G, axes, like=R)
    known = of_R > RESOLUTION * jnp.finfo(R.dtype).eps * of_G
    phi = jnp.where(known, of_U / jnp.where(known, of_R, 1.0), 0.0)
    left = jnp.sqrt(jnp.maximum(of_G - of_R, 0.0)) * jnp.sqrt(of_G + of_R)
    return phi, norms(jnp.where(known, phi * left, 0.0), (-2, -1))[..., 0, 0]


def limited(
    size: Float[Array, "*batch"], before: Float[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The factor of (2), and the norm to remember. An S of zero says nothing, and changes none."""
    grown = size > GROWTH * before
    limit = jnp.where((before > 0) & grown, GROWTH * before / jnp.where(grown, size, 1.0), 1.0)
    norm = limit * size
    return limit, jnp.where((norm > 0) & jnp.isfinite(norm), norm, before)


def _each(f: Callable[..., Array], batch_axes: int) -> Callable[..., Array]:
    """f of one matrix, for stacks of them."""
    for _ in range(batch_axes):
        f = jax.vmap(f)
    return f
