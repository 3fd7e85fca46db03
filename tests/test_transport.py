import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from natgalore_jax.fisher import gram
from natgalore_jax.transport import rotate, rotate_square

from . import oracles


R, N, S = 4, 10, 3
# Sums of at most S·N float32 products of order one: 30 eps.
CLOSE = 4e-6


def contraction(key):
    """C = P'ᵀP of two random bases of an 8-dimensional space."""
    P, Q = (jnp.linalg.qr(jax.random.normal(k, (8, R)))[0] for k in jax.random.split(key))
    return Q.T @ P


def states(key):
    window = jax.random.normal(key, (S, R, N))
    return {
        "linear": window[0],
        "square": jnp.square(window[1]),
        "window": window,
        "gram": gram(window),
        "fisher": window[2] @ window[2].T,
        "root": jnp.eye(R),
        "scalar": jnp.float32(7.0),
    }


def rotated(states, C):
    return dict(zip(states, rotate(list(states.items()), C), strict=True))


def test_equals_the_oracle(key):
    C, old = contraction(key), states(key)
    new = rotated(old, C)
    c = np.asarray(C, np.float64)
    window = [oracles.rotated_linear(c, h) for h in np.asarray(old["window"], np.float64)]
    expected = {
        "linear": oracles.rotated_linear(c, np.asarray(old["linear"])),
        "square": oracles.rotated_square(c, np.asarray(old["square"])),
        "window": window,
        "gram": [[np.vdot(a, b) for a in window] for b in window],
        "fisher": oracles.rotated_fisher(c, np.asarray(old["fisher"])),
        "root": np.zeros((R, R)),
        "scalar": 7.0,
    }
    for role, value in expected.items():
        np.testing.assert_allclose(new[role], value, atol=10 * CLOSE, err_msg=role)


def test_renaming_directions_renames_states_exactly(key):
    """A signed permutation is a change of names: no state loses or gains anything."""
    order = jax.random.permutation(key, R)
    signs = jnp.array([1.0, -1.0, -1.0, 1.0])
    C = jnp.diag(signs)[order]
    old, new = states(key), rotated(states(key), C)
    np.testing.assert_array_equal(new["linear"], (signs[:, None] * old["linear"])[order])
    np.testing.assert_array_equal(new["square"], old["square"][order])
    np.testing.assert_allclose(new["gram"], old["gram"], rtol=CLOSE)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), shrink=st.floats(0, 1))
def test_squares_become_averages_of_squares(seed, shrink):
    """Nothing below the smallest or above the largest of a column, whatever C loses."""
    key = jax.random.key(seed)
    v = jnp.square(jax.random.normal(key, (R, N)))
    new = rotate_square(v, shrink * contraction(key))
    assert (new >= v.min(axis=0, keepdims=True) * (1 - CLOSE)).all()
    assert (new <= v.max(axis=0, keepdims=True) * (1 + CLOSE)).all()


def test_a_basis_that_shares_nothing_starts_from_the_mean(key):
    v = jnp.square(jax.random.normal(key, (R, N)))
    new = rotate_square(v, jnp.zeros((R, R)))
    np.testing.assert_allclose(new, jnp.broadcast_to(v.mean(0, keepdims=True), v.shape), rtol=1e-6)


def test_adam_does_not_overshoot_after_a_large_rotation(key):
    """Constant gradient, C = I/2: without the second term of (2) |u| would be 1.8 for long."""
    v, m = jnp.ones((R, N)), jnp.ones((R, N))
    m, v = rotate([("linear", m), ("square", v)], 0.5 * jnp.eye(R))
    for _ in range(50):
        m, v = 0.9 * m + 0.1, 0.999 * v + 0.001
        assert (m / jnp.sqrt(v)).max() < 1.01


def test_an_unknown_role_is_refused(key):
    with pytest.raises(TypeError, match="'strange'"):
        rotate([("strange", jnp.ones((R, N)))], jnp.eye(R))
