"""What the projection left out, T = G − P R, added in a size of its own: three rules for it.

A core R = PᵀG keeps r of the m directions of a gradient. Of the others nothing is remembered.

**isotropic**: nothing tells them apart, so they share one second moment, for each column j the
mean square of what is left of it, of which there are m − r numbers now. What Adam does with
coordinates, and the natural gradient with its Fisher, is then

    S = φ ∘ T,    φ_j = 1 / √(|T_j|² / (m − r) + ρ |G_j|² / (m − r))                           (1)

that is, F ≈ P (…) Pᵀ + σ_j² (I − P Pᵀ) as in probabilistic principal components, and by the matrix
inversion lemma its inverse root. S has entries of size 1, as Adam's answer has to a steady
gradient. The damping ρ = 1e-3 is for columns that P holds whole, where only rounding is left.

**whitened**: the gradient itself tells them apart, by the empirical Fisher T Tᵀ / n of its columns,

    S = √n polar(T / √(|T|² + ρ |G|²)),    polar(X) ≈ (X Xᵀ)^(-½) X,                           (2)

the natural gradient of what is left: each of its m − r directions goes as far as any other, and S
has entries of size 1 again. The root comes of products alone (`linalg.polar`), as in Muon, which
does this to the momentum of the whole gradient; those, of m x m and m x n, are what it costs. (√n
is √(m − r) where that is more, on the long side.)

**fira**: inner has said how far to go in each column, by what it made of the core,

    S = φ ∘ T,    φ_j = |U_j| / |R_j|, 0 where |R_j| = 0                                       (3)

with U inner's answer to R. A column that the basis has just lost would leap, so that S may grow by
no more than 1 % a step:

    S ← S min(1, γ |S_before| / |S|),    γ = 1.01                                              (4)

in the Frobenius norm, |S_before| as (4) left it at the last step on which there was an S; before
the first there is no limit.

The update is scale · (P U + S). Neither (1) nor (3) costs a product of its own, or an array of
m x n:

    P U + φ ∘ T = P (U − φ ∘ R) + φ ∘ G,                                                       (5)
    |T_j|² = |G_j|² − |R_j|² = (|G_j| − |R_j|) (|G_j| + |R_j|)                                 (6)

for an orthonormal P. What (6) loses is rounding of |G_j|²: it is wrong where less than a
thousandth of a column is left, of which S by (3) then is less than a thousandth of P U, and by (1)
is damped.

A core on both sides, PᵀG Q, has no columns of G: φ is then one number for a matrix, |U| / |R|, or
the root of the mean square of the m n − r² numbers that are left.

References: Chen et al., "Fira", arXiv:2410.01623, equations (7) to (9), for (3) and (4). (1) and
(2) are this library's: kin are FRUGAL (arXiv:2411.07837), which takes the sign of what is left out,
Tipping and Bishop, "Probabilistic principal component analysis" (1999), SWAN (arXiv:2412.13148),
which whitens whole gradients and remembers nothing, and Muon (Jordan et al., 2024).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..tree.leaf_spec import is_core
from ..tree.state_roles import register_state
from ..util.linalg import norms, polar
from .basis import from_core


# (G − P R, R, U) -> S, of one matrix
Residual = Callable[
    [Float[Array, "m n"], Float[Array, "r k"], Float[Array, "r k"]], Float[Array, "m n"]
]
RESIDUALS = ("isotropic", "whitened", "fira")
UNLIMITED = (None, "isotropic", "whitened")

DAMPING = 1e-3  # ρ of (1) and (2)
GROWTH = 1.01  # γ of (4), Fira's
# Of a column of G: what is less of it in the core is rounding of the sums there, and is no |R_j|.
RESOLUTION = 16


class ResidualState(NamedTuple):
    """What :func:`project` remembers with a `residual` whose growth is limited.

    A state of its own, so that one without has the structure that it has always had: Orbax
    restores no field that was not saved, an empty one neither.

    Attributes:
      subspace: the :class:`SubspaceState`.
      norm: a tree like the params with a Core, (*batch) in the dtype of the cores, at each
        projected leaf and None elsewhere: |S_before| of (4), 0 before the first S.
    """

    subspace: PyTree
    norm: PyTree


register_state(ResidualState, norm="scalar")


def is_limited(residual: str | Residual | None) -> bool:
    """Whether (4) applies: to Fira's, and to a function."""
    return callable(residual) or residual not in UNLIMITED


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
    before: Float[Array, "*batch"] | None,
    *bases: Array,
    polar: Callable[[Array], Array] = polar,
) -> tuple[Float[Array, "*batch r k"], Float[Array, "*batch m n"], Float[Array, "*batch"] | None]:
    """P U + S as P U' + S': U', S', and the norm of S if it is limited.

    Args:
      residual: one of RESIDUALS, or a function that makes S, to which (4) is applied as well.
      G: gradients.
      R: their cores, k = n, or r on both sides; 0 where not finite.
      U: inner's answers; 0 where not finite.
      finite: where they are; elsewhere S is 0, which leaves the norm as it was.
      before: |S_before|; None if it is not limited.
      *bases: P, or P and Q.
      polar: of (2), on a mesh one that knows how G lies.
    """
    whole = finite[..., None, None]
    G = jnp.where(whole, G, 0)
    if residual == "isotropic":
        phi = isotropic(G, R, *(P.shape[-2] for P in bases))
        return U - phi * R, phi * G, None
    if residual == "whitened":
        return U, whitened(G, R, *bases, polar=polar), None
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


