import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from natgalore_jax.subspace.basis import (
    FIRST_ITERATIONS,
    METHODS,
    SHIFT,
    StoredBasis,
    basis_key,
    cosines,
    expand,
    from_core,
    normalised,
    power,
    svd,
    to_core,
)
from natgalore_jax.tree.leaf_spec import LeafSpec
from tests.helpers.cases import slow
from tests.helpers.compiling import AS_FOR_USERS
from tests.oracle import oracles


M, N, R = 16, 24, 4
# Sums of m = 16 products, each a rounding of 6e-8 off, twice: in the factor and in its use. QR
# stays below 1e-6 on CPUs; the SVD of one H200 reached 2.3e-6.
ORTHONORMAL = 4e-6

TRACKED = ("power", "svd")
SPEC = LeafSpec((), (M, N), (), (0,), (1,), R)


def gradient(key, decay=0.5, m=M, n=N):
    """A matrix with singular values i^(-decay)."""
    left, right = jax.random.split(key)
    U = jnp.linalg.qr(jax.random.normal(left, (m, m)))[0]
    V = jnp.linalg.qr(jax.random.normal(right, (n, m)))[0]
    return U @ jnp.diag(jnp.arange(1.0, m + 1) ** -decay) @ V.T


def start(key, r=R):
    return jnp.linalg.qr(jax.random.normal(key, (M, r)))[0]


def next_basis(method, G, P, key, turns=1):
    """The basis after a refresh, the first (of FIRST_ITERATIONS turns) or a later one."""
    unit, _ = normalised(G)
    return METHODS[method].next(unit, P, key, jnp.bool_(turns != 1))


def defect(P):
    """max|PᵀP − I|, in float64: on a GPU jax.numpy's own products would have 10 bits."""
    P = np.asarray(P, np.float64)
    return np.abs(P.T @ P - np.eye(P.shape[1])).max()


@pytest.mark.parametrize("turns", [1, FIRST_ITERATIONS])
@pytest.mark.parametrize("method", TRACKED)
def test_basis_equals_the_oracle(method, turns, key):
    G, P = gradient(key), start(key)
    expected = getattr(oracles, f"{method}_basis")(
        np.asarray(G, np.float64), np.asarray(P, np.float64), turns
    )
    actual = next_basis(method, G, P, key, turns)
    # A turn amplifies rounding by the gap between the first and the r-th squared singular value.
    np.testing.assert_allclose(actual, expected, atol=5e-5)


@pytest.mark.slow
def test_first_basis_captures_the_energy_of_the_svd(key):
    """The reason for FIRST_ITERATIONS: from a random start, within 3 % of the best energy."""
    energies = []
    for k in jax.random.split(key, 5):
        G = gradient(k, decay=0.5, m=64, n=96)
        P = next_basis(
            "power", G, jnp.linalg.qr(jax.random.normal(k, (64, 16)))[0], k, FIRST_ITERATIONS
        )
        best = jnp.square(jnp.linalg.svd(G, compute_uv=False)[:16]).sum()
        energies.append(jnp.square(P.T @ G).sum() / best)
    assert min(energies) > 0.97


def test_warm_iterations_converge_to_the_singular_vectors(key):
    G = gradient(key, decay=1.0)
    P = start(key)
    for _ in range(60):
        P = power(G, P, key)
    np.testing.assert_allclose(jnp.abs(P.T @ svd(G, P, key)), jnp.eye(R), atol=1e-3)


BAD = {
    "zero": lambda G: 0 * G,
    "nan": lambda G: G.at[3, 5].set(jnp.nan),
    "inf": lambda G: G.at[3, 5].set(jnp.inf),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_zero_and_nonfinite_gradients_are_not_usable(spoil, key):
    G, usable = normalised(spoil(gradient(key)))
    assert not usable
    assert jnp.isfinite(G).all()


ODD = {
    "tiny": lambda G: G * 1e-25,
    "huge": lambda G: G * 1e25,
    "rank 1": lambda G: jnp.outer(G[:, 0], G[0]),
    "rank 2, huge": lambda G: (jnp.outer(G[:, 0], G[0]) + jnp.outer(G[:, 1], G[1])) * 1e25,
    "one entry": lambda G: jnp.zeros_like(G).at[2, 3].set(7.0),
    "one row": lambda G: jnp.zeros_like(G).at[2].set(G[2]),
}


@pytest.mark.parametrize("turns", [1, FIRST_ITERATIONS])
@pytest.mark.parametrize("method", TRACKED)
@pytest.mark.parametrize("spoil", ODD.values(), ids=ODD)
def test_extreme_gradients_lie_in_an_orthonormal_basis(method, spoil, turns, key):
    G = spoil(gradient(key))
    assert normalised(G)[1]
    P = next_basis(method, G, start(key), key, turns)
    assert defect(P) < ORTHONORMAL
    scaled, P = np.asarray(G, np.float64) / float(jnp.abs(G).max()), np.asarray(P, np.float64)
    if np.linalg.matrix_rank(scaled, tol=1e-5) <= R:
        lost = np.linalg.norm(scaled - P @ (P.T @ scaled)) / np.linalg.norm(scaled)
        assert lost < 1e-3  # the shift, 1e-6 of the energy, is 1e-3 of the length


def test_directions_outside_a_low_rank_gradient_stay(key):
    """Of a rank-1 gradient one direction is new; the rest of the span is the old one's."""
    P = start(key)
    G = jnp.outer(jnp.ones(M), jnp.ones(N))
    new = power(G, P, key)
    both = jnp.concatenate([P, jnp.ones((M, 1)) / 4.0], axis=1)
    inside = jnp.linalg.qr(both)[0]
    # Next to the one large direction the old ones have the size of the shift, and its rounding.
    np.testing.assert_allclose(inside @ (inside.T @ new), new, atol=6e-8 / SHIFT)


@pytest.mark.parametrize("method", TRACKED)
def test_basis_is_independent_of_units(method, key):
    G, P = gradient(key), start(key)
    small = next_basis(method, G, P, key)
    large = next_basis(method, 1024 * G, P, key)
    np.testing.assert_array_equal(small, large)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1), exponent=st.integers(-20, 20), rank=st.sampled_from([1, 4, M])
)
def test_bases_are_orthonormal(seed, exponent, rank):
    key = jax.random.key(seed)
    G = jax.random.normal(key, (M, N)) * 10.0**exponent
    P = jax.jit(next_basis, static_argnums=(0, 4))(
        "power", G, start(key, rank), key, FIRST_ITERATIONS
    )
    assert defect(P) < ORTHONORMAL


