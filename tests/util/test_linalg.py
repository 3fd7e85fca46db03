import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax.fisher.core import damped
from natgalore_jax.util.linalg import (
    gram_product_by_blocks,
    inverse_root,
    newton_schulz,
    newton_schulz_scales,
    power_of_two,
    product,
    rounded,
    rounded_product,
)
from tests.helpers.cases import quick, slow
from tests.oracle import oracles


def spectra(r):
    return {
        "flat": np.ones(r),
        "harmonic": 1 / np.arange(1, r + 1),
        "square": 1 / np.arange(1, r + 1) ** 2,
        "rank 1": np.eye(r)[0],
        "exponential": 10.0 ** (-12 * np.arange(r) / r),
    }


@pytest.mark.parametrize(("damping", "tolerance"), [(0.1, 5e-5), (0.01, 6e-4), (1e-3, 1e-2)])
@pytest.mark.parametrize("spectrum", quick(["flat", "rank 1", "exponential"], [*spectra(1)]))
@pytest.mark.parametrize("r", [*slow(32), 128])
@pytest.mark.parametrize("power", [0.5, 0.25, 1.0])
def test_inverse_roots_at_the_worst_condition(power, r, spectrum, damping, tolerance):
    """Tolerances: eps times the condition r/damping."""
    values = spectra(r)[spectrum]
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(r, r)))[0]
    L = (Q * values) @ Q.T
    A = damped(jnp.asarray(L, jnp.float32), jnp.float32(1.0), damping)
    expected = oracles.inverse_root(L, damping, power)
    assert np.linalg.norm(inverse_root(A, power, damping) - expected) < tolerance * np.linalg.norm(
        expected
    )


@pytest.mark.parametrize("power", [0.5, *slow(0.25, 1.0)])
@pytest.mark.parametrize("damping", [1.0, *slow(4.0, 100.0)])
@pytest.mark.parametrize("r", [1, *slow(3, 32)])
def test_inverse_roots_with_large_damping(r, damping, power, key):
    X = jax.random.normal(key, (r, r))
    L = np.asarray(X @ X.T, np.float64)
    A = damped(jnp.asarray(L, jnp.float32), jnp.float32(1.0), damping)
    expected = oracles.inverse_root(L, damping, power)
    error = np.linalg.norm(inverse_root(A, power, damping) - expected)
    assert error < 5e-6 * np.linalg.norm(expected)  # eps times the condition, at most 2 r here


def test_newton_schulz_returns_root_and_inverse_root(key):
    X = jax.random.normal(key, (3, 8, 8))
    A = X @ X.mT + jnp.broadcast_to(jnp.eye(8), X.shape)
    Y, Z = newton_schulz(A, 1e3)
    Y, Z = np.asarray(Y, np.float64), np.asarray(Z, np.float64)
    np.testing.assert_allclose(Y @ Y, A, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(Y @ Z, np.broadcast_to(np.eye(8), A.shape), atol=1e-4)


@pytest.mark.parametrize("condition", [2.0, 1e3, 1e6])
def test_newton_schulz_scales_converge_in_few_steps(condition):
    scales = newton_schulz_scales(condition)
    # A step multiplies a small root by at most 2.6; from 0.3 on five steps converge quadratically.
    assert len(scales) <= np.log(condition) / 2 / np.log(1.5 * np.sqrt(3)) + 5
    x = np.geomspace(condition**-0.5, 1, 1001)
    for scale in scales:
        x = scale * x * (3 - (scale * x) ** 2) / 2
    np.testing.assert_allclose(x, 1, atol=1e-7)  # float32 rounding


@pytest.mark.parametrize("n", [5, 8, 16, 21])  # one block, whole blocks, a part of one
def test_gram_product_by_blocks_matches_numpy(n):
    rng = np.random.default_rng(n)
    G, P = rng.normal(size=(12, n)), rng.normal(size=(12, 3))
    Y = gram_product_by_blocks(jnp.asarray(G, jnp.float32), jnp.asarray(P, jnp.float32), width=8)
    # Two sums of at most 21 products in float32, of size 12 n.
    np.testing.assert_allclose(Y, G @ (G.T @ P), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("setting", "precision"), [(None, "HIGH"), ("highest", "HIGHEST")])
def test_product_precision_follows_the_jax_setting(setting, precision):
    x = jnp.ones((2, 2))
    with jax.default_matmul_precision(setting):
        (dot,) = jax.make_jaxpr(product)(x, x).eqns
    assert {str(p) for p in dot.params["precision"]} == {precision}


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu", "cpu"])
@pytest.mark.parametrize("setting", [None, "highest"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rounded_product_dtypes_per_platform(platform, setting, dtype):
    P, U = jnp.ones((64, 8)), jnp.ones((8, 32))
    with jax.default_matmul_precision(setting):
        lift = jax.jit(functools.partial(rounded_product, dtype=jnp.dtype(dtype)))
        program = jax.export.export(lift, platforms=[platform])(P, U).mlir_module()
    (types,) = re.findall(r"dot_general.*?: (\(.*>)", program)
    narrow = (dtype, setting) == ("bfloat16", None) and platform != "cpu"
    t = "bf16" if narrow else "f32"
    assert types == f"(tensor<64x8x{t}>, tensor<8x32x{t}>) -> tensor<64x32x{t}>"


def test_error_of_a_product_of_bfloat16_factors():
    """Three independent roundings of 1.7e-3 each: 2.9e-3."""
    rng = np.random.default_rng(0)
    P, U = np.linalg.qr(rng.normal(size=(256, 64)))[0], rng.normal(size=(64, 300))
    short = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    error = short(short(P) @ short(U)) - P @ U
    assert 2.5e-3 < np.linalg.norm(error) / np.linalg.norm(U) < 3.3e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounded_is_to_nearest_with_ties_to_even(dtype):
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
def test_power_of_two_examples(x, expected):
    assert power_of_two(jnp.float32(x)) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_power_of_two_matches_frexp(dtype):
    with jax.enable_x64(True):
        x = dtype(1.1) ** np.arange(-800, 800, 7, dtype=dtype)
        _, exponent = np.frexp(x)
        power, root = power_of_two(jnp.asarray(x)), power_of_two(jnp.asarray(x), root=True)
        assert power.dtype == root.dtype == dtype
        np.testing.assert_array_equal(power, np.ldexp(dtype(1), exponent - 1))
        np.testing.assert_array_equal(root, np.ldexp(dtype(1), (exponent - 1) // 2))
