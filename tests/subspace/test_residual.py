"""What the projection left out; whole trajectories against the oracle are in test_trajectory.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.subspace.lift import expanded
from natgalore_jax.subspace.residual import DAMPING, GROWTH, ResidualState, added, fira, limited
from natgalore_jax.tree.leaf_spec import cores
from natgalore_jax.util.linalg import matmul
from tests.helpers.cases import quick, slow
from tests.helpers.partners import INSIDE
from tests.oracle import oracles


M, N, R = 12, 20, 4
SHAPES = {"layers": {"up": {"kernel": (3, M, N)}}, "out": {"kernel": (N, M)}, "norm": (M,)}
project = functools.partial(natgalore.project, R, residual="fira", refresh_every=3)


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


class TestLeafMathematics:
    """Of a stack, in float64: what is off is a fault."""

    @pytest.fixture(autouse=True)
    def float64(self):
        with jax.enable_x64(True):
            yield

    def case(self, side):
        rng = np.random.default_rng(7)
        G, P, Q = (rng.standard_normal((3, *s)) for s in ((M, N), (M, R), (N, R)))
        P, Q = np.linalg.qr(P)[0], np.linalg.qr(Q)[0]
        G[1, :, 2] = G[1, :, 2] - P[1] @ P[1].T @ G[1, :, 2]
        core = P.mT @ G
        core[1, :, 2] = 0.0  # and not rounding
        if side == "both":
            core = core @ Q
        U = rng.standard_normal(core.shape)
        lift = lambda X: P @ X @ Q.mT if side == "both" else P @ X
        return G, core, U, [P, Q] if side == "both" else [P], lift

    @pytest.mark.parametrize("side", ["short", "both"])
    def test_isotropic_equals_the_oracle(self, side):
        G, core, U, bases, lift = self.case(side)
        G[0, :, 4] = 0.0
        core = bases[0].mT @ G if side == "short" else bases[0].mT @ G @ bases[1]
        S = np.stack([oracles.isotropic(*x) for x in zip(G - lift(core), core, U, strict=True)])
        u, s, norm = added(
            "isotropic",
            *map(jnp.asarray, (G, core, U, np.full(3, True))),
            None,
            *map(jnp.asarray, bases),
        )
        np.testing.assert_allclose(lift(u) + s, lift(U) + S, atol=1e-12)
        assert norm is None

    @pytest.mark.parametrize("shape", [(M, N), (N, M), (40, N), (R, N)])
    @pytest.mark.parametrize("side", ["short", "both"])
    def test_whitened_equals_the_oracle(self, shape, side):
        """Of wide and tall views, with more directions left than columns, and with none left."""
        rng = np.random.default_rng(7)
        G = rng.standard_normal((2, *shape)) * np.array([[[1e-3]], [[1e3]]])
        bases = [np.linalg.qr(rng.standard_normal((2, s, R)))[0] for s in shape]
        bases = bases if side == "both" else bases[:1]
        core = bases[0].mT @ G @ (bases[1] if side == "both" else np.eye(shape[1]))
        U = rng.standard_normal(core.shape)
        lifted = bases[0] @ core @ (bases[1].mT if side == "both" else np.eye(shape[1]))
        S = np.stack([oracles.whitened(*x) for x in zip(G - lifted, core, U, strict=True)])
        case = map(jnp.asarray, (G, core, U, np.full(2, True)))
        u, s, norm = added("whitened", *case, None, *map(jnp.asarray, bases))
        assert norm is None
        np.testing.assert_array_equal(u, U)
        np.testing.assert_allclose(s, S, atol=1e-10)
        # Each number has mean square 1, to what Muon's quintic leaves of singular values.
        left = np.prod(shape) - core[0].size
        squares = np.square(s).sum(axis=(1, 2)) / max(left, 1)
        assert np.all((squares > 0.5) & (squares < 1.3)) if left else not s.any()

    @pytest.mark.parametrize("side", ["short", "both"])
    def test_equals_the_oracle(self, side):
        G, core, U, bases, lift = self.case(side)
        S = np.stack([oracles.fira(*x) for x in zip(G - lift(core), core, U, strict=True)])
        # Its norm is a difference of squares of the same size: two digits of 16.
        _, size = fira(*map(jnp.asarray, (G, core, U)), two_sided=side == "both")
        np.testing.assert_allclose(size, np.linalg.norm(S, axis=(1, 2)), rtol=1e-12)
        before = np.array([0.0, 1e-3, 1e3])  # none, one that binds, one that does not
        expected = [oracles.limited(s, x or None) for s, x in zip(S, before, strict=True)]
        u, s, norm = added(
            "fira", *map(jnp.asarray, (G, core, U, np.full(3, True), before, *bases))
        )
        np.testing.assert_allclose(lift(u) + s, lift(U) + np.stack(expected), atol=1e-12)
        np.testing.assert_allclose(norm, np.linalg.norm(expected, axis=(1, 2)), rtol=1e-12)

    def test_a_column_that_the_core_has_nothing_of_adds_nothing(self):
        """Nor one of which it has rounding alone, which would be scaled up to Adam's size."""
        G, core, U, _, _ = self.case("short")
        core[2, :, 3] = 1e-16 * np.linalg.norm(G[2, :, 3])
        phi, _ = fira(*map(jnp.asarray, (G, core, U)), two_sided=False)
        assert np.argwhere(np.asarray(phi) == 0).tolist() == [[1, 0, 2], [2, 0, 3]]

    def test_the_limit_is_on_growth_from_step_to_step(self):
        size, before = jnp.array([3.0, 3.0, 1.005, 0.0, jnp.inf]), jnp.array([0.0, 1, 1, 1, 1])
        limit, norm = limited(size, before)
        np.testing.assert_allclose(norm, [3.0, GROWTH, 1.005, 1.0, 1.0])
        np.testing.assert_allclose(limit[:4], [1.0, GROWTH / 3, 1.0, 1.0])


