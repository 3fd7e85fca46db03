"""The residual G − P R; whole trajectories against the oracle are in test_trajectory.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.subspace import residual as residual_module
from natgalore_jax.subspace.projection import expand_bases
from natgalore_jax.subspace.residual import (
    DAMPING,
    RESIDUALS,
    Momentum,
    outside,
    with_residual,
)
from natgalore_jax.subspace.state import SubspaceState, settings_of
from natgalore_jax.util.linalg import matmul
from tests.helpers.cases import quick, slow
from tests.helpers.partners import INSIDE, last_two_axes
from tests.oracle import oracles


M, N, R = 12, 20, 4
SHAPES = {"layers": {"up": {"kernel": (3, M, N)}}, "out": {"kernel": (N, M)}, "norm": (M,)}
project = functools.partial(natgalore.project, R, residual="isotropic", refresh_every=3)


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    normal = lambda shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return jax.tree.map(normal, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def run(tx, gradients, params=None):
    """The updates of each step, and the state after it."""
    update = jax.jit(tx.update)
    params = tree(0) if params is None else params
    state = tx.init(params)
    for g in gradients:
        updates, state = update(g, state, params)
        yield updates, state


def last(tx, gradients, params=None):
    *_, (updates, state) = run(tx, gradients, params)
    return updates, state


def assert_close(actual, expected, **close):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **close), actual, expected)


def identity_residual(T, R, U):
    return T


def outside_subspace(updates, state, name=("out", "kernel")):
    """The part of an update that is orthogonal to the basis, projected side first."""
    P, W = (functools.reduce(lambda x, key: x[key], name, x) for x in (state.basis, updates))
    (basis,) = expand_bases(P.spec.unnamed, jnp.float32, (P.value,))
    W = P.spec.to_view(W)
    return W - matmul(basis, matmul(basis.mT, W))


class TestLeafMathematics:
    """Stacks of matrices, in float64."""

    @pytest.fixture(autouse=True)
    def float64(self):
        with jax.enable_x64(True):
            yield

    @pytest.mark.parametrize("side", ["short", "both"])
    def test_isotropic_equals_the_oracle(self, side):
        rng = np.random.default_rng(7)
        G, P, Q = (rng.standard_normal((3, *s)) for s in ((M, N), (M, R), (N, R)))
        P, Q = np.linalg.qr(P)[0], np.linalg.qr(Q)[0]
        G[1, :, 2] = G[1, :, 2] - P[1] @ P[1].T @ G[1, :, 2]
        G[0, :, 4] = 0.0
        bases = [P, Q] if side == "both" else [P]
        lift = lambda X: P @ X @ Q.mT if side == "both" else P @ X
        core = P.mT @ G @ Q if side == "both" else P.mT @ G
        U = rng.standard_normal(core.shape)
        S = np.stack([oracles.isotropic(*x) for x in zip(G - lift(core), core, U, strict=True)])
        size, u, s, _ = with_residual("isotropic", *map(jnp.asarray, (G, core, U, *bases)))
        np.testing.assert_allclose(size * (lift(u) + s), lift(U) + S, atol=1e-12)

    @pytest.mark.parametrize("shape", [(M, N), (40, N), (R, N), *slow(((N, M),))])
    @pytest.mark.parametrize("side", ["short", "both"])
    def test_whitened_equals_the_oracle(self, shape, side):
        """Wide and tall views, more remaining directions than columns, and none."""
        rng = np.random.default_rng(7)
        G = rng.standard_normal((2, *shape)) * np.array([[[1e-3]], [[1e3]]])
        bases = [np.linalg.qr(rng.standard_normal((2, s, R)))[0] for s in shape]
        bases = bases if side == "both" else bases[:1]
        core = bases[0].mT @ G @ (bases[1] if side == "both" else np.eye(shape[1]))
        U = rng.standard_normal(core.shape)
        lifted = bases[0] @ core @ (bases[1].mT if side == "both" else np.eye(shape[1]))
        S = np.stack([oracles.whitened(*x) for x in zip(G - lifted, core, U, strict=True)])
        size, u, s, _ = with_residual("whitened", *map(jnp.asarray, (G, core, U, *bases)))
        s = size * s
        np.testing.assert_allclose(size * u, U, rtol=1e-15)
        np.testing.assert_allclose(s, S, atol=1e-10)
        # Entries have mean square 1, up to the spread of singular values after the quintics.
        remaining = np.prod(shape) - core[0].size
        squares = np.square(s).sum(axis=(1, 2)) / max(remaining, 1)
        assert np.all((squares > 0.5) & (squares < 1.3)) if remaining else not s.any()

    @pytest.mark.parametrize("side", ["short", "both"])
    def test_function_is_added_as_it_is(self, side):
        """For each matrix of a stack by itself, in the dtype of the gradient."""
        rng = np.random.default_rng(7)
        G = rng.standard_normal((2, 3, M, N))
        bases = [np.linalg.qr(rng.standard_normal((2, 3, s, R)))[0] for s in (M, N)]
        bases = bases if side == "both" else bases[:1]
        right = bases[1] if side == "both" else np.eye(N)
        core = bases[0].mT @ G @ right
        U = rng.standard_normal(core.shape)
        own = lambda T, R, U: (1e3 * T * abs(R).max() + abs(U).max()).astype("float32")
        size, u, s, _ = with_residual(own, *map(jnp.asarray, (G, core, U, *bases)))
        T = G - bases[0] @ core @ right.mT
        largest = lambda x: abs(x).max(axis=(-2, -1), keepdims=True)
        np.testing.assert_array_equal(u, U)
        assert size == 1.0
        np.testing.assert_allclose(s, 1e3 * T * largest(core) + largest(U), rtol=1e-5)
        assert s.dtype == jnp.float64

    @pytest.mark.parametrize("momentum", [None, 0.9])
    def test_whitened_is_finite_for_any_gradient(self, momentum):
        """S does not depend on the size of G; it is finite for zeros and subnormal numbers."""
        rng = np.random.default_rng(8)
        P = jnp.asarray(np.linalg.qr(rng.standard_normal((M, R)))[0], jnp.float32)
        G = jnp.asarray(rng.standard_normal((M, N)), jnp.float32)

        @jax.jit
        def whitened(G):
            state = None if momentum is None else Momentum(jnp.zeros_like(G), momentum)
            core = P.mT @ G
            size, _, S, _ = with_residual("whitened", G, core, 0 * core, P, momentum=state)
            return size * S

        S = whitened(G)
        assert float(jnp.abs(S).max()) > 1
        for power in (-100, -60, 60, 110):  # of two: the digits stay
            np.testing.assert_allclose(whitened(G * 2.0**power), S, rtol=1e-5, atol=1e-5)
        for size in (0.0, 1e-45, 1e-38):
            assert jnp.all(jnp.isfinite(whitened(G * size)))

    @pytest.mark.parametrize("both", [False, True])
    def test_error_of_float16_on_gpus(self, both, monkeypatch):
        """T / unit from P R in float16: within 1e-3 |G| at |T| = 0.03 |G|; or float32."""
        rng = np.random.default_rng(9)
        P, Q = (np.linalg.qr(rng.standard_normal((k, R)))[0] for k in (M, N))
        bases = (P, Q) if both else (P,)
        core = rng.standard_normal((R, R if both else N))
        span = P @ core @ Q.T if both else P @ core
        T = rng.standard_normal((M, N))
        T = T - (P @ (P.T @ T @ Q) @ Q.T if both else P @ (P.T @ T))
        T *= 0.03 * np.linalg.norm(span) / np.linalg.norm(T)
        unit = 2.0**-100 if both else 2.0**90  # far outside float16's range
        arrays = [jnp.asarray(x, jnp.float32) for x in (unit * (span + T), unit * core, *bases)]
        on_gpu = lambda *args, gpu, default: gpu(*args)
        monkeypatch.setattr(residual_module, "by_platform", on_gpu)
        size = np.linalg.norm(span)
        for setting, low, high in ((None, 1e-5, 1e-3), ("highest", 0, 1e-6)):
            with jax.default_matmul_precision(setting):
                X = outside(*arrays, unit=jnp.full((1, 1), unit, jnp.float32))
            assert X.dtype == jnp.float32
            assert low * size <= np.linalg.norm(X - T) < high * size


class TestMomentum:
    """Trajectories with a momentum, through refreshes, are in test_trajectory.py."""

    @pytest.mark.parametrize("side", ["short", "both"])
    @pytest.mark.parametrize("rule", RESIDUALS)
    def test_equals_the_oracle(self, rule, side):
        """Of a momentum that is not orthogonal to P, as after a refresh."""
        rng = np.random.default_rng(7)
        G, momentum = rng.standard_normal((2, M, N)) * np.array([1e3, 1.0])[:, None, None]
        P, Q = (np.linalg.qr(rng.standard_normal((s, R)))[0] for s in (M, N))
        bases = [P, Q] if side == "both" else [P]
        right = Q if side == "both" else np.eye(N)
        core, beta = P.T @ G @ right, 0.8
        T = G - P @ core @ right.T
        old = momentum - P @ P.T @ momentum @ right @ right.T
        new = beta * old + (1 - beta) * T
        nesterov = beta * new + (1 - beta) * T
        S = getattr(oracles, rule)(nesterov, core, core, g=(1 - beta) * G)
        with jax.enable_x64(True):
            size, u, s, m = with_residual(
                rule,
                *map(jnp.asarray, (G, core, core, *bases)),
                scale=0.2,
                momentum=Momentum(jnp.asarray(momentum), beta),
            )
        np.testing.assert_allclose(size * np.asarray(u), core, rtol=1e-15)
        np.testing.assert_allclose(m, new, atol=1e-10)  # rounding of 1e3
        np.testing.assert_allclose(size * np.asarray(s), 0.2 * S, atol=1e-10)

    @pytest.mark.parametrize("rule", RESIDUALS)
    def test_decay_of_zero_is_no_momentum(self, rule):
        make = lambda beta: project(
            optax.scale_by_adam(), residual=rule, residual_momentum=beta, residual_scale=0.5
        )
        gradients = [tree(i) for i in range(5)]
        updates, none = (last(make(beta), gradients)[0] for beta in (0.0, None))
        assert_close(updates, none, rtol=1e-4, atol=1e-5)  # float32, in another order

    def test_momentum_is_orthogonal_to_the_basis_it_meets(self):
        """Also in the update that refreshes P, from a gradient in other directions."""
        tx = project(optax.scale_by_adam(), residual="whitened", residual_momentum=0.95)
        states = [state for _, state in run(tx, [tree(i) for i in range(7)])]
        changes = 0
        for before, state in itertools.pairwise(states):
            P, old = (x.basis["out"]["kernel"].value for x in (state, before))
            changes += bool(np.any(old != P))
            momentum = state.inner_state.momentum["out"]["kernel"].value
            assert momentum.shape == (M, N)  # as its matrix view, the short side first
            # Products of 12 numbers in float32.
            np.testing.assert_allclose(matmul(P.mT, momentum), 0.0, atol=1e-5)
        assert changes == 2

    def test_bad_gradient_counts_as_zero(self):
        tx = project(optax.scale_by_adam(), residual="whitened", residual_momentum=0.9)
        gradients = [tree(1), tree(2)]
        kernel = gradients[1]["layers"]["up"]["kernel"]
        gradients[1]["layers"]["up"]["kernel"] = kernel.at[1, 2, 3].set(jnp.inf)
        (_, before), (updates, after) = run(tx, gradients)
        old, new = (x.inner_state.momentum["layers"]["up"]["kernel"].value for x in (before, after))
        moved = updates["layers"]["up"]["kernel"]
        assert [bool(x.any()) for x in moved] == [True, False, True]
        np.testing.assert_allclose(new[1], 0.9 * old[1], rtol=1e-5, atol=1e-6)
        assert np.isfinite(new).all()

    @pytest.mark.parametrize("bits", [8, *slow(4)])
    def test_codes_of_the_momentum(self, bits):
        """Stored in `bits`, sized as reported, and within half a gap of the float32 momentum."""
        params = {"up": {"kernel": jnp.zeros((64, 128))}}
        rng = np.random.default_rng(0)
        draw = lambda: {"up": {"kernel": jnp.asarray(rng.standard_normal((64, 128)), "f")}}
        gradients = [draw() for _ in range(2)]
        tx = natgalore.natural_galore(1e-2, 8, residual_momentum=0.95)
        coded = natgalore.quantized(tx, {"full": bits})
        (first, _), (_, exact) = run(tx, gradients, params)
        (same, _), (_, state) = run(coded, gradients, params)
        assert_close(same, first, rtol=1e-5, atol=1e-7)  # zeros are exact in codes
        at = lambda state: state[0].inner_state.momentum["up"]["kernel"].value
        codes, momentum = at(state.inner_state), at(exact)
        assert codes.codes.dtype == {8: jnp.int8, 4: jnp.int4}[bits]
        # Half the widest gap, twice: of the first step's rounding, 0.95 times, and of the second's.
        gap = {8: 0.9 / 64, 4: 0.26}[bits] * float(abs(momentum).max())
        assert float(abs(codes.decode() - momentum).max()) <= gap
        sizes = natgalore.memory_report(params, {"full": tx, "coded": coded}).total
        assert sizes["full"] - sizes["coded"] == 64 * (128 * (32 - bits) // 8 - 16)  # four scales

    def test_wrong_arguments_and_states_are_refused(self):
        adam = optax.scale_by_adam()
        with pytest.raises(ValueError, match="`residual_momentum` is that of a `residual`"):
            natgalore.project(R, adam, residual_momentum=0.9)
        with pytest.raises(ValueError, match="`residual_scale` is that of a `residual`"):
            natgalore.natural_galore(1e-3, 8, residual=None, residual_scale=0.4)
        with pytest.raises(ValueError, match="`residual_momentum` must be at least 0"):
            project(adam, residual_momentum=1.0)
        with pytest.raises(ValueError, match="`residual_scale` must be above 0"):
            project(adam, residual_scale=0.0)
        having, lacking = project(adam, residual_momentum=0.9), project(adam)
        for tx, other in ((having, lacking), (lacking, having)):
            with pytest.raises(ValueError, match=r"a run with(out)? `residual_momentum`"):
                tx.update(tree(1), other.init(tree(0)))


class TestIsotropic:
    def test_residual_has_unit_rms(self):
        """In each column, for gradients of any size: m − r entries of mean square 1."""
        sizes = 10.0 ** jnp.arange(-10, 10)[:, None]
        # A random basis contains no column.
        tx = project(optax.scale_by_adam(), basis="random")
        for unit in (1e-15, 1.0, 1e15):
            g = tree(1)
            g["out"]["kernel"] = g["out"]["kernel"] * sizes * unit  # (20, 12), n first
            *_, (updates, state) = run(tx, [g])
            squares = jnp.square(outside_subspace(updates, state)).mean(axis=0) * M / (M - R)
            np.testing.assert_allclose(squares, 1.0, atol=10 * DAMPING)  # |T|² is > |G|²/10

    def test_residual_is_parallel_to_the_remaining_columns(self):
        tx, g = project(optax.identity()), tree(1)
        *_, (updates, state) = run(tx, [g])
        got, expected = (outside_subspace(x, state) for x in (updates, g))
        cosine = (got * expected).sum(0) / (
            jnp.linalg.norm(got, axis=0) * jnp.linalg.norm(expected, axis=0)
        )
        np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)

    def test_rounding_noise_is_not_scaled_up(self):
        """For a gradient in the span of P the residual is rounding."""
        rng = np.random.default_rng(3)
        low = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 96))
        params = {"up": {"kernel": jnp.zeros((64, 96))}}
        g = {"up": {"kernel": jnp.asarray(low, jnp.float32)}}
        *_, (updates, state) = run(project(optax.scale_by_adam()), [g] * 4, params)
        noise = outside_subspace(updates, state, ("up", "kernel"))
        # √(m / ρ) times rounding of 1e-6 of a column; undamped it would be 1.
        assert float(jnp.abs(noise).max()) < 250 * 1e-5

    def test_zero_column_stays_zero(self):
        g = tree(1)
        g["out"]["kernel"] = g["out"]["kernel"].at[3].set(0.0)
        tx = project(optax.scale_by_adam())
        *_, (updates, _) = run(tx, [g, g])
        assert not updates["out"]["kernel"][3].any()
        assert updates["out"]["kernel"][2].all()
        *_, (updates, _) = run(tx, [jax.tree.map(jnp.zeros_like, g)] * 2)
        assert not any(x.any() for x in jax.tree.leaves(updates))


class TestWhitened:
    def test_rounding_noise_is_not_scaled_up(self):
        """For a gradient in the span of P the residual is rounding."""
        rng = np.random.default_rng(3)
        low = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 96))
        params = {"up": {"kernel": jnp.zeros((64, 96))}}
        g = {"up": {"kernel": jnp.asarray(low, jnp.float32)}}
        tx = project(optax.scale_by_adam(), residual="whitened")
        *_, (updates, state) = run(tx, [g] * 4, params)
        noise = outside_subspace(updates, state, ("up", "kernel"))
        # 485 / √ρ times rounding of 1e-6 of the matrix; undamped its entries would be 1.
        assert float(jnp.abs(noise).max()) < 485 / DAMPING**0.5 * 1e-6


@pytest.mark.parametrize("side", ["short", *slow("both")])
@pytest.mark.parametrize("residual", quick(["whitened"], RESIDUALS))
@pytest.mark.parametrize("unit", [0.0, *slow(1e-25, 1e25)])
def test_gradients_of_any_size(unit, residual, side):
    tx = project(optax.scale_by_sign(), residual=residual, side=side)  # its answers have one size
    g = jax.tree.map(lambda x: unit * x, tree(1))
    *_, (updates, _) = run(tx, [g, g])
    *_, (expected, _) = run(tx, [tree(1) if unit else g] * 2)
    for name in ("layers", "out"):
        # The sign of a core that is nearly 0 would differ: none of these entries is.
        assert_close(updates[name], expected[name], rtol=1e-3, atol=1e-3)
    assert any(x.any() for x in jax.tree.leaves(updates)) == bool(unit)


@pytest.mark.parametrize(
    "residual",
    ["isotropic", *slow("whitened"), pytest.param(lambda T, R, U: 1.0 / T, id="function")],
)
@pytest.mark.parametrize("bad", [jnp.nan, *slow(-jnp.inf, 0.0)])
def test_bad_gradient_adds_no_residual(residual, bad):
    """To its matrix, at a refresh; also where the function divides by zero."""
    tx = project(optax.scale_by_adam(), residual=residual, stagger=False)
    gradients = [tree(i) for i in range(5)]
    kernel = gradients[3]["layers"]["up"]["kernel"]
    spoiled = jnp.zeros_like(kernel[1]) if bad == 0 else kernel[1].at[2, 3].set(bad)
    gradients[3]["layers"]["up"]["kernel"] = kernel.at[1].set(spoiled)
    steps = list(run(tx, gradients))
    updates = steps[3][0]["layers"]["up"]["kernel"]
    if bad != 0:
        assert [bool(x.any()) for x in updates] == [True, False, True]
    if bad != 0 or residual in RESIDUALS:
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(steps[3:]))
    if bad == 0 and residual in RESIDUALS:  # momentum moves the matrix, within its subspace
        (_, state), P = steps[3], steps[3][1].basis["layers"]["up"]["kernel"].value[1]
        assert state.skipped["layers"]["up"]["kernel"].value[1] == 0
        remaining = updates[1] - matmul(P, matmul(P.mT, updates[1]))
        np.testing.assert_allclose(remaining, 0.0, atol=1e-5 * float(abs(updates[1]).max()))


@pytest.mark.parametrize("side", ["short", *slow("both")])
def test_identity_with_the_full_residual_returns_the_gradient(side):
    """P R + (G − P R) = G, also after a gradient of 100 times the size."""
    tx = project(optax.identity(), residual=identity_residual, side=side)
    gradients = [jax.tree.map(lambda x, i=i: 100.0**i * x, tree(i)) for i in range(4)]
    for (updates, _), g in zip(run(tx, gradients), gradients, strict=True):
        size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(g))
        assert_close(updates, g, rtol=0, atol=1e-5 * size)  # 20 products in float32


@pytest.mark.slow
def test_residual_is_zero_at_full_rank():
    make = lambda residual: natgalore.natural_galore(1e-2, M, refresh_every=2, residual=residual)
    with jax.enable_x64(True):
        gradients = optax.tree.cast([tree(i) for i in range(4)], jnp.float64)
        *added, none = (
            last(make(x), gradients, gradients[0])[0] for x in ("isotropic", "whitened", None)
        )
        for updates in added:
            assert_close(updates, none, rtol=0, atol=1e-15)  # rounding of updates of 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["isotropic", "whitened", identity_residual])
def test_bfloat16_update_is_the_rounded_float32_update(residual):
    tx = project(optax.scale_by_adam(), residual=residual)
    g = tree(1, jnp.bfloat16)
    low, _ = last(tx, [g])
    exact, _ = last(tx, [optax.tree.cast(g, jnp.float32)])
    ((updates, _),) = run(tx, [g], g)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(low, exact, rtol=1e-5, atol=1e-5)  # params are float32: no rounding there
    # Rounded to nearest once, after the sum.
    wide = optax.tree.cast(updates, jnp.float32)
    assert_close(wide, exact, rtol=2**-8 + 1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["isotropic", "whitened", identity_residual])
def test_scale_multiplies_both_parts(residual):
    make = lambda scale: project(optax.scale_by_adam(), residual=residual, scale=scale)
    one, two = (last(make(scale), [tree(1), tree(2)])[0] for scale in (1, 2))
    for name in ("layers", "out"):
        doubled = jax.tree.map(lambda x: 2 * x, one[name])
        assert_close(two[name], doubled, rtol=1e-6, atol=1e-6)


class TestFunction:
    @pytest.mark.slow
    def test_function_gets_remaining_gradient_core_and_update(self):
        seen = []

        def own(T, core, U):
            seen.append((T.shape, core.shape, U.shape))
            return jnp.zeros_like(T)

        for side, k in (("short", N), ("both", R)):
            tx = project(optax.scale_by_adam(), residual=own, side=side)
            plain = project(optax.scale_by_adam(), residual=None, side=side)
            assert_close(last(tx, [tree(1)])[0], last(plain, [tree(1)])[0], rtol=1e-6)
            assert set(seen) <= {((M, N), (R, k), (R, k)), ((N, M), (R, k), (R, k))}
            seen.clear()

    def test_function_with_another_shape_is_refused(self):
        tx = project(optax.identity(), residual=lambda T, R, U: R)
        with pytest.raises(ValueError, match=r"`residual` must return .*\(12, 20\), got \(4, 20\)"):
            tx.update(tree(1), tx.init(tree(0)))


class TestState:
    def test_residual_has_no_state(self):
        """A run without a residual goes on with one."""
        make = lambda residual: natgalore.natural_galore(1e-2, R, residual=residual)
        g = [tree(1), tree(2)]
        kinds = (None, "isotropic", "whitened")
        (none, isotropic, whitened) = (last(make(x), g)[1] for x in kinds)
        for state in (isotropic, whitened):
            assert isinstance(state[0], SubspaceState)
            assert list(map(jnp.shape, jax.tree.leaves(state))) == [
                x.shape for x in jax.tree.leaves(none)
            ]
            pairs = zip(jax.tree.leaves(state), jax.tree.leaves(none), strict=True)
            for x, y in pairs:
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-30)
        report = natgalore.memory_report(tree(0), {str(x): make(x) for x in kinds})
        assert len(set(report.total.values())) == 1
        update = jax.jit(make("isotropic").update)
        updates, _ = update(g[0], none, g[0])
        assert_close(updates, update(g[0], isotropic, g[0])[0], rtol=1e-5, atol=1e-8)

    @pytest.mark.slow
    def test_diagnostics_find_the_state(self):
        tx = natgalore.natural_galore(1e-2, R, residual="isotropic")
        _, state = last(tx, [tree(1)])
        assert set(natgalore.skipped_steps(state)) == {"layers/up/kernel", "out/kernel", "norm"}
        assert set(natgalore.explained_energy(state, tree(1))) == {"layers/up/kernel", "out/kernel"}
        assert "3 x (12 x 20)" in str(natgalore.describe(tx, tree(0)))


class TestProgram:
    @pytest.mark.slow
    def test_isotropic_needs_no_product(self):
        params = {"up": {"kernel": jnp.zeros((64, 256))}}

        def program(residual):
            tx = natgalore.project(8, optax.scale_by_adam(), residual=residual)
            lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, tx.init(params))
            return lowered.as_text().count("dot_general")

        assert program("isotropic") == program(None) > 0
        assert program(identity_residual) == program(None) + 1


# --- Inners with a learning rate in them --------------------------------------------------------

PARAMS = {"up": {"kernel": jnp.ones((M, N))}, "norm": {"scale": jnp.ones(M)}}
QUICK = (*("adamw", "sgd", "contrib.muon", "inject_hyperparams", "MultiSteps", "apply_if_finite"),)
RATES = {k: v for k, v in INSIDE.items() if k != "set_to_zero"}


def negated(inner):
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    return optax.chain(inner, optax.scale(-1.0))


@pytest.mark.parametrize("name", quick(QUICK, [*RATES]))
def test_partner_with_a_learning_rate_is_refused(name):
    """Beside every residual; with a positive rate it is accepted beside a function."""
    params = {**PARAMS, "layers": {"kernel": jnp.ones((2, M, N))}}
    make = INSIDE[name].make

    def init(inner, residual):
        jax.eval_shape(project(inner, residual=residual, transport="keep").init, params)

    for residual in ("whitened", identity_residual):
        with pytest.raises(
            ValueError, match=r"before the learning rate, but at `\w*/kernel` .*project_back"
        ):
            init(make(), residual)
    init(negated(make()), identity_residual)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100)
NEGATIVE = {
    "schedule": optax.scale_by_learning_rate(SCHEDULE),
    "schedule below zero": optax.scale_by_schedule(lambda count: -SCHEDULE(count)),
    "linear from below zero": optax.scale_by_schedule(optax.linear_schedule(-1.0, -0.1, 10)),
    "decayed": optax.chain(optax.add_decayed_weights(0.1), optax.scale(-1e-2)),
    "clipped": optax.chain(optax.scale(-1e-2), optax.clip(1.0)),
    "clipped by norm": optax.chain(optax.scale(-1e-2), optax.clip_by_global_norm(1.0)),
    "averaged": optax.chain(optax.scale(-1e-2), optax.ema(0.9)),
    "preconditioned": optax.chain(optax.scale(-1e-2), natgalore.scale_by_fisher(3)),
    "negative": optax.stateless(lambda g, _: jax.tree.map(jnp.negative, g)),
    "of two cases": optax.stateless(
        lambda g, _: jax.tree.map(lambda x: jax.lax.cond(x.sum() > 0, jnp.negative, abs, x), g)
    ),
    "chosen": optax.stateless(
        lambda g, _: jax.tree.map(lambda x: jnp.where(x.sum() > 0, -x, abs(x)), g)
    ),
    "subtracted": optax.stateless(lambda g, _: jax.tree.map(lambda x: 0.0 - x, g)),
}
POSITIVE = {
    "number": optax.scale(1e-3),
    "schedule": optax.scale_by_schedule(SCHEDULE),
    "clipped": optax.chain(optax.scale(1e-2), optax.clip_by_global_norm(1.0)),
    "decayed": optax.chain(optax.add_decayed_weights(0.1), optax.scale(1e-2)),
    "accumulated": optax.chain(optax.scale(1e-3), optax.apply_every(5)),
}
both_inits = pytest.mark.parametrize(
    "init", [lambda tx: tx.init, *slow(lambda tx: jax.jit(tx.init))], ids=["eager", "jit"]
)


@pytest.mark.parametrize("rate", NEGATIVE.values(), ids=NEGATIVE)
@pytest.mark.parametrize("residual", ["whitened", identity_residual])
@both_inits
def test_negative_rate_is_refused(rate, residual, init):
    stages = project(transport="keep", residual=residual), optax.scale_by_adam(), rate
    with pytest.raises(ValueError, match=r"before the learning rate.* with the opposite sign"):
        init(natgalore.chain(*stages))(PARAMS)


@pytest.mark.parametrize("rate", POSITIVE.values(), ids=POSITIVE)
@pytest.mark.parametrize("residual", RESIDUALS)
@both_inits
def test_positive_rate_is_refused_beside_a_residual_of_size_1(rate, residual, init):
    adam = optax.scale_by_adam()
    chain = lambda residual: natgalore.chain(
        project(transport="keep", residual=residual), adam, rate
    )
    with pytest.raises(ValueError, match=r"before the learning rate.* with one of RMS 0\.0"):
        init(chain(residual))(PARAMS)
    init(chain(identity_residual))(PARAMS)


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
        optax.chain(optax.scale_by_adam(), optax.scale(0.2)),
        # At step 0, or before step 4, its answer is zero.
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: count / 10)),
        optax.chain(optax.scale_by_adam(), optax.apply_every(5)),
        optax.set_to_zero(),
        natgalore.scale_by_fisher(power=1.0),
        # The learning rate of other leaves does not matter.
        optax.partition(
            {"core": optax.scale_by_adam(), "other": optax.adamw(1e-2)},
            {"up": "core", "norm": "other"},
        ),
        *slow(
            optax.clip_by_global_norm(1.0),
            optax.chain(optax.centralize(), optax.scale_by_adam()),
            optax.scale_by_optimistic_gradient(),
            optax.scale_by_adan(),
            optax.scale_by_lion(),
            optax.masked(
                optax.contrib.scale_by_muon(weight_dimension_numbers=last_two_axes),
                {"up": True, "norm": False},
            ),
            natgalore.scale_by_core_fisher(power=1.0, root_every=2),
            natgalore.scale_by_fisher(3, relative=True, power=0.25),
        ),
    ],
)
def test_inner_without_a_learning_rate_is_accepted(inner):
    for residual in ("isotropic", identity_residual):
        jax.eval_shape(project(inner, residual=residual, transport="keep").init, PARAMS)


@pytest.mark.parametrize("residual", [None, "isotropic"])
def test_residual_is_a_static_argument_of_inject_hyperparams(residual):
    static = natgalore.STATIC_ARGS["natural_galore"]
    assert "residual" in static
    make = optax.inject_hyperparams(natgalore.natural_galore, static_args=static)
    tx = make(1e-2, R, residual=residual)
    for init in (tx.init, jax.jit(tx.init)):
        state = init(PARAMS).inner_state[0]
        assert settings_of(state).has_residual == (residual is not None)
