"""The window form of the Fisher, against dense solves in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import natgalore_jax as natgalore
from natgalore_jax.fisher.window import gram, natural_gradient
from tests.helpers.fisher import HUGE, TINY, N, R, answers, relative_error
from tests.oracle import oracles


# Cached: one compilation for all tests of one setting.
scale_by_fisher = functools.cache(natgalore.scale_by_fisher)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7], ids=lambda n: f"{n}steps")
def test_equals_the_dense_solve(steps, damping, key):
    """Fewer steps than the window of 3, as many, and more."""
    gradients = jax.random.normal(key, (steps, R, N))
    actual, _ = answers(scale_by_fisher(3, damping), gradients)
    expected = oracles.natural_gradient(np.asarray(gradients[-3:], np.float64), damping)
    # The s x s solve loses (|g|² + λ)/λ of float32's 6e-8 at the worst: here below 3e4.
    assert relative_error(actual[-1], expected) < 2e-3 * min(1.0, 0.1 / damping + 1e-2)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("steps", [1, 2, 7], ids=lambda n: f"{n}steps")
def test_equals_the_dense_power(steps, power, relative, key):
    """A window of 3 with one, two or all slots filled."""
    gradients = 10 * jax.random.normal(key, (steps, R, N))
    tx = scale_by_fisher(3, 0.5, relative=relative, power=power)
    actual, _ = answers(tx, gradients)
    H = np.asarray(gradients[-3:], np.float64).reshape(-1, R * N).T
    damping = 0.5 * (np.square(H).sum(axis=0).mean() if relative else 1.0)
    values, vectors = np.linalg.eigh(H @ H.T + damping * np.eye(R * N))
    expected = vectors @ (values**-power * (vectors.T @ H[:, -1]))
    # Absolute, K's 5e3 over λ = 0.5 are four digits of float32's seven.
    assert relative_error(actual[-1].ravel(), expected) < 2e-3


def test_relative_damping_is_independent_of_units(key):
    gradients = jax.random.normal(key, (5, R, N))
    for power in (1.0, 0.5, 0.25):
        tx = scale_by_fisher(3, 0.1, relative=True, power=power)
        plain, _ = answers(tx, gradients)
        for unit in (TINY, HUGE):
            extreme, state = answers(tx, gradients * unit)
            factor = float(unit) ** (1 - 2 * power)
            # A unit that is no power of two rounds once on the way in, cond(K) = 1e2 times.
            np.testing.assert_allclose(extreme[-1] / factor, plain[-1], rtol=1e-3, atol=1e-5)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_rounded_window_equals_the_window_of_rounded_cores(power, key):
    """g is rounded like the columns of H: it must be one of them."""
    gradients = jax.random.normal(key, (6, R, N))
    tx = scale_by_fisher(4, 0.1, power=power, window_dtype=jnp.bfloat16)
    actual, state = answers(tx, gradients)
    assert state.window["w"].value.dtype == jnp.bfloat16
    assert state.gram["w"].value.dtype == actual[-1].dtype == jnp.float32
    rounded = gradients.astype(jnp.bfloat16).astype(jnp.float32)
    expected, _ = answers(scale_by_fisher(4, 0.1, power=power), rounded)
    np.testing.assert_allclose(actual[-1], expected[-1], rtol=1e-4, atol=1e-6)
    assert relative_error(actual[-1], expected[-1]) < relative_error(
        answers(scale_by_fisher(4, 0.1, power=power), gradients)[0][-1], expected[-1]
    )


def test_rounding_to_bfloat16_is_explicit_in_hlo():
    """XLA drops float32 -> bfloat16 -> float32 on GPUs, so that K would differ from HᵀH."""
    tx = natgalore.chain(
        natgalore.project(4, refresh_every=2),
        scale_by_fisher(3, 0.1, window_dtype=jnp.bfloat16),
    )
    params = {"kernel": jnp.ones((8, 12))}
    program = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    narrowed = re.findall(
        r"stablehlo\.convert (%\w+) : \(tensor<\S*f32>\) -> tensor<\S*bf16>", program
    )
    rounded = re.findall(r"(%\w+) = stablehlo\.reduce_precision \S+ format = e8m7", program)
    assert len(narrowed) == 2  # the newest core, and the window where it is carried over
    assert sorted(narrowed) == sorted(rounded)


def test_parallel_cores_with_an_indefinite_gram_matrix(key):
    """K of equal cores has one nonzero eigenvalue; its errors here exceed λ."""
    window = jnp.stack([jax.random.normal(key, (R, N))] * 3)
    exact = gram(window)
    damping = 1e-5 * float(jnp.trace(exact))
    K = exact.at[0, 1].multiply(1 + 1e-4).at[1, 0].multiply(1 + 1e-4)
    assert np.linalg.eigvalsh(np.asarray(K, np.float64)).min() < -damping
    actual = natural_gradient(jnp.int32(3), window, K, jnp.ones(3), damping)
    expected = oracles.natural_gradient(np.asarray(window, np.float64), damping)
    assert relative_error(actual, expected) < 1e-5  # sums of 24 and 3 in float32


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6, 1e8], ids=lambda x: f"{x:.0e}")
def test_precision_where_the_printed_formula_cancels(ratio, key):
    common, own = jax.random.normal(key, (2, 20, R, N)) / (R * N) ** 0.5
    gradients = 0.9 * common[:1] + 0.45 * own
    damping = float(jnp.square(gradients[-1]).sum()) / ratio
    actual, _ = answers(scale_by_fisher(20, damping), gradients)
    expected = oracles.natural_gradient(np.asarray(gradients, np.float64), damping)
    H = np.asarray(gradients, np.float32).reshape(20, -1).T
    g, K = H[:, -1], H.T @ H + np.float32(damping) * np.eye(20, dtype=np.float32)
    printed = (g - H @ np.linalg.solve(K, H.T @ g)) / np.float32(damping)
    # cond(K) is about 1e3 here whatever λ; the floor on λ, 4 eps tr K = 1e-5 |g|², moves the
    # answer by 1e-5 times that.
    assert relative_error(actual[-1], expected) < 5e-3
    if ratio >= 1e6:
        assert relative_error(printed, expected.ravel()) > 0.1


@pytest.mark.parametrize("unit", [TINY, 1.0, HUGE])
def test_equal_gradients_give_a_finite_update(unit):
    """K is singular, and its entries are out of float32's range."""
    g = unit * jnp.ones((R, N))
    (*_, actual), _ = answers(scale_by_fisher(4, 1e-3), [g] * 6)
    square = float(R * N) * unit**2  # in Python's float64
    # Where λ is the floor of 4 eps tr K, weights of 1/(4 eps) cancel: one digit is left.
    np.testing.assert_allclose(actual, float(unit) / (1e-3 + 4 * square), rtol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0.0, 1e-5, 1e-3], ids=lambda x: f"{x:.0e}")