class TestIsotropic:
    project = staticmethod(
        functools.partial(natgalore.project, R, residual="isotropic", refresh_every=3)
    )

    def left(self, updates, state, name=("out", "kernel")):
        """The part of an update that is orthogonal to the basis, projected side first."""
        P, W = (functools.reduce(lambda x, key: x[key], name, x) for x in (state.basis, updates))
        (basis,) = expanded(jnp.float32, P, None)
        W = P.spec.to_view(W)
        return W - matmul(basis, matmul(basis.mT, W))

    def test_residual_has_unit_rms(self):
        """In each column, whatever the gradient's is: m - r numbers, of mean square 1."""
        sizes = 10.0 ** jnp.arange(-10, 10)[:, None]
        # A random basis leaves some of every column.
        tx = self.project(optax.scale_by_adam(), basis="random")
        for unit in (1e-15, 1.0, 1e15):
            g = tree(1)
            g["out"]["kernel"] = g["out"]["kernel"] * sizes * unit  # (20, 12), n first
            *_, (updates, state) = run(tx, [g])
            squares = jnp.square(self.left(updates, state)).mean(axis=0) * M / (M - R)
            np.testing.assert_allclose(squares, 1.0, atol=10 * DAMPING)  # a tenth or more is left

    def test_residual_is_parallel_to_the_remaining_columns(self):
        tx, g = self.project(optax.identity()), tree(1)
        *_, (updates, state) = run(tx, [g])
        P = state.basis["out"]["kernel"]
        (basis,) = expanded(jnp.float32, P, None)
        G = P.spec.to_view(g["out"]["kernel"])
        expected = G - matmul(basis, matmul(basis.mT, G))
        got = self.left(updates, state)
        cosine = (got * expected).sum(0) / (
            jnp.linalg.norm(got, axis=0) * jnp.linalg.norm(expected, axis=0)
        )
        np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)

    def test_rounding_noise_is_not_scaled_up(self):
        """Of a gradient whose columns all lie in the subspace nothing is left but rounding."""
        rng = np.random.default_rng(3)
        low = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 96))
        params = {"up": {"kernel": jnp.zeros((64, 96))}}
        g = {"up": {"kernel": jnp.asarray(low, jnp.float32)}}
        *_, (updates, state) = run(self.project(optax.scale_by_adam()), [g] * 4, params)
        left = self.left(updates, state, ("up", "kernel"))
        # √(m / ρ) times rounding of 1e-6 of a column; undamped it would be 1.
        assert float(jnp.abs(left).max()) < 250 * 1e-5

    def test_zero_column_stays_zero(self):
        g = tree(1)
        g["out"]["kernel"] = g["out"]["kernel"].at[3].set(0.0)
        tx = self.project(optax.scale_by_adam())
        *_, (updates, _) = run(tx, [g, g])
        assert not updates["out"]["kernel"][3].any()
        assert updates["out"]["kernel"][2].all()
        *_, (updates, _) = run(tx, [jax.tree.map(jnp.zeros_like, g)] * 2)
        assert not any(x.any() for x in jax.tree.leaves(updates))

    @pytest.mark.slow
    def test_residual_has_no_state(self):
        """The state is that without a residual, or what is left of one with a limit."""
        make = lambda residual: natgalore.natural_galore(1e-2, R, residual=residual)
        g = [tree(1), tree(2)]
        kinds = (None, "isotropic", "whitened", "fira")
        (none, isotropic, whitened, fira) = (last(make(x), g)[1] for x in kinds)
        for state in (isotropic, whitened):
            assert jax.tree.structure(state) == jax.tree.structure(none)
            assert_close(state, none, rtol=1e-6, atol=1e-30)
        update = jax.jit(make("isotropic").update)
        for state in (none, fira):
            updates, after = update(g[0], state, g[0])
            assert jax.tree.structure(after) == jax.tree.structure(isotropic)
            assert_close(updates, update(g[0], isotropic, g[0])[0], rtol=1e-5, atol=1e-8)

    def test_inner_with_a_learning_rate_is_refused(self):
        with pytest.raises(ValueError, match="learning rate"):
            self.project(optax.adamw(1e-3)).init(tree(0))


