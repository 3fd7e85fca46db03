"""Candidate ranks from the smallest to the largest, and the largest that fits a budget.

Candidates are fractions of the short sides, or the ranks that hold a share of the gradients'
energy. Let G₁ … G_k (m x n, m the projected side) be gradients of one matrix. The rank-r basis that
holds most of their energy Σ |G_i|² is the leading eigenvectors of A = Σ G_i G_iᵀ, and its share is

    (λ₁ + … + λ_r) / (λ₁ + … + λ_m)                                       (1)

with λ the eigenvalues of A, largest first: the squared singular values of (G₁ … G_k). The spectra
are computed on the host, in float64.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..selection.select import Rank
from ..tree.leaf_spec import LeafSpec


STEPS = 64  # candidates are multiples of 1/64
Ranks = dict[str, int]  # rank of each projected leaf, by its name


def by_fraction(specs: Sequence[LeafSpec], multiple: int) -> list[Ranks]:
    """The fractions i/64 of each short side, rounded to `multiple`, at most the short side.

    Example:
      >>> spec = LeafSpec(("up",), (20, 64), (), (0,), (1,), rank=1)
      >>> by_fraction([spec], 8)
      [{'up': 8}, {'up': 16}, {'up': 20}]
    """
    nearest = lambda x: max(multiple, multiple * math.floor(x / multiple + 0.5))
    return _distinct(
        {spec.name: min(nearest(i / STEPS * _short(spec)), _short(spec)) for spec in specs}
        for i in range(1, STEPS + 1)
    )


def by_energy(
    specs: Sequence[LeafSpec], spectra: Mapping[str, np.ndarray], energy: float, multiple: int
) -> list[Ranks]:
    """The smallest ranks that hold the shares i/64 of `energy`, rounded up to `multiple`."""
    round_up = lambda r: multiple * math.ceil(r / multiple)
    smallest = lambda spec, target: round_up(smallest_rank(spectra[spec.name], target))
    return _distinct(
        {spec.name: min(smallest(spec, i / STEPS * energy), _short(spec)) for spec in specs}
        for i in range(1, STEPS + 1)
    )


def largest_that_fits(count: int, fits: Callable[[int], bool]) -> int:
    """Bisects 0 … count - 1 for an index that fits and whose successor does not; 0 if none fits.

    That is the largest that fits if `fits` is monotone.

    Example:
      >>> largest_that_fits(10, lambda i: i * i <= 30)
      5
    """
    low, high = 0, count  # invariant: indices below `low` fit, indices from `high` on do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(middle) else (low, middle)
    return max(low - 1, 0)


def rules(ranks: Ranks) -> Rank:
    """The `rank` argument that gives each leaf its rank: one number if all are equal, else rules.

    Without leaves it is 1. Leaves of one rank whose names differ by numbers alone share a rule.

    Example:
      >>> rules({"layers/0/up": 8, "layers/1/up": 8, "down": 16})
      [('^layers/\\\\d+/up$', 8), ('^down$', 16)]
    """
    if len({*ranks.values()}) <= 1:
        return next(iter(ranks.values()), 1)
    names_by_pattern: dict[str, list[str]] = {}
    for name in ranks:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(name))
        names_by_pattern.setdefault(pattern, []).append(name)
    pairs = []
    for pattern, names in names_by_pattern.items():
        exact = [(re.escape(name), ranks[name]) for name in names]
        shared = len(names) > 1 and len({rank for _, rank in exact}) == 1
        pairs += [(pattern, ranks[names[0]])] if shared else exact
    return [(f"^{pattern}$", rank) for pattern, rank in pairs]


def energy_shares(spec: LeafSpec, grads: Sequence[Any]) -> Float[np.ndarray, "matrices short"]:
    """Equation (1) for each matrix of a leaf and r from 1 to its short side, in float64.

    For a leaf projected on both sides it is the smaller of the shares of both sides.

    Args:
      spec: of the leaf.
      grads: gradients in the leaf's shape, at least one.

    Returns:
      Shares, which increase with r; all 1 if the gradients are 0.

    Raises:
      ValueError: if a gradient has another shape or is not finite.

    Example:
      >>> spec = LeafSpec(("up",), (2, 3), (), (0,), (1,), rank=1)
      >>> grads = [np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]])]
      >>> energy_shares(spec, grads).tolist()  # 16 of 25
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
    for matrices in zip(*views, strict=True):
        wide = [G.astype(np.float64) for G in matrices]
        if not all(np.isfinite(G).all() for G in wide):
            raise ValueError(f"`grads` is not finite in `{spec.name}`.")
        sides = (wide, [G.T for G in wide]) if spec.both else (wide,)
        rows.append(np.min([_shares(np.hstack(side), _short(spec)) for side in sides], axis=0))
    return np.stack(rows)


def smallest_rank(shares: Float[np.ndarray, "matrices short"], target: float) -> int:
    """The smallest r whose share reaches `target` (less 1e-12) in every matrix, at most the side.

    Example:
      >>> smallest_rank(np.array([[0.64, 1.0], [0.9, 1.0]]), 0.9)
      2
    """
    below = shares.min(axis=0) < target - 1e-12
    return min(int(below.sum()) + 1, shares.shape[1])


def _shares(A: Float[np.ndarray, "m n"], short: int) -> Float[np.ndarray, " short"]:
    """Equation (1) from the Gram matrix of the shorter side, which has the same nonzero λ."""
    A = A / (np.abs(A).max() or 1.0)  # squares neither overflow nor underflow
    gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    total = np.trace(gram)
    if not total:
        return np.ones(short)
    return np.minimum(np.cumsum(np.linalg.eigvalsh(gram)[::-1][:short].clip(0)) / total, 1.0)


def _short(spec: LeafSpec) -> int:
    return min(spec.m, spec.n)


def _distinct(candidates: Iterable[Ranks]) -> list[Ranks]:
    """Drops repeated neighbours."""
    return [ranks for ranks, _ in itertools.groupby(candidates)]