def test_nearly_parallel_large_cores_give_finite_updates(drift, key):
    """K of 20 such cores is indefinite in float32: rounding exceeds its small eigenvalues."""
    common, noise = jnp.abs(jax.random.normal(key, (64, 4096))), jax.random.split(key, 22)
    gradients = [common * (1 + drift * jax.random.normal(k, common.shape)) for k in noise]
    actual, state = answers(scale_by_fisher(), gradients)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((actual, state)))
    assert jnp.vdot(actual[-1], gradients[-1]) > 0


def test_zero_core_takes_no_slot_of_the_window(key):
    a, b, c = jax.random.normal(key, (3, R, N))
    zero = jnp.zeros((R, N))
    tx = scale_by_fisher(2, 0.1)
    with_zero, state = answers(tx, [a, b, zero, zero, c])
    without, _ = answers(tx, [a, b, c])
    assert not with_zero[2].any()
    np.testing.assert_array_equal(with_zero[4], without[2])
    assert state.count["w"].value == 3


def test_stack_equals_its_matrices(key):
    gradients = jax.random.normal(key, (5, 2, 3, R, N)).at[2, 1, 1].set(0.0)
    tx = scale_by_fisher(3, 0.1)
    together, _ = answers(tx, gradients)
    for i, j in np.ndindex(2, 3):
        alone, _ = answers(tx, gradients[:, i, j])
        np.testing.assert_allclose(together[-1][i, j], alone[-1], rtol=1e-5, atol=1e-6)


def test_gram_matrix_equals_that_of_the_window(key):
    _, state = answers(scale_by_fisher(3, 0.1), jax.random.normal(key, (5, 2, R, N)))
    np.testing.assert_allclose(
        state.gram["w"].value, gram(state.window["w"].value), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), damping=st.floats(1e-2, 1e3))
def test_update_is_shorter_and_at_an_acute_angle(seed, damping):
    """λ (λI + F)⁻¹ has its spectrum in (0, 1]."""
    window = jax.random.normal(jax.random.key(seed), (4, R, N))
    args = jnp.int32(4), window, gram(window), jnp.ones(4)
    g, u = window[-1], jax.jit(natural_gradient)(*args, jnp.float32(damping))
    assert damping * jnp.linalg.norm(u) <= jnp.linalg.norm(g) * (1 + 1e-4)
    assert jnp.vdot(u, g) > 0


REFUSED = [
    (natgalore.scale_by_fisher, {"window": 0}, ValueError),
    (natgalore.scale_by_fisher, {"window": 2.5}, TypeError),
    (natgalore.scale_by_fisher, {"damping": 0.0}, ValueError),
    (natgalore.scale_by_fisher, {"damping": float("nan")}, ValueError),
    (natgalore.scale_by_fisher, {"power": 2.0}, ValueError),
    (natgalore.scale_by_fisher, {"relative": "yes"}, ValueError),
    (natgalore.scale_by_fisher, {"window_dtype": int}, ValueError),
]


@pytest.mark.parametrize(
    ("make", "bad", "error"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_invalid_arguments_are_refused(make, bad, error):
    ((name, value),) = bad.items()
    # Called unchecked: users have no run-time type checker, and our message is what they read.
    with pytest.raises(error, match=rf"`{name}`.*{value}"):
        getattr(make, "__wrapped__", make)(**bad)