def start_keys(seed=0, indices=(0, 1, 2), times=0, side=0):
    return jax.vmap(lambda i: basis_key(seed, i, times, side))(jnp.array(indices))


@pytest.mark.parametrize("method", METHODS)
def test_initial_bases_differ_by_key(method):
    """By seed, matrix, refresh and side; not by which others there are."""
    method, stack = METHODS[method], LeafSpec((), (3, M, N), (0,), (1,), (2,), R)

    def bases(spec=stack, **which):
        kept = method.start(start_keys(**which), spec, jnp.float32)
        return expand(kept, spec, jnp.float32)

    P = bases()
    assert P.shape == (3, M, R)
    assert max(defect(x) for x in P) < ORTHONORMAL
    np.testing.assert_array_equal(P[1], bases(SPEC, indices=(1,)))
    others = bases(seed=1), bases(times=1), bases(side=1), bases(indices=(3, 4, 5))
    for a, b in itertools.combinations([*P, *(x[0] for x in others)], 2):
        assert jnp.abs(a - b).max() > 0.1


@pytest.mark.parametrize(("m", "r"), [(M, 1), (M, M), (50304, 16), *slow((37, 20), (4096, 128))])
def test_random_basis_is_orthonormal_at_any_size(m, r, key):
    """Float32 rounds a phase below 2π by 2e-7; an angle not reduced would be off by m times it."""
    P = cosines(jax.random.key_data(key), m=m, r=r, dtype=jnp.float32)
    assert P.shape == (m, r)
    assert defect(P) < 4e-6


@pytest.mark.parametrize("m", [5, 16, 300])
def test_random_basis_has_columns_of_the_cosine_transform(m, key):
    """Against its definition in float64, columns and signs found by matching."""
    P = np.asarray(cosines(jax.random.key_data(key), m=m, r=m, dtype=jnp.float32), np.float64)
    i, k = np.arange(m)[:, None], np.arange(m)
    transform = np.cos(np.pi * (2 * i + 1) * k / (2 * m)) * np.where(k, 2 / m, 1 / m) ** 0.5
    constant = np.abs(P).std(axis=0).argmin()  # the one column of equal sizes, k = 0
    signs = np.sign(P[:, constant])[:, None]
    overlap = transform.T @ (signs * P)
    assert sorted(overlap.argmax(axis=0)) == list(k)  # each column once
    np.testing.assert_allclose(overlap.max(axis=0), 1.0, atol=1e-5)
    assert 0 < (signs > 0).sum() < m


def test_random_bases_have_uniform_mean_energy():
    """E[P Pᵀ] = (r/m) I: what a step loses, others bring."""
    draws = 4000
    data = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(0), draws))
    P = jax.vmap(lambda d: cosines(d, m=M, r=R, dtype=jnp.float32))(data)
    mean = np.einsum("dir,djr->ij", P, P) / draws
    # An entry of P Pᵀ is below 1 in size and spreads by less than √(r)/m = 0.13: 5 sigma are 0.01.
    np.testing.assert_allclose(mean, R / M * np.eye(M), atol=0.011)


def test_project_and_lift_equal_numpy(key):
    """P PᵀG Q Qᵀ, on stacks too, and on one side without Q."""
    G = jax.random.normal(key, (2, M, N))
    P = jnp.stack([start(k) for k in jax.random.split(key, 2)])
    Q = jnp.linalg.qr(jax.random.normal(key, (2, N, R)))[0]
    g, p, q = (np.asarray(x, np.float64) for x in (G, P, Q))
    one, two = to_core(G, P), to_core(G, P, Q)
    assert (one.shape, two.shape) == ((2, R, N), (2, R, R))
    close = {"rtol": 0, "atol": 1e-5}  # sums of 24 products of size one
    np.testing.assert_allclose(two, p.mT @ g @ q, **close)
    np.testing.assert_allclose(from_core(one.dtype, one, P), p @ p.mT @ g, **close)
    np.testing.assert_allclose(from_core(two.dtype, two, P, Q), p @ p.mT @ g @ q @ q.mT, **close)


def test_basis_function_with_another_shape_is_refused(key):
    G, P = gradient(key), start(key)
    with pytest.raises(ValueError, match=r"`basis` must return .*\(16, 4\), got \(4, 16\)"):
        StoredBasis(lambda G, P, key: P.T).next(G, P, key, jnp.bool_(True))


def test_power_program_has_no_svd_or_eigendecomposition():
    lowered = jax.jit(power).lower(jnp.ones((M, N)), jnp.eye(M, R), jax.random.key(0))
    program = lowered.compile(AS_FOR_USERS).as_text().lower()
    assert "geqrf" in program or "qr" in program
    for name in ("gesdd", "gesvd", "syevd", "heevd"):
        assert name not in program