class TestWhitened:
    project = staticmethod(
        functools.partial(natgalore.project, R, residual="whitened", refresh_every=3)
    )

    def test_rounding_noise_is_not_scaled_up(self):
        """Of a gradient that lies in the subspace, and at full rank, nothing is left but that."""
        rng = np.random.default_rng(3)
        low = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 96))
        params = {"up": {"kernel": jnp.zeros((64, 96))}}
        g = {"up": {"kernel": jnp.asarray(low, jnp.float32)}}
        *_, (updates, state) = run(self.project(optax.scale_by_adam()), [g] * 4, params)
        left = TestIsotropic.left(self, updates, state, ("up", "kernel"))
        # 485 / √ρ times rounding of 1e-6 of the whole; undamped its entries would be 1.
        assert float(jnp.abs(left).max()) < 485 / DAMPING**0.5 * 1e-6

    @pytest.mark.parametrize("unit", [0.0, *slow(1e-25, 1e25)])
    def test_gradients_of_any_size(self, unit):
        tx = self.project(optax.scale_by_sign())  # whose answers have no size either
        g = jax.tree.map(lambda x: unit * x, tree(1))
        *_, (updates, _) = run(tx, [g, g])
        *_, (expected, _) = run(tx, [tree(1) if unit else g] * 2)
        for name in ("layers", "out"):
            # Signs of a core that is nearly 0 would differ: of these numbers none is.
            assert_close(updates[name], expected[name], rtol=1e-3, atol=1e-3)
        assert any(x.any() for x in jax.tree.leaves(updates)) == bool(unit)


@pytest.mark.parametrize("residual", ["isotropic", *slow("whitened")])
@pytest.mark.parametrize("bad", [jnp.nan, *slow(jnp.inf)])
def test_nonfinite_gradient_adds_no_residual(residual, bad):
    gradients = [tree(i) for i in range(3)]
    kernel = gradients[2]["layers"]["up"]["kernel"]
    gradients[2]["layers"]["up"]["kernel"] = kernel.at[1, 2, 3].set(bad)
    updates, state = last(
        project(optax.scale_by_adam(), residual=residual, stagger=False), gradients
    )
    moved = updates["layers"]["up"]["kernel"]
    assert [bool(x.any()) for x in moved] == [True, False, True]
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.slow
def test_without_a_limit_an_inner_that_does_nothing_returns_the_gradient():
    """φ = 1: what is kept and what is left out are all there is."""
    for residual in ("fira", lambda left, R, U: left):
        for side in ("short", "both"):
            tx = project(optax.identity(), residual=residual, side=side)
            # Smaller ones from step to step, so that the limit is loose at refreshes too.
            gradients = [jax.tree.map(lambda x, i=i: 0.1**i * x, tree(i)) for i in range(5)]
            for (updates, _), g in zip(run(tx, gradients), gradients, strict=True):
                size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(g))
                assert_close(updates, g, rtol=0, atol=1e-5 * size)  # 20 products in float32