def isotropic(
    G: Float[Array, "*batch m n"], R: Float[Array, "*batch r k"], *sides: int
) -> Float[Array, "*batch 1 c"]:
    """φ of (1), for each column or the one of a matrix; `sides` are m, or m and n."""
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
    if directions == 0:  # all of G is in the core, and rounding is left
        return jnp.zeros_like(G)
    T = G - from_core(G.dtype, R, *bases)
    of_T, of_G = norms(T, (-2, -1), unit_from=G), norms(G, (-2, -1))
    known = of_G > jnp.finfo(G.dtype).tiny
    of_G = jnp.where(known, of_G, 1.0)
    unit = jnp.where(known, T / of_G / jnp.sqrt(jnp.square(of_T / of_G) + DAMPING), 0.0)
    return math.sqrt((m * n - r * k) / directions) * polar(unit)


def fira(
    G: Float[Array, "*batch m n"],
    R: Float[Array, "*batch r k"],
    U: Float[Array, "*batch r k"],
    two_sided: bool,
) -> tuple[Float[Array, "*batch 1 c"], Float[Array, "*batch"]]:
    """φ of (3), for each column or the one of a matrix, and |S| by (6)."""
    axes = (-2, -1) if two_sided else (-2,)
    of_R, of_U = norms(R, axes), norms(U, axes)
    of_G = norms(G, axes, unit_from=R)
    known = of_R > RESOLUTION * jnp.finfo(R.dtype).eps * of_G
    phi = jnp.where(known, of_U / jnp.where(known, of_R, 1.0), 0.0)
    left = jnp.sqrt(jnp.maximum(of_G - of_R, 0.0)) * jnp.sqrt(of_G + of_R)
    return phi, norms(jnp.where(known, phi * left, 0.0), (-2, -1))[..., 0, 0]


def limited(
    size: Float[Array, "*batch"], before: Float[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The factor of (4), and the norm to remember. An S of zero says nothing, and changes none."""
    grown = size > GROWTH * before
    limit = jnp.where((before > 0) & grown, GROWTH * before / jnp.where(grown, size, 1.0), 1.0)
    norm = limit * size
    return limit, jnp.where((norm > 0) & jnp.isfinite(norm), norm, before)


def _each(f: Callable[..., Array], batch_axes: int) -> Callable[..., Array]:
    """f of one matrix, for stacks of them."""
    for _ in range(batch_axes):
        f = jax.vmap(f)
    return f
