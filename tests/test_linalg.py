import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax.fisher_core import damped
from natgalore_jax.linalg import (
    inverse_root,
    newton_schulz,
    newton_schulz_steps,
    orthonormalise,
    power_of_two,
    rounded,
)

from . import oracles


def spectra(r):
    return {
        "flat": np.ones(r),
        "harmonic": 1 / np.arange(1, r + 1),
        "square": 1 / np.arange(1, r + 1) ** 2,
        "rank 1": np.eye(r)[0],
        "exponential": 10.0 ** (-12 * np.arange(r) / r),
    }


@pytest.mark.parametrize(("damping", "tolerance"), [(0.1, 5e-5), (0.01, 6e-4), (1e-3, 1e-2)])
@pytest.mark.parametrize("spectrum", spectra(1))
@pytest.mark.parametrize("r", [pytest.param(32, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize("power", [0.5, 0.25, 1.0])
def test_roots_are_accurate_at_the_worst_condition(power, r, spectrum, damping, tolerance):
    """Tolerances: eps times the condition r/damping, which is what float32 allows."""
    values = spectra(r)[spectrum]
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(r, r)))[0]
    L = (Q * values) @ Q.T
    A = damped(jnp.asarray(L, jnp.float32), jnp.float32(1.0), damping)
    expected = oracles.inverse_root(L, damping, power)
    assert np.linalg.norm(inverse_root(A, power, damping) - expected) < tolerance * np.linalg.norm(
        expected
    )


def test_newton_schulz_gives_both_roots(key):
    X = jax.random.normal(key, (3, 8, 8))
    A = X @ X.mT + jnp.broadcast_to(jnp.eye(8), X.shape)
    Y, Z = newton_schulz(A, newton_schulz_steps(1e3))
    Y, Z = np.asarray(Y, np.float64), np.asarray(Z, np.float64)
    np.testing.assert_allclose(Y @ Y, A, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(Y @ Z, np.broadcast_to(np.eye(8), A.shape), atol=1e-4)


def test_orthonormalise_undoes_no_sign():
    """Q of an orthonormal P is P itself: warm bases do not flip."""
    P = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 4)))[0].astype(np.float32)
    np.testing.assert_allclose(orthonormalise(jnp.asarray(P)), P, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounded_is_to_the_nearest_and_ties_to_even(dtype):
    half = float(jnp.finfo(dtype).eps) / 2
    x = jnp.array([1 + half, 1 + 3 * half, -1 - 1.01 * half, 0.1, 3e4, 0.0], jnp.float32)
    actual = rounded(x, dtype)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, np.asarray(x).astype(dtype))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1.0, 1.0),
        (1.99, 1.0),
        (2.0, 2.0),
        (0.3, 0.25),
        (0.0, 1.0),
        (1e25, 2.0**83),
        (1e-25, 2.0**-84),
    ],
)
def test_power_of_two_is_the_largest_below(x, expected):
    assert power_of_two(jnp.float32(x)) == expected
