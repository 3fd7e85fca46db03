"""The orthogonal factor, in the arithmetic of each platform, against an SVD in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax.util import orthogonalize
from natgalore_jax.util.orthogonalize import COEFFICIENTS, is_gram_better, orthogonalised, polar
from tests.helpers.cases import slow
from tests.oracle import oracles


RIDGE = 1e-3 * 64  # as the residual has it, for |X| < 8
M = 128  # the least m of the Gram form


def exact_factor(X):
    """U Vᵀ of the nonzero singular values."""
    U, values, V = np.linalg.svd(X, full_matrices=False)
    known = values > 1e-9 * values.max(axis=-1, keepdims=True)
    return (U * known[..., None, :]) @ V


def by_polynomials(X, ridge=0.0):
    """The polynomials of the singular values over the Schatten 4-norm, in float64."""
    left, values, right = np.linalg.svd(X, full_matrices=False)
    square = (values**2).sum(-1, keepdims=True)
    x = values / np.sqrt((square + ridge) * np.sqrt((values**4).sum(-1, keepdims=True)) / square)
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    return (left * x[..., None, :]) @ right


def matrix(values, shape, seed=0):
    """A stack of matrices with these singular values, as many as fit, of norm 5."""
    rng = np.random.default_rng(seed)
    U, _, V = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    X = (U * values) @ V
    return 5 * X / np.linalg.norm(X, axis=(-2, -1), keepdims=True)


def without_leading(m, n, spectrum):
    """m x n with a quarter of its singular values zero, as a projection leaves it."""
    values = {"flat": np.ones(m), "harmonic": 1 / np.arange(1.0, m + 1)}[spectrum]
    return matrix(np.where(np.arange(m) < m // 4, 0.0, values), (m, n))


def test_coefficients_are_the_best_ones():
    rows, error = oracles.minimax_steps(0.016, len(COEFFICIENTS))
    np.testing.assert_allclose(COEFFICIENTS, rows, atol=5.1e-5)  # four digits
    np.testing.assert_allclose(COEFFICIENTS, oracles.QUINTICS)
    assert error < 0.15


def test_singular_values_end_within_15_per_cent_of_one():
    """Those in [0.016, 1.01], since rounding exceeds 1. Smaller ones grow 61.1 times at most."""
    x = start = np.concatenate([np.geomspace(0.016, 1.01, 100_001), np.geomspace(1e-9, 0.016)])
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    inside = x[start >= 0.016]
    assert inside.min() > 0.85
    assert inside.max() < 1.15
    assert np.all(x / start < 61.1)


def test_minimax_alternates():
    """The error of a best approximation has one more extremum than coefficients (Chebyshev)."""
    (a, b, c), error = oracles.minimax_odd(0.1, 1.0, 5)
    x = np.linspace(0.1, 1.0, 100_001)
    y = a * x + b * x**3 + c * x**5 - 1
    extrema = [y[0], *y[1:-1][np.diff(np.sign(np.diff(y))) != 0], y[-1]]
    np.testing.assert_allclose(extrema, error * np.array([-1, 1, -1, 1]), rtol=1e-6)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (2, 12, 30)])
def test_forms_equal_the_polynomials_in_float64(shape, gram):
    X = matrix(np.geomspace(1e-3, 1, min(shape[-2:])), shape)
    for ridge in (0.0, 4.0):
        with jax.enable_x64(True):
            S = orthogonalised(jnp.asarray(X), ridge, dtype=jnp.float64, gram=gram)
        # 61² roundings of A
        np.testing.assert_allclose(S, by_polynomials(X, ridge), atol=1e-11)


# Relative errors of the polynomials in the Frobenius norm: 61 times the rounding of zero singular
# values; the Gram form rounds squares.
ERRORS = {
    ("float32", False): 4e-6,
    ("float32", True): 8e-6,
    ("float16", False): 0.006,
    ("float16", True): 0.01,
    ("bfloat16", False): 0.04,
}


@pytest.mark.parametrize("spectrum", ["flat", "harmonic"])
@pytest.mark.parametrize("n", [96, *slow(256)])
@pytest.mark.parametrize(("dtype", "gram"), ERRORS)
def test_error_in_each_platforms_arithmetic(dtype, gram, n, spectrum):
    X = without_leading(96, n, spectrum)
    S = orthogonalised(jnp.asarray(X, jnp.float32), 0.0, dtype=jnp.dtype(dtype), gram=gram)
    assert S.dtype == jnp.float32
    expected = by_polynomials(X)
    assert np.linalg.norm(S - expected) < ERRORS[dtype, gram] * np.linalg.norm(expected)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(
    ("values", "ridge"),
    [
        pytest.param(np.eye(M)[0], RIDGE, id="rank 1"),
        pytest.param(np.arange(M) < 3, RIDGE, id="rank 3"),
        pytest.param(np.where(np.arange(M) < 64, 1.0, 0.02), RIDGE, id="half small"),
        pytest.param(10.0 ** -np.arange(M), RIDGE, id="exponential"),
    ],
)
def test_float16_bears_any_spectrum(values, ridge, gram):
    """Large singular values end near 1, and nothing overflows at the largest |X| allowed."""
    X = 8 / 5 * matrix(values, (M, 160))
    S = orthogonalised(jnp.asarray(X, jnp.float32), ridge, dtype=jnp.float16, gram=gram)
    got = np.linalg.svd(np.asarray(S, np.float64))[1]
    large = np.linalg.svd(X)[1] > 0.1
    # 0.85 to 1.15, and float16; rank 1 starts at 1, where the first polynomial is steepest.
    np.testing.assert_allclose(got[large], 1.0, atol=0.17)
    assert got.max() < 1.17


@pytest.mark.parametrize("gram", [False, True])
def test_ridge_keeps_small_matrices_small(gram):
    """A gain of 61.1 over √(ridge m^-½) at most; zeros stay zero."""
    X = (
        np.random.default_rng(0).standard_normal((3, 48, 64))
        * np.array([1e-7, 0, 1e-3])[:, None, None]
    )
    S = orthogonalised(jnp.asarray(X, jnp.float32), RIDGE, dtype=jnp.float16, gram=gram)
    bound = 61.1 / np.sqrt(RIDGE * 48**-0.5)
    # float16's smallest step is 6e-8.
    assert np.linalg.norm(S[0]) < bound * (np.linalg.norm(X[0]) + 3e-8 * np.sqrt(X[0].size))
    assert not np.any(S[1])
    assert np.linalg.norm(S[2]) < bound * np.linalg.norm(X[2])


@pytest.mark.parametrize("shape", [(2, 8, 20), (20, 8), (16, 16)])
def test_polar_of_wide_and_tall_matrices(shape):
    X = matrix(np.geomspace(0.05, 1, min(shape[-2:])), shape)
    for ridge in (0.0, jnp.zeros((*shape[:-2], 1, 1))):
        S = polar(jnp.asarray(X, jnp.float32), ridge)
        expected = exact_factor(X)
        assert np.linalg.norm(S - expected) < 0.15 * np.linalg.norm(expected)
        np.testing.assert_allclose(S, by_polynomials(X), atol=1e-5)  # 61 roundings


@pytest.mark.parametrize(("n", "gram"), [(128, False), (191, False), (192, True), (500, True)])
def test_form_by_shape(n, gram):
    assert is_gram_better(jnp.zeros((3, 128, n))) == gram
    assert not is_gram_better(jnp.zeros((3, 127, n)))


def products(program):
    """Types of the factors and results of the products in a program."""
    types = re.findall(r"dot_general.*?: \((.*?), .*?\) -> (\S+)", program)
    return [[re.findall(r"x(b?f\d+)>", t)[0] for t in pair] for pair in types]


@pytest.mark.parametrize("n", [128, 384])
@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu", "cpu"])
@pytest.mark.parametrize("setting", [None, "highest"])
def test_arithmetic_per_platform(setting, platform, n):
    """Products of A, of the first q, of a step and S; only that of S is wide, and rounded once.

    TPUs have one body for all steps.
    """
    X = jnp.ones((128, n))
    with jax.default_matmul_precision(setting):
        program = jax.export.export(jax.jit(polar), platforms=[platform])(X).mlir_module()
    types = products(program)
    short = "f32" if setting else {"tpu": "bf16", "cpu": "f32"}.get(platform, "f16")
    assert {a for a, _ in types} == {short}
    loop = platform == "tpu" and not setting
    assert [b for _, b in types].count("f32") == (len(types) if short == "f32" else not loop)
    assert len(types) == (3 if loop else 7 if n == 384 else 6)


def test_steps_in_a_loop_are_the_same_steps():
    X = jnp.asarray(without_leading(24, 40, "flat"), jnp.float32)
    for gram in (False, True):
        f = functools.partial(orthogonalised, X, 0.0, dtype=X.dtype, gram=gram)
        np.testing.assert_allclose(f(unroll=False), f(unroll=True), atol=1e-5)  # order of sums


def test_loop_in_bfloat16_rounds_the_result_once_more():
    X = jnp.asarray(without_leading(96, 160, "harmonic"), jnp.float32)
    f = functools.partial(orthogonalised, X, 0.0, dtype=jnp.bfloat16, gram=False)
    loop, unrolled = f(unroll=False), f(unroll=True)
    assert loop.dtype == jnp.float32
    # Up to 2⁻⁹ of each of the three products.
    assert np.linalg.norm(loop - unrolled) < 3 * 2**-9 * np.linalg.norm(unrolled)
    expected = by_polynomials(X)
    assert np.linalg.norm(loop - expected) < 0.04 * np.linalg.norm(expected)


def test_norm_of_zeros_and_of_subnormals():
    A = jnp.stack([jnp.zeros((4, 4)), 1e-30 * jnp.eye(4), jnp.eye(4)])
    s = orthogonalize.schatten_norm(A, 0.0)[:, 0, 0]
    # tr A = 4, ‖A‖ = 2; the square of 1e-30 underflows, the bound m^-½ is then exact.
    np.testing.assert_allclose(s, [1.0, np.sqrt(2e-30), np.sqrt(2.0)], rtol=1e-6)
