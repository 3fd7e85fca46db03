"""Rank candidates: rules, bisection and energy shares against NumPy's SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from natgalore_jax.planning.rank_candidates import (
    energy_shares,
    largest_that_fits,
    rules,
    smallest_rank,
)
from natgalore_jax.tree.leaf_spec import LeafSpec

from .known_spectrum import SIZES, gradient


def test_rules_from_ranks():
    assert rules({}) == 1
    assert rules({"a": 3, "b": 3}) == 3
    mixed = rules({"x/0": 3, "x/1": 4, "x.y/2/w": 5, "x.y/10/w": 5})
    assert mixed == [("^x/0$", 3), ("^x/1$", 4), (r"^x\.y/\d+/w$", 5)]


@given(st.integers(0, 70), st.integers(0, 70))
def test_search_finds_the_last_fitting_candidate(count, until):
    tried = []
    found = largest_that_fits(count, lambda i: tried.append(i) or i < until)
    assert found == max(0, min(until, count) - 1)
    assert len(tried) == len({*tried}) <= 7


def test_energy_shares_from_singular_values():
    spec = LeafSpec(("w",), (20, 12), (), (0,), (1,), rank=1)
    expected = np.cumsum(np.square(SIZES)) / 22.25
    found = energy_shares(spec, [gradient(20, 12, SIZES)])
    assert found.shape == (1, 12)
    np.testing.assert_allclose(found[0, :5], expected, rtol=1e-6)  # of float32 gradients
    np.testing.assert_allclose(found[0, 5:], 1, rtol=1e-6)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_energy_shares_of_several_gradients(both, scale):
    """Stacked matrices, against NumPy's SVD of all their gradients side by side."""
    spec = LeafSpec(("w",), (6, 3, 9), (1,), (0,), (2,), rank=1, both=both)
    grads = [scale * jax.random.normal(jax.random.key(i), spec.shape) for i in range(3)]
    found = energy_shares(spec, grads)
    for i in range(3):
        matrices = [np.float64(G)[:, i] / scale for G in grads]
        expected = []
        for side in (matrices, [G.T for G in matrices]) if both else (matrices,):
            squares = np.linalg.svd(np.hstack(side), compute_uv=False) ** 2
            expected.append(np.cumsum(squares)[:6] / squares.sum())
        np.testing.assert_allclose(found[i], np.min(expected, axis=0), rtol=1e-6)


def test_energy_shares_of_zero_and_invalid_gradients():
    spec = LeafSpec(("w",), (4, 6), (), (0,), (1,), rank=1)
    assert (energy_shares(spec, [jnp.zeros((4, 6))]) == 1).all()
    with pytest.raises(ValueError, match=r"^`grads` is not finite in `w`"):
        energy_shares(spec, [jnp.full((4, 6), jnp.inf)])
    with pytest.raises(ValueError, match=r"^`grads` has shape \(6, 4\) for `w`, whose shape is"):
        energy_shares(spec, [jnp.zeros((6, 4))])


@pytest.mark.parametrize(
    ("target", "rank"), [(0.5, 1), (0.72, 2), (0.9, 3), (0.95, 4), (0.999, 5), (1.0, 5)]
)
def test_smallest_rank_for_a_share(target, rank):
    fast = np.cumsum(np.square(SIZES)) / 22.25  # 0.719, 0.899, 0.944, 0.989, 1
    assert smallest_rank(fast[None], target) == rank
    slower = np.linspace(0.2, 0.99, 5)  # does not reach 0.999
    expected = max(rank, int((slower < target).sum()) + 1)
    assert smallest_rank(np.stack([fast, slower]), target) == min(expected, 5)
