"""The residual T = G − P R, which the projection discards, added to the update: two rules.

A core R = PᵀG keeps r of the m directions of a gradient. No state is kept of the others.

**isotropic**: the m − r other coordinates of a column share one second moment, their mean square.
Adam's update of these coordinates would be

    S = φ ∘ T,    φ_j = 1 / √(|T_j|² / (m − r) + ρ |G_j|² / (m − r))                           (1)

This is the inverse root of a Fisher σ_j² (I − P Pᵀ) outside the subspace, as in probabilistic
principal components. Entries of S have size 1, as those of Adam's answer to a steady gradient. The
damping ρ = 1e-3 is for columns that lie in the span of P, where T is rounding.

**whitened**: T is orthogonalised, by Muon's Newton-Schulz iteration on this one gradient,

    S = √n polar(T / √(|T|² + ρ |G|²)),    polar(X) ≈ (X Xᵀ)^(-½) X,                           (2)

so that its singular values are equal, and entries of S have size 1 again (with √max(n, m − r) in
place of √n). Muon does the same to the momentum of the whole gradient. It costs products of m x m
and m x n.

The update is scale · (P U + S). (1) needs no product of its own, and does not form T:

    P U + φ ∘ T = P (U − φ ∘ R) + φ ∘ G,                                                       (3)
    |T_j|² = |G_j|² − |R_j|² = (|G_j| − |R_j|) (|G_j| + |R_j|)                                 (4)

for an orthonormal P. The error of (4) is the rounding of |G_j|²: it matters where |T_j|² is less
than a thousandth of |G_j|², where (1) is damped.

A core on both sides, PᵀG Q, has no columns of G: φ is then one number for a matrix, the inverse
root of the mean square over the m n − r² coordinates outside the subspace.

Both rules are this library's. Kin: Fira (arXiv:2410.01623), which scales the columns of T by
|U_j| / |R_j|; FRUGAL (arXiv:2411.07837), which takes the sign of T; COSMOS (arXiv:2502.17410) and
Pro-KLShampoo (arXiv:2605.06316), which orthogonalise the tail of a preconditioner and keep a
momentum there; SWAN (arXiv:2412.13148), which whitens whole gradients without state; Muon (Jordan
et al., 2024); Tipping and Bishop, "Probabilistic principal component analysis" (1999).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..util.linalg import norms, polar
from .basis import from_core


# (G − P R, R, U) -> S, of one matrix
Residual = Callable[
    [Float[Array, "m n"], Float[Array, "r k"], Float[Array, "r k"]], Float[Array, "m n"]
]
RESIDUALS = ("isotropic", "whitened")

DAMPING = 1e-3  # ρ of (1) and (2)


def with_residual(
    residual: str | Residual,
    G: Float[Array, "*batch m n"],
    R: Float[Array, "*batch r k"],
    U: Float[Array, "*batch r k"],
    *bases: Array,
    polar: Callable[[Array], Array] = polar,
) -> tuple[Float[Array, "*batch r k"], Float[Array, "*batch m n"]]:
    """P U + S as P U' + S': U' and S'.

    Args:
      residual: one of RESIDUALS, or a function that returns S for one matrix.
      G: gradients.
      R: their cores, k = n, or r on both sides.
      U: inner's answers.
      *bases: P, or P and Q.
      polar: of (2); on a mesh one that knows how G is sharded.

    Raises:
      ValueError: if the function returns another shape.
    """
    if residual == "isotropic":
        phi = isotropic(G, R, *(P.shape[-2] for P in bases))
        return U - phi * R, phi * G  # (3)
    if residual == "whitened":
        return U, whitened(G, R, *bases, polar=polar)
    batch_axes = G.ndim - 2
    S = _each(residual, batch_axes)(G - from_core(G.dtype, R, *bases), R, U)
    if jnp.shape(S) != G.shape:
        expected, got = G.shape[batch_axes:], jnp.shape(S)[batch_axes:]
        raise ValueError(f"`residual` must return an array of shape {expected}, got {got}.")
    return U, S.astype(G.dtype)


def isotropic(
    G: Float[Array, "*batch m n"], R: Float[Array, "*batch r k"], *sides: int
) -> Float[Array, "*batch 1 c"]:
    """φ of (1), for each column, or one for a matrix; `sides` are m, or m and n."""
    axes = (-2, -1) if len(sides) == 2 else (-2,)
    of_R, of_G = norms(R, axes), norms(G, axes, unit_from=R)
    left = math.prod(sides) - math.prod(R.shape[axis] for axis in axes)
    known = of_G > jnp.finfo(G.dtype).tiny
    of_G = jnp.where(known, of_G, 1.0)
    part = jnp.maximum(1 - of_R / of_G, 0.0) * (1 + of_R / of_G)
    return jnp.where(known, jnp.sqrt(left / (part + DAMPING)) / of_G, 0.0)


def whitened(
    G: Float[Array, "*batch m n"],
    R: Float[Array, "*batch r k"],
    *bases: Array,
    polar: Callable[[Array], Array] = polar,
) -> Float[Array, "*batch m n"]:
    """S of (2)."""
    (m, n), (r, k) = G.shape[-2:], R.shape[-2:]
    directions = min(m if len(bases) == 2 else m - r, n)
    if directions == 0:  # T is rounding alone
        return jnp.zeros_like(G)
    T = G - from_core(G.dtype, R, *bases)
    of_T, of_G = norms(T, (-2, -1), unit_from=G), norms(G, (-2, -1))
    known = of_G > jnp.finfo(G.dtype).tiny
    of_G = jnp.where(known, of_G, 1.0)
    unit = jnp.where(known, T / of_G / jnp.sqrt(jnp.square(of_T / of_G) + DAMPING), 0.0)
    return math.sqrt((m * n - r * k) / directions) * polar(unit)


def _each(f: Callable[..., Array], batch_axes: int) -> Callable[..., Array]:
    """A function of one matrix, mapped over `batch_axes` leading axes."""
    for _ in range(batch_axes):
        f = jax.vmap(f)
    return f
