"""The core form of the Fisher, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgalore_jax as natgalore
from natgalore_jax.fisher.core import CoreFisherState
from tests.helpers.fisher import HUGE, TINY, N, R, answers, as_core, relative_error
from tests.oracle import oracles


# Cached: one compilation for all tests of one setting.
scale_by_core_fisher = functools.cache(natgalore.scale_by_core_fisher)


@pytest.mark.parametrize("root_every", [1, 3])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_equals_the_oracle(power, root_every, key):
    gradients = jax.random.normal(key, (7, R, N))
    tx = scale_by_core_fisher(0.9, 0.1, power=power, root_every=root_every)
    actual, _ = answers(tx, gradients)
    oracle = oracles.CoreFisher(0.9, 0.1, power, root_every)
    for count, (g, u) in enumerate(zip(gradients, actual, strict=True)):
        expected = oracle.precondition(np.asarray(g, np.float64), count)
        # r products of float32, an inverse root to 1e-5 (test below).
        assert relative_error(u, expected) < 5e-5


def test_square_root_is_independent_of_units(key):
    gradients = jax.random.normal(key, (6, R, N))
    tx = scale_by_core_fisher(root_every=2)
    for a, b in zip(answers(tx, gradients)[0], answers(tx, 1024 * gradients)[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("unit", [TINY, HUGE])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_extreme_units_keep_precision(power, unit, key):
    gradients = jax.random.normal(key, (4, R, N))
    tx = scale_by_core_fisher(power=power)
    plain, _ = answers(tx, gradients)
    extreme, state = answers(tx, gradients * unit)
    factor = float(unit) ** (1 - 2 * power)
    # Units that are no power of two round once on the way in, and the root enlarges that.
    np.testing.assert_allclose(extreme[-1] / factor, plain[-1], rtol=1e-4, atol=1e-5)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


def test_gradient_spike_renews_the_root(key):
    """The Fisher outgrows its root, so the spike is preconditioned by a new root."""
    g = jax.random.normal(key, (R, N))
    usual, _ = answers(scale_by_core_fisher(root_every=100), [g] * 4)
    spiked, _ = answers(scale_by_core_fisher(root_every=100), [g, g, g, HUGE * g])
    bound = jnp.abs(usual[-1]).max() / (1 - 0.98) ** 0.5
    assert jnp.abs(spiked[-1]).max() < 1.1 * bound


def test_scale_recovers_after_a_gradient_spike(key):
    """The scale comes down with L: the gradients after it are not lost to underflow."""
    g = jax.random.normal(key, (R, N))
    tx = scale_by_core_fisher(decay=0.1, root_every=1)
    (*_, after), _ = answers(tx, [HUGE * g] + [g] * 55)
    (*_, usual), _ = answers(tx, [g] * 56)
    np.testing.assert_allclose(after, usual, rtol=1e-3)


def test_scale_keeps_the_trace_near_one(key):
    units = 10.0 ** jax.random.uniform(key, (12,), minval=-20, maxval=20)
    gradients = units[:, None, None] * jax.random.normal(key, (12, R, N))
    tx = scale_by_core_fisher()
    state, update = tx.init(as_core(gradients[0])), jax.jit(tx.update)
    for g in gradients:
        _, state = update(as_core(g), state)
        assert 1 <= jnp.trace(state.fisher["w"].value) < 4
        assert jnp.frexp(state.scale["w"].value)[0] == 0.5  # a power of two


def test_zero_core_leaves_the_state(key):
    a, b = jax.random.normal(key, (2, R, N))
    zero = jnp.zeros((R, N))
    tx = scale_by_core_fisher(root_every=1)
    with_zero, state = answers(tx, [zero, a, zero, b])
    without, plain = answers(tx, [a, b])
    assert not with_zero[0].any()
    assert not with_zero[2].any()
    np.testing.assert_array_equal(with_zero[3], without[1])
    np.testing.assert_array_equal(state.weight["w"].value, plain.weight["w"].value)


def test_stack_equals_its_matrices(key):
    gradients = jax.random.normal(key, (4, 2, 3, R, N)).at[2, 1, 1].set(0.0)
    tx = scale_by_core_fisher(root_every=2)
    together, _ = answers(tx, gradients)
    for i, j in np.ndindex(2, 3):
        alone, _ = answers(tx, gradients[:, i, j])
        np.testing.assert_allclose(together[-1][i, j], alone[-1], rtol=1e-4, atol=1e-5)


def test_state_size_is_two_r_by_r_matrices():
    state = scale_by_core_fisher().init(as_core(jnp.zeros((5, R, 1000))))
    assert isinstance(state, CoreFisherState)
    assert sum(x.size for x in jax.tree.leaves(state)) == 5 * (2 * R * R + 3) + 1


REFUSED = [
    (natgalore.scale_by_core_fisher, {"decay": 1.0}, ValueError),
    (natgalore.scale_by_core_fisher, {"decay": -0.1}, ValueError),
    (natgalore.scale_by_core_fisher, {"damping": 1e-4}, ValueError),
    (natgalore.scale_by_core_fisher, {"damping": float("inf")}, ValueError),
    (natgalore.scale_by_core_fisher, {"power": 0.3}, ValueError),
    (natgalore.scale_by_core_fisher, {"root_every": 0}, ValueError),
]


@pytest.mark.parametrize(
    ("make", "bad", "error"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_invalid_arguments_are_refused(make, bad, error):
    ((name, value),) = bad.items()
    # Called unchecked: users have no run-time type checker, and our message is what they read.
    with pytest.raises(error, match=rf"`{name}`.*{value}"):
        getattr(make, "__wrapped__", make)(**bad)