@pytest.mark.slow
def test_residual_is_zero_at_full_rank():
    make = lambda residual: natgalore.natural_galore(1e-2, M, refresh_every=2, residual=residual)
    with jax.enable_x64(True):
        gradients = optax.tree.cast([tree(i) for i in range(4)], jnp.float64)
        # Rounding of updates of 1e-2. The norm is larger, √eps, but it is the norm alone.
        *added, none = (
            last(make(x), gradients, gradients[0])[0]
            for x in ("fira", "isotropic", "whitened", None)
        )
        for updates in added:
            assert_close(updates, none, rtol=0, atol=1e-15)


def test_a_gradient_that_jumps_moves_what_is_left_out_by_one_percent():
    tx = project(optax.identity())
    *_, (_, before), (updates, after) = run(tx, [tree(1), jax.tree.map(lambda x: 100 * x, tree(1))])
    old, new = (np.concatenate([np.ravel(x.value) for x in cores(s.norm)]) for s in (before, after))
    np.testing.assert_allclose(new, GROWTH * old, rtol=1e-6)
    # It is in the update, not in the state alone: the part orthogonal to P has that norm.
    P = after.subspace.basis["out"]["kernel"]
    (basis,) = expanded(jnp.float32, P, None)
    W = P.spec.to_view(updates["out"]["kernel"])
    left = W - matmul(basis, matmul(basis.mT, W))
    np.testing.assert_allclose(jnp.linalg.norm(left), after.norm["out"]["kernel"].value, rtol=1e-4)


def test_columns_are_scaled_each_by_itself():
    """As inner has scaled it: here one that makes every column of a core as long as any other."""
    unit = optax.stateless(
        lambda g, _: jax.tree.map(lambda x: x / jnp.linalg.norm(x, axis=-2, keepdims=True), g)
    )
    params = {"up": {"kernel": tree(0)["layers"]["up"]["kernel"]}}
    sizes = 10.0 ** jnp.arange(-10, 10)[None, None]
    g = {"up": {"kernel": tree(1)["layers"]["up"]["kernel"] * sizes}}
    ((updates, state),) = run(project(unit), [g], params)
    (P,) = expanded(jnp.float32, state.subspace.basis["up"]["kernel"], None)
    G, W = np.asarray(g["up"]["kernel"]), np.asarray(updates["up"]["kernel"])
    expected = G / np.linalg.norm(P.mT @ G, axis=-2, keepdims=True)
    # The longest of a column is where the core has a tenth of it: ten times float32's rounding.
    np.testing.assert_allclose(W, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", ["fira", lambda left, R, U: 1.0 / left], ids=["fira", "own"])
@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf, 0.0])
def test_a_bad_gradient_adds_nothing_and_leaves_the_norm(residual, bad):
    """Of its matrix; also where a function would divide by zero."""
    tx = project(optax.scale_by_adam(), residual=residual, stagger=False)
    gradients = [tree(i) for i in range(5)]
    kernel = gradients[3]["layers"]["up"]["kernel"]  # at a refresh
    spoiled = jnp.zeros_like(kernel[1]) if bad == 0 else kernel[1].at[2, 3].set(bad)
    gradients[3]["layers"]["up"]["kernel"] = kernel.at[1].set(spoiled)
    steps = list(run(tx, gradients))
    before, after = (s.norm["layers"]["up"]["kernel"].value for _, s in steps[2:4])
    moved = steps[3][0]["layers"]["up"]["kernel"]
    assert [bool(x) for x in before != after][::2] == [True, True]
    if residual == "fira" or bad != 0:
        assert before[1] == after[1]
    if bad != 0:
        assert not moved[1].any()
    if residual == "fira":
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves([steps[3:]]))


