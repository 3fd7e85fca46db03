import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from natgalore_jax.fisher.window import gram
from natgalore_jax.subspace.transport import reset, rotate, rotate_factors, rotate_square
from tests.oracle import oracles


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


@pytest.mark.parametrize("carry", [rotate, reset])
@pytest.mark.parametrize("sides", [1, 2])
def test_each_array_keeps_its_dtype(carry, sides, key):
    """Also of states in bfloat16, which a loop would refuse in another dtype."""
    C = contraction(key)
    factors = {"square_rows": jnp.ones(R), "square_cols": jnp.ones(N if sides == 1 else R)}
    all_states = {**states(key), **factors}
    if sides == 2:  # cores of r x r; L and the window's Gram matrix are as before
        cut = lambda x: x[..., :R] if x.shape[-1:] == (N,) else x
        all_states = {role: cut(x) for role, x in all_states.items()}
    low = [(role, jnp.asarray(x, jnp.bfloat16)) for role, x in all_states.items()]
    after = carry(low, *[C] * sides)
    assert [x.dtype for x in after] == [jnp.dtype(jnp.bfloat16)] * len(low)
    assert [x.shape for x in after] == [x.shape for _, x in low]


def test_rotated_states_equal_the_oracle(key):
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


def test_signed_permutation_permutes_states_exactly(key):
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
def test_rotated_squares_are_averages_of_squares(seed, shrink):
    """Nothing below the smallest or above the largest of a column, whatever C loses."""
    key = jax.random.key(seed)
    v = jnp.square(jax.random.normal(key, (R, N)))
    new = rotate_square(v, shrink * contraction(key))
    assert (new >= v.min(axis=0, keepdims=True) * (1 - CLOSE)).all()
    assert (new <= v.max(axis=0, keepdims=True) * (1 + CLOSE)).all()


def test_orthogonal_new_basis_starts_from_the_mean_square(key):
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


def both_sides(key):
    """States of r x r cores, and C and D of the two sides."""
    C, D = (contraction(k) for k in jax.random.split(key))
    old = {role: x[..., :R] if x.shape[-1:] == (N,) else x for role, x in states(key).items()}
    return C, D, old | {"gram": gram(old["window"])}


def test_columns_rotate_as_rows_do(key):
    """Turning both sides is turning one, and then the other of what is transposed."""
    C, D, old = both_sides(key)
    new = dict(zip(old, rotate(list(old.items()), C, D), strict=True))
    c, d = np.asarray(C, np.float64), np.asarray(D, np.float64)
    window = [c @ h @ d.T for h in np.asarray(old["window"], np.float64)]
    square = oracles.rotated_square(c, np.asarray(old["square"], np.float64))
    expected = {
        "linear": c @ np.asarray(old["linear"], np.float64) @ d.T,
        "square": oracles.rotated_square(d, square.T).T,
        "window": window,
        "gram": [[np.vdot(a, b) for a in window] for b in window],
        "fisher": oracles.rotated_fisher(c, np.asarray(old["fisher"])),  # R Rᵀ has no columns
    }
    for role, value in expected.items():
        np.testing.assert_allclose(new[role], value, atol=10 * CLOSE, err_msg=role)


def test_rounded_window_stays_rounded_with_its_exact_gram(key):
    window = jax.random.normal(key, (S, R, N)).astype(jnp.bfloat16)
    old = [("window", window), ("gram", gram(window.astype(jnp.float32)))]
    new, K = rotate(old, contraction(key))
    assert (new.dtype, K.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.asarray(new, np.float64).reshape(S, -1)
    np.testing.assert_allclose(K, exact @ exact.T, atol=CLOSE * R * N)


def test_reset_keeps_the_mean_of_squares(key):
    old = states(key)
    new = dict(zip(old, reset(list(old.items()), contraction(key)), strict=True))
    mean = np.broadcast_to(np.asarray(old["square"]).mean(axis=0), (R, N))
    np.testing.assert_allclose(new.pop("square"), mean, rtol=CLOSE)
    for role, x in new.items():
        assert (x.shape, x.dtype) == (old[role].shape, old[role].dtype), role
        assert not x.any(), role


def test_reset_equals_rotation_to_an_orthogonal_basis(key):
    """What `rotate` makes of squares at C = D = 0."""
    zero = jnp.zeros((R, R))
    *_, old = both_sides(key)
    square = [("square", old["square"])]
    (expected,), (actual,) = rotate(square, zero, zero), reset(square, zero, zero)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


class TestFactors:
    """Squares kept as row colᵀ / mean(row)."""

    @pytest.fixture
    def factors(self, key):
        row, col = (
            jnp.square(jax.random.normal(k, (n,)))
            for k, n in zip(jax.random.split(key), (R, N), strict=True)
        )
        return row, col * row.mean() / col.mean()  # both are means of the same squares

    def test_factors_rotate_as_the_squares_they_approximate(self, key, factors):
        C = contraction(key)
        row, col = rotate_factors(*factors, C)
        dense = rotate_square(jnp.outer(*factors) / factors[0].mean(), C)
        np.testing.assert_allclose(jnp.outer(row, col) / row.mean(), dense, rtol=10 * CLOSE)
        c, *both = (np.asarray(x, np.float64) for x in (C, *factors))
        for actual, expected in zip((row, col), oracles.rotated_factors(c, *both), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=10 * CLOSE)

    def test_factors_rotate_on_both_sides(self, key, factors):
        C, D = (contraction(k) for k in jax.random.split(key))
        row, col = factors[0], factors[1][:R] * factors[0].mean() / factors[1][:R].mean()
        new = rotate_factors(row, col, C, D)
        c, row, col, d = (np.asarray(x, np.float64) for x in (C, row, col, D))
        for actual, expected in zip(new, oracles.rotated_factors(c, row, col, d), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=10 * CLOSE)

    def test_factors_are_found_by_role(self, key, factors):
        C = contraction(key)
        old = [("scalar", jnp.ones(2)), *zip(("square_rows", "square_cols"), factors, strict=True)]
        _, *new = rotate(old, C)
        for actual, expected in zip(new, rotate_factors(*factors, C), strict=True):
            np.testing.assert_array_equal(actual, expected)

    def test_zero_factors_stay_zero(self, key):
        new = rotate_factors(jnp.zeros(R), jnp.zeros(N), contraction(key))
        assert not any(x.any() for x in new)

    def test_reset_factors_become_their_means(self, key, factors):
        """What `rotate` makes of them at C = D = 0."""
        zero, old = (
            jnp.zeros((R, R)),
            list(zip(("square_rows", "square_cols"), factors, strict=True)),
        )
        for actual, expected in zip(reset(old, zero), rotate(old, zero), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=CLOSE)
        square = [(role, x[:R]) for role, x in old]
        row, col = reset(square, zero, zero)
        np.testing.assert_allclose(row, square[0][1].mean(), rtol=CLOSE)
        np.testing.assert_allclose(col, square[1][1].mean(), rtol=CLOSE)


def test_unknown_role_is_refused(key):
    with pytest.raises(TypeError, match="'strange'"):
        rotate([("strange", jnp.ones((R, N)))], jnp.eye(R))
