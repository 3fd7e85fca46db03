"""The residual T = G − P R, which the projection discards, added to the update: two rules.

A core R = PᵀG keeps r of the m directions of a gradient; the update is scale · (P U + γ S), with S
computed from T, and γ the `residual_scale`.

**isotropic**: the m − r other coordinates of a column share one second moment, their mean square.
Adam's update of these coordinates would be

    S = φ ∘ T,    φ_j = 1 / √(|T_j|² / (m − r) + ρ |G_j|² / (m − r))                           (1)

This is the inverse root of a Fisher σ_j² (I − P Pᵀ) outside the subspace, as in probabilistic
principal components. Entries of S have size 1, as those of Adam's answer to a steady gradient. The
damping ρ = 1e-3 is for columns that lie in the span of P, where T is rounding.

**whitened**: T is orthogonalised, by the Newton-Schulz iteration of `util/orthogonalize.py`,

    S = √n polar(T / √(|T|² + ρ |G|²)),    polar(X) ≈ (X Xᵀ)^(-½) X,                           (2)

so that its singular values are equal, and entries of S have size 1 again (with √max(n, m − r) in
place of √n). It costs products of m x m and m x n.

**Momentum.** By default T is that of one gradient, and the residual has no state. With a decay β
the state has the momentum M (m x n) of T, and N, Nesterov's momentum, replaces T in (1) and (2):

    M ← β (I − P Pᵀ) M + (1 − β) T,    N = β M + (1 − β) T                                     (3)

and ρ |G|² is that of (1 − β) G, the share of this gradient in N. M is orthogonal to P: the leading
directions are in inner's momentum and not in M, so that they do not coarsen an M in 8 or 4 bits.
A refresh does not touch M. The first projection on the new P, (3) in the next update, removes the
directions that have entered the subspace: for two bases P and P' in turn, M is
(1 − β) (I − P'P'ᵀ) [G' + β (I − P Pᵀ) G + …].

Without momentum (1) needs no product of its own, and does not form T:

    P U + φ ∘ T = P (U − φ ∘ R) + φ ∘ G,                                                       (4)
    |T_j|² = |G_j|² − |R_j|² = (|G_j| − |R_j|) (|G_j| + |R_j|)                                 (5)

for an orthonormal P. The error of (5) is the rounding of |G_j|²: it matters where |T_j|² is less
than a thousandth of |G_j|², where (1) is damped.

A core on both sides, PᵀG Q, has no columns of G: φ is then one number for a matrix, the inverse
root of the mean square over the m n − r² coordinates outside the subspace.

Both rules are this library's. Kin: Fira (arXiv:2410.01623), which scales the columns of T by
|U_j| / |R_j|; FRUGAL (arXiv:2411.07837), which takes the sign of T; COSMOS (arXiv:2502.17410) and
Pro-KLShampoo (arXiv:2605.06316), which orthogonalise the tail of a preconditioner and keep a
momentum of the whole gradient; SWAN (arXiv:2412.13148), which whitens whole gradients without
state; Muon (Jordan et al., 2024), for polar and Nesterov's momentum; MuonQ (arXiv:2605.11396),
which keeps the leading directions apart from a momentum in 4 bits; Tipping and Bishop,
"Probabilistic principal component analysis" (1999).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..util.control_flow import by_platform
from ..util.linalg import highest_precision_requested, norms, power_of_two
from ..util.orthogonalize import polar
from ..util.validation import Scalar
from .basis import from_core, to_core


# (G − P R, R, U) -> S, of one matrix
Residual = Callable[
    [Float[Array, "m n"], Float[Array, "r k"], Float[Array, "r k"]], Float[Array, "m n"]
]
RESIDUALS = ("isotropic", "whitened")

DAMPING = 1e-3  # ρ of (1) and (2)
MUON_SCALE = 0.2  # γ beside a momentum: the RMS of Muon's updates in arXiv:2502.16982


class Momentum(NamedTuple):
    """The momentum of the residual, equation (3).

    Attributes:
      M: its value after the last step.
      beta: β.
    """

    M: Float[Array, "*batch m n"]
    beta: Scalar


class Products(NamedTuple):
    """The products of a residual; on a mesh those that know how G is sharded.

    Attributes:
      to_core: PᵀM of (3).
      from_core: P R.
      polar: of (2).
    """

    to_core: Callable[..., Array] = to_core
    from_core: Callable[..., Array] = from_core
    polar: Callable[..., Array] = polar


PLAIN = Products()


def with_residual(
    residual: str | Residual,
    G: Float[Array, "*batch m n"],
    R: Float[Array, "*batch r k"],
    U: Float[Array, "*batch r k"],
    *bases: Array,
    scale: Scalar = 1.0,
    momentum: Momentum | None = None,
    products: Products = PLAIN,
) -> tuple[
    float,
    Float[Array, "*batch r k"],
    Float[Array, "*batch m n"],
    Float[Array, "*batch m n"] | None,
]:
    """P U + γ S as c (P U' + S'): c, U', S' and the new M.

    For `"whitened"` S' is then a product that cuBLAS adds to P U' without another pass over m x n.

    Args:
      residual: one of RESIDUALS, or a function that returns S for one matrix.
      G: gradients.
      R: their cores, k = n, or r on both sides.
      U: inner's answers.
      *bases: P, or P and Q.
      scale: γ.
      momentum: M and β of (3), or None.
      products: to compute with.

    Raises:
      ValueError: if the function returns another shape.
    """
    (m, n), (r, k) = G.shape[-2:], R.shape[-2:]
    if residual == "isotropic" and momentum is None:
        axes = (-2, -1) if len(bases) == 2 else (-2,)
        of_R, of_G = norms(R, axes), norms(G, axes, unit_from=R)
        of_T = jnp.sqrt(jnp.maximum(of_G - of_R, 0.0)) * jnp.sqrt(of_G + of_R)  # (5)
        phi = scale * isotropic(of_T, of_G, _outside(G, R, axes))
        return 1.0, U - phi * R, phi * G, None  # (4)
    M, size = None, 1.0
    if residual != "whitened" or momentum is not None:  # else in units, below
        T = G - products.from_core(G.dtype, R, *bases)
    if momentum is not None:
        M, beta = momentum
        M = M - products.from_core(G.dtype, products.to_core(M, *bases), *bases)
        M = beta * M + (1 - beta) * T  # (3)
        T, G = beta * M + (1 - beta) * T, (1 - beta) * G
    if residual == "isotropic":
        axes = (-2, -1) if len(bases) == 2 else (-2,)
        S = isotropic(norms(T, axes), norms(G, axes), _outside(G, R, axes)) * T
    elif residual == "whitened":
        directions = min(m if len(bases) == 2 else m - r, n)
        of_G = norms(G, (-2, -1), unit_from=R)
        largest = of_G if momentum is None else jnp.maximum(of_G, norms(T, (-2, -1)))
        if directions == 0:  # T is rounding alone
            S = jnp.zeros_like(G)
        else:
            size = math.sqrt((m * n - r * k) / directions)  # of (2), for the coordinates outside
            unit = unit_of(largest)
            if momentum is None:
                X = outside(G, R, *bases, unit=unit, from_core=products.from_core)
            else:
                X = T * (1 / unit)
            S = products.polar(X, DAMPING * jnp.square(of_G / unit))
    else:
        S = _each(residual, G.ndim - 2)(T, R, U)
        if jnp.shape(S) != G.shape:
            batch_axes = G.ndim - 2
            expected, got = G.shape[batch_axes:], jnp.shape(S)[batch_axes:]
            raise ValueError(f"`residual` must return an array of shape {expected}, got {got}.")
    return size, U * (1 / size), scale * S.astype(G.dtype), M


def isotropic(
    of_T: Float[Array, "*batch 1 c"], of_G: Float[Array, "*batch 1 c"], coordinates: int
) -> Float[Array, "*batch 1 c"]:
    """φ of (1), for each column, or one for a matrix.

    Args:
      of_T: norms of T.
      of_G: norms of G.
      coordinates: the number outside the subspace that share φ.
    """
    size = damped(of_T, of_G)
    return jnp.where(size > 0, math.sqrt(coordinates) / jnp.where(size > 0, size, 1.0), 0.0)


def unit_of(largest: Float[Array, "*batch 1 1"]) -> Float[Array, "*batch 1 1"]:
    """The unit of X in S = polar(X): |X| < 8, as `polar` requires, for |T| up to `largest`."""
    # Normal numbers alone, also for zeros.
    return power_of_two(jnp.maximum(largest, 4 * jnp.finfo(largest.dtype).tiny)) / 4


def outside(
    G: Float[Array, "*batch m n"],
    R: Float[Array, "*batch r k"],
    *bases: Array,
    unit: Float[Array, "*batch 1 1"],
    from_core: Callable[..., Array] = from_core,
) -> Float[Array, "*batch m n"]:
    """T / unit for (2), with P R in float16 on GPUs.

    The error is 5e-4 |G|, that of tensor-float32, at half the memory traffic; where |T| is below
    0.03 |G|, (2) is damped.
    """
    wide = lambda G, R, unit, *bases: (G - from_core(G.dtype, R, *bases)) * (1 / unit)
    if highest_precision_requested():
        return wide(G, R, unit, *bases)

    def narrow(G, R, unit, *bases):
        half = [x.astype(jnp.float16) for x in bases]
        R = (R / unit).astype(jnp.float16)
        return G / unit - from_core(jnp.float16, R, *half).astype(G.dtype)

    return by_platform(G, R, unit, *bases, gpu=narrow, default=wide)


def damped(of_T: Float[Array, "..."], of_G: Float[Array, "..."]) -> Float[Array, "..."]:
    """√(|T|² + ρ |G|²), without over- or underflow; 0 where both are 0 or subnormal."""
    largest = jnp.maximum(of_T, of_G)
    known = largest > 100 * jnp.finfo(largest.dtype).tiny  # so that √ρ times it is normal too
    unit = jnp.where(known, largest, 1.0)
    size = unit * jnp.sqrt(jnp.square(of_T / unit) + DAMPING * jnp.square(of_G / unit))
    return jnp.where(known, size, 0.0)


def _outside(G: Array, R: Array, axes: tuple[int, ...]) -> int:
    """The number of coordinates along `axes` outside the subspace."""
    return math.prod(G.shape[a] for a in axes) - math.prod(R.shape[a] for a in axes)


def _each(f: Callable[..., Array], batch_axes: int) -> Callable[..., Array]:
    """A function of one matrix, mapped over `batch_axes` leading axes."""
    for _ in range(batch_axes):
        f = jax.vmap(f)
    return f