@pytest.mark.parametrize("unit", [pytest.param(1e-25, marks=pytest.mark.slow), 1e25])
def test_gradients_of_any_size_are_scaled(unit):
    """Squares of which are no float32."""
    for side in ("short", "both"):
        tx = project(optax.identity(), side=side)
        for (updates, _), g in zip(
            run(tx, [jax.tree.map(lambda x: unit * x, tree(1))] * 2), [tree(1)] * 2, strict=True
        ):
            assert_close(jax.tree.map(lambda x: x / unit, updates), g, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_bfloat16_update_is_the_rounded_float32_update():
    tx = project(optax.scale_by_adam())
    g = tree(1, jnp.bfloat16)
    low, state = last(tx, [g])
    exact, _ = last(tx, [optax.tree.cast(g, jnp.float32)])
    ((updates, state),) = run(tx, [g], g)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.value.dtype for x in cores(state.norm)} == {jnp.dtype(jnp.float32)}
    assert_close(low, exact, rtol=1e-5, atol=1e-5)  # params are float32: no rounding there
    wide = optax.tree.cast(updates, jnp.float32)
    # Rounded twice, P U' and the sum, of which each is a few units: 2⁻⁸ of 4.
    assert_close(wide, exact, rtol=2**-7, atol=2**-6)


@pytest.mark.slow
def test_scale_multiplies_both_parts_and_not_the_norm():
    gradients = [tree(1), tree(2)]
    one, two = (last(project(optax.scale_by_adam(), scale=scale), gradients) for scale in (1, 2))
    assert_close(two[1].norm, one[1].norm, rtol=1e-6)
    for name in ("layers", "out"):
        doubled = jax.tree.map(lambda x: 2 * x, one[0][name])
        assert_close(two[0][name], doubled, rtol=1e-6, atol=1e-6)


class TestFunction:
    @pytest.mark.slow
    def test_function_gets_remaining_gradient_core_and_update(self):
        seen = []

        def own(left, core, U):
            seen.append((left.shape, core.shape, U.shape))
            return jnp.zeros_like(left)

        for side, k in (("short", N), ("both", R)):
            tx = project(optax.scale_by_adam(), residual=own, side=side)
            plain = project(optax.scale_by_adam(), residual=None, side=side)
            assert_close(last(tx, [tree(1)])[0], last(plain, [tree(1)])[0], rtol=1e-6)
            assert set(seen) <= {((M, N), (R, k), (R, k)), ((N, M), (R, k), (R, k))}
            seen.clear()

    def test_function_with_another_shape_is_refused(self):
        tx = project(optax.identity(), residual=lambda left, R, U: R)
        with pytest.raises(ValueError, match=r"`residual` must return .*\(12, 20\), got \(4, 20\)"):
            tx.update(tree(1), tx.init(tree(0)))


class TestState:
    def test_is_one_number_a_matrix_around_the_state_that_is_without(self):
        tx, plain = (
            natgalore.natural_galore(1e-2, R, residual=residual) for residual in ("fira", None)
        )
        state, without = tx.init(tree(0))[0], plain.init(tree(0))[0]
        assert isinstance(state, ResidualState)
        assert jax.tree.structure(state.subspace) == jax.tree.structure(without)
        assert [x.value.shape for x in cores(state.norm)] == [(3,), ()]
        report = natgalore.memory_report(tree(0), {"none": plain, "fira": tx})
        assert report.total["fira"] == report.total["none"] + 4 * 4
        assert report.projected["fira"] == report.projected["none"] + 4 * 4
        assert "3 x (12 x 20)" in str(natgalore.describe(tx, tree(0)))

    @pytest.mark.slow
    def test_is_found_by_diagnostics(self):
        tx = natgalore.natural_galore(1e-2, R, residual="fira")
        _, state = last(tx, [tree(1)])
        assert set(natgalore.skipped_steps(state)) == {"layers/up/kernel", "out/kernel", "norm"}
        assert set(natgalore.explained_energy(state, tree(1))) == {"layers/up/kernel", "out/kernel"}


