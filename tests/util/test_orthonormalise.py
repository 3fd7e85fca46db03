"""The QR of each platform against NumPy's, for sketches of any condition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax.util import orthonormalise as module
from natgalore_jax.util.orthonormalise import cholesky_qr, householder_qr, orthonormalise, panel_qr
from tests.helpers.cases import slow


def sketches():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(96, 24))
    Q = np.linalg.qr(normal)[0]
    falling = np.geomspace(1, 1e-3, 24)
    return {
        "orthonormal": Q,
        "normal": normal,
        "huge": 1e12 * normal,
        "tiny": 1e-12 * normal,
        "long and short": Q * np.geomspace(1, 1e-6, 24),
        "one step from a warm basis": Q * falling @ (np.eye(24) + 0.2 * normal[:24]),
        "columns alike": normal[:, :1] + 1e-4 * normal,
        "rank deficient": normal[:, :8] @ normal[:8, :] + 1e-6 * Q,
        "a column of zeros": normal * (np.arange(24) != 3),
        "zero": 0 * normal,
    }


@pytest.mark.parametrize("sketch", sketches())
@pytest.mark.parametrize(
    "factorise",
    [cholesky_qr, householder_qr, functools.partial(panel_qr, width=2)],  # 12 panels, 2 blocks
    ids=["cholesky", "householder", "panels"],
)
def test_qr_factor_matches_numpy(factorise, sketch):
    Y = sketches()[sketch]
    Q = np.asarray(factorise(jnp.asarray(Y, jnp.float32)), np.float64)
    np.testing.assert_allclose(Q.T @ Q, np.eye(24), atol=2e-6)  # some eps of float32
    length = np.linalg.norm(Y, axis=0)
    Y = Y / np.where(length > 0, length, 1)
    T = Q.T @ Y
    small = 5e-6  # eps times the square root of the size, over a few steps
    np.testing.assert_allclose(Q @ T, Y, atol=small)
    np.testing.assert_allclose(np.tril(T, -1), 0, atol=small)
    assert np.diagonal(T).min() > -small
    if np.linalg.cond(Y) < 100:  # else rounding determines the last columns
        exact = np.linalg.qr(Y)
        np.testing.assert_allclose(Q, exact.Q * np.sign(np.diagonal(exact.R)), atol=1e-5)


@pytest.mark.parametrize(
    "sketch",
    ["orthonormal", *slow("huge", "long and short", "one step from a warm basis", "columns alike")],
)
def test_cholesky_qr_needs_no_fallback(sketch, monkeypatch):
    monkeypatch.setattr(module, "householder_qr", lambda Y: jnp.nan * Y)
    assert np.isfinite(cholesky_qr(jnp.asarray(sketches()[sketch], jnp.float32))).all()


@pytest.mark.parametrize("rank", [1, *slow(3, 20)])
@pytest.mark.parametrize(("m", "r"), [(64, 16), *slow((512, 128), (1024, 256))])
def test_cholesky_qr_of_a_rank_deficient_matrix_needs_no_fallback(rank, m, r, monkeypatch):
    """As the product with a gradient of low rank, plus the shift of a power step."""
    monkeypatch.setattr(module, "householder_qr", lambda Y: jnp.nan * Y)
    rng = np.random.default_rng(0)
    Y = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, r))
    Q = np.linalg.qr(rng.standard_normal((m, r)))[0]
    for shift in (0.0, 1e-8, 1e-6):
        sketch = Y / np.linalg.norm(Y) + shift * Q
        assert np.isfinite(cholesky_qr(jnp.asarray(sketch, jnp.float32))).all()


def test_cholesky_qr_factorises_three_times(monkeypatch):
    """At a condition of 1e5, as of power steps in training: two steps, and the last."""
    calls, cholesky = [], jnp.linalg.cholesky
    monkeypatch.setattr(jnp.linalg, "cholesky", lambda A: calls.append(A) or cholesky(A))
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, 128)))[0] for n in (512, 128))
    with jax.disable_jit():
        cholesky_qr(jnp.asarray((U * np.geomspace(1, 1e-5, 128)) @ V.T, jnp.float32))
    assert len(calls) == 3


def test_several_cholesky_qrs_equal_single_ones():
    """One matrix of them needs more steps than the others, another one the fallback."""
    names = ["normal", "one step from a warm basis", "zero"]
    stack = jnp.asarray(np.stack([sketches()[name] for name in names]), jnp.float32)
    together = jax.jit(jax.vmap(cholesky_qr))(stack)
    for i, one in enumerate(stack):
        # Rounding of the products, times the condition of the second sketch, 1e3.
        np.testing.assert_allclose(together[i], jax.jit(cholesky_qr)(one), atol=1e-4)


def test_cholesky_qr_waits_for_one_condition(monkeypatch):
    """Also under `vmap`, where a condition on the fallback would become a select of both."""
    calls = []

    def recorded(Y):
        jax.debug.callback(lambda: calls.append(1))
        return householder_qr(Y)

    monkeypatch.setattr(module, "householder_qr", recorded)
    Y = jnp.asarray(sketches()["normal"], jnp.float32)
    for factorise, y in ((cholesky_qr, Y), (jax.vmap(cholesky_qr), jnp.stack([Y, 2 * Y]))):
        names = [eqn.primitive.name for eqn in jax.make_jaxpr(factorise)(y).eqns]
        assert names.count("while") == 1
        assert "cond" not in names
        jax.block_until_ready(jax.jit(lambda y, f=factorise: f(y))(y))
        jax.effects_barrier()
        assert not calls
    jax.block_until_ready(jax.jit(lambda y: cholesky_qr(y))(0 * Y))
    jax.effects_barrier()
    assert calls


def test_cholesky_qr_propagates_nan():
    assert not np.isfinite(cholesky_qr(jnp.full((8, 2), jnp.nan))).any()


def test_orthonormalise_keeps_an_orthonormal_basis():
    """Signs of warm bases do not flip."""
    P = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 4)))[0].astype(np.float32)
    np.testing.assert_allclose(orthonormalise(jnp.asarray(P)), P, atol=1e-6)
