"""How much of a gradient r directions can hold: from its singular values, on the host.

Of a matrix's gradients G₁ … G_k (m x n, m the projected side) the basis that holds most is made of
the leading eigenvectors of A = Σ G_i G_iᵀ, and of their energy Σ |G_i|² it holds the share

    (λ₁ + … + λ_r) / (λ₁ + … + λ_m)                                       (1)

with λ the eigenvalues of A, largest first: squares of the singular values of (G₁ … G_k).
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..tree.leaf_spec import LeafSpec


def shares(spec: LeafSpec, grads: Sequence[Any]) -> Float[np.ndarray, "matrices short"]:
    """Equation (1) of each matrix of a leaf, for r from 1 to its short side, in float64.

    A leaf that is projected on both sides needs a basis of either: it has the smaller share.

    Args:
      spec: of the leaf.
      grads: gradients in its shape, at least one.

    Returns:
      Shares, which rise with r; all 1 where the gradients are 0.

    Raises:
      ValueError: if a gradient has another shape, or is not finite.

    Example:
      >>> spec = LeafSpec(("up",), (2, 3), (), (0,), (1,), rank=1)
      >>> shares(spec, [np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]])]).tolist()  # 16 of 25
      [[0.64, 1.0]]
    """
    views = []
    for G in map(jnp.asarray, grads):
        if G.shape != spec.shape:
            raise ValueError(
                f"`grads` has shape {G.shape} for `{spec.name}`, whose shape is {spec.shape}."
            )
        views.append(np.asarray(spec.to_view(G)).reshape(spec.matrices, spec.m, spec.n))
    rows = []
    for each in zip(*views, strict=True):
        wide = [G.astype(np.float64) for G in each]
        if not all(np.isfinite(G).all() for G in wide):
            raise ValueError(f"`grads` is not finite in `{spec.name}`.")
        sides = (wide, [G.T for G in wide]) if spec.both else (wide,)
        short = min(spec.m, spec.n)
        rows.append(np.min([_shares(np.hstack(side), short) for side in sides], axis=0))
    return np.stack(rows)


def smallest_rank(shares: Float[np.ndarray, "matrices short"], target: float) -> int:
    """The least r whose shares reach `target` in all matrices, to float64's rounding, or all of r.

    Example:
      >>> smallest_rank(np.array([[0.64, 1.0], [0.9, 1.0]]), 0.9)
      2
    """
    below = shares.min(axis=0) < target - 1e-12
    return min(int(below.sum()) + 1, shares.shape[1])


def _shares(A: Float[np.ndarray, "m n"], short: int) -> Float[np.ndarray, " short"]:
    """Equation (1), with λ of the Gram matrix of the shorter side, which are the same."""
    A = A / (np.abs(A).max() or 1.0)  # so that squares neither overflow nor vanish
    gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    total = np.trace(gram)
    if not total:
        return np.ones(short)
    return np.minimum(np.cumsum(np.linalg.eigvalsh(gram)[::-1][:short].clip(0)) / total, 1.0)