class TestProgram:
    @pytest.mark.slow
    def test_program_has_no_extra_product(self):
        """And no array of m x n: of a bfloat16 weight the lift rounds, which is one beside."""
        params = {"up": {"kernel": jnp.zeros((64, 256))}}

        def program(residual):
            tx = natgalore.project(8, optax.scale_by_adam(), residual=residual)
            lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, tx.init(params))
            return lowered.as_text().count("dot_general")

        assert program("fira") == program(None) > 0
        assert program(lambda left, R, U: left) == program(None) + 1


# --- Inners with a learning rate in them --------------------------------------------------------

PARAMS = {"up": {"kernel": jnp.ones((M, N))}, "norm": {"scale": jnp.ones(M)}}
EACH_KIND = (
    *("adamw", "adafactor", "lion", "noisy_sgd", "polyak_sgd", "rprop", "sgd", "contrib.muon"),
    *("inject_hyperparams", "MultiSteps", "partition", "apply_if_finite", "apply_every"),
)
RATES = {k: v for k, v in INSIDE.items() if k != "set_to_zero"}


def turned(inner):
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    return optax.chain(inner, optax.scale(-1.0))


@pytest.mark.parametrize("name", quick(EACH_KIND, [*RATES]))
def test_partner_with_a_learning_rate_is_refused(name):
    """And taken where another minus undoes it, unless it may pass gradients as they are."""
    params = {**PARAMS, "layers": {"kernel": jnp.ones((2, M, N))}}
    make = INSIDE[name].make
    init = lambda inner: jax.eval_shape(project(inner, transport="keep").init, params)
    with pytest.raises(
        ValueError, match=r"before the learning rate, but at `\w*/kernel` .*project_"
    ):
        init(make())
    if name != "conditionally_transform":
        init(turned(make()))


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100)
RATED = {
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


@pytest.mark.parametrize("rate", RATED.values(), ids=RATED)
@pytest.mark.parametrize("init", [lambda tx: tx.init, lambda tx: jax.jit(tx.init)])
def test_every_spelling_of_a_learning_rate_is_refused(rate, init):
    tx = natgalore.chain(project(transport="keep"), optax.scale_by_adam(), rate)
    with pytest.raises(ValueError, match="before the learning rate"):
        init(tx)(PARAMS)


def test_learning_rate_beside_own_extra_arguments_is_refused():
    """At the first update, which can be read; given no params too."""
    update = lambda g, s, params=None, *, mine: (jax.tree.map(lambda x: -mine * x, g), s)
    tx = project(optax.GradientTransformationExtraArgs(lambda params: (), update))
    state = tx.init(PARAMS)
    for params in (None, PARAMS):
        with pytest.raises(ValueError, match="before the learning rate"):
            tx.update(PARAMS, state, params, mine=2.0)


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
        optax.chain(optax.centralize(), optax.scale_by_adam()),
        optax.scale_by_optimistic_gradient(),
        optax.scale_by_adan(),
        optax.scale_by_lion(),
        optax.contrib.scale_by_muon(),
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_schedule(SCHEDULE)),
        natgalore.scale_by_core_fisher(power=1.0, root_every=2),
        natgalore.scale_by_fisher(3, relative=True, power=0.25),
        # The rate of other leaves is their own affair.
        optax.partition(
            {"core": optax.scale_by_adam(), "other": optax.adamw(1e-2)},
            {"up": "core", "norm": "other"},
        ),
    ],
)
def test_inner_that_keeps_the_sign_is_accepted(inner):
    jax.eval_shape(project(inner, transport="keep").init, PARAMS)


def test_hyperparameters_of_the_whole_optimizer_may_change():
    static = natgalore.STATIC_ARGS["natural_galore"]
    assert "residual" in static
    make = optax.inject_hyperparams(natgalore.natural_galore, static_args=static)
    for init in (make(1e-2, R, residual="fira").init, jax.jit(make(1e-2, R, residual="fira").init)):
        assert isinstance(init(PARAMS).inner_state[0], ResidualState)
