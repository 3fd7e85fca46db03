import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import natgalore_jax as natgalore
from natgalore_jax.fisher.core import CoreFisherState
from natgalore_jax.fisher.window import gram, natural_gradient
from natgalore_jax.tree.leaf_spec import Core, LeafSpec
from tests.oracle import oracles


R, N = 4, 6
HUGE, TINY = 1e25, 1e-25


# One compilation for all tests of one setting.
scale_by_fisher = functools.cache(natgalore.scale_by_fisher)
scale_by_core_fisher = functools.cache(natgalore.scale_by_core_fisher)


def as_core(x):
    """The array x (*batch, r, n) as the engine hands it over."""
    batch = tuple(range(x.ndim - 2))
    path = (jax.tree_util.DictKey("w"),)
    return {"w": Core(x, LeafSpec(path, x.shape, batch, (x.ndim - 2,), (x.ndim - 1,), x.shape[-2]))}


def answers(tx, gradients):
    """The answers to `gradients`, one by one, from a fresh `tx`, and the state at the end."""
    state, update, out = tx.init(as_core(gradients[0])), jax.jit(tx.update), []
    for g in gradients:
        updates, state = update(as_core(g), state)
        out.append(updates["w"].value)
    return out, state


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


class TestWindowForm:
    @pytest.mark.parametrize("damping", [1e-3, 1.0])
    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 7], ids=lambda n: f"{n}steps")
    def test_equals_the_dense_solve(self, steps, damping, key):
        """Below, at and beyond a window of 3."""
        gradients = jax.random.normal(key, (steps, R, N))
        actual, _ = answers(scale_by_fisher(3, damping), gradients)
        expected = oracles.natural_gradient(np.asarray(gradients[-3:], np.float64), damping)
        # The s x s solve loses (|g|² + λ)/λ of float32's 6e-8 at the worst: here below 3e4.
        assert relative_error(actual[-1], expected) < 2e-3 * min(1.0, 0.1 / damping + 1e-2)

    @pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
    @pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
    @pytest.mark.parametrize("steps", [1, 2, 7], ids=lambda n: f"{n}steps")
    def test_equals_the_dense_power(self, steps, power, relative, key):
        """At s = 3, so with one slot filled, two, or all."""
        gradients = 10 * jax.random.normal(key, (steps, R, N))
        tx = scale_by_fisher(3, 0.5, relative=relative, power=power)
        actual, _ = answers(tx, gradients)
        H = np.asarray(gradients[-3:], np.float64).reshape(-1, R * N).T
        damping = 0.5 * (np.square(H).sum(axis=0).mean() if relative else 1.0)
        values, vectors = np.linalg.eigh(H @ H.T + damping * np.eye(R * N))
        expected = vectors @ (values**-power * (vectors.T @ H[:, -1]))
        # Absolute, K's 5e3 over λ = 0.5 are four digits of float32's seven.
        assert relative_error(actual[-1].ravel(), expected) < 2e-3

    def test_units_do_not_matter_where_damping_is_relative(self, key):
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
    def test_a_rounded_window_answers_exactly_for_rounded_cores(self, power, key):
        """Not for rounded columns and an exact g: that g would be none of the columns."""
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

    def test_no_compiler_may_skip_the_rounding(self):
        """XLA drops a plain float32 -> bfloat16 -> float32 on GPUs: K would not be that of H."""
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

    def test_cores_in_parallel_have_an_answer_where_rounding_made_k_indefinite(self, key):
        """K of equal cores has one eigenvalue that is not 0, and its errors here hide λ."""
        window = jnp.stack([jax.random.normal(key, (R, N))] * 3)
        exact = gram(window)
        damping = 1e-5 * float(jnp.trace(exact))
        K = exact.at[0, 1].multiply(1 + 1e-4).at[1, 0].multiply(1 + 1e-4)
        assert np.linalg.eigvalsh(np.asarray(K, np.float64)).min() < -damping
        actual = natural_gradient(jnp.int32(3), window, K, jnp.ones(3), damping)
        expected = oracles.natural_gradient(np.asarray(window, np.float64), damping)
        assert relative_error(actual, expected) < 1e-5  # sums of 24 and 3 in float32

    @pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6, 1e8], ids=lambda x: f"{x:.0e}")
    def test_keeps_its_digits_where_the_printed_formula_does_not(self, ratio, key):
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
    def test_equal_gradients_have_a_finite_answer(self, unit):
        """K is singular, and its entries are out of float32's range."""
        g = unit * jnp.ones((R, N))
        (*_, actual), _ = answers(scale_by_fisher(4, 1e-3), [g] * 6)
        square = float(R * N) * unit**2  # in Python's float64
        # Where λ is the floor of 4 eps tr K, weights of 1/(4 eps) cancel: one digit is left.
        np.testing.assert_allclose(actual, float(unit) / (1e-3 + 4 * square), rtol=0.2)

    @pytest.mark.slow
    @pytest.mark.parametrize("drift", [0.0, 1e-5, 1e-3], ids=lambda x: f"{x:.0e}")
    def test_nearly_parallel_large_cores_stay_finite(self, drift, key):
        """K of 20 such cores is indefinite in float32: rounding exceeds its small eigenvalues."""
        common, noise = jnp.abs(jax.random.normal(key, (64, 4096))), jax.random.split(key, 22)
        gradients = [common * (1 + drift * jax.random.normal(k, common.shape)) for k in noise]
        actual, state = answers(scale_by_fisher(), gradients)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((actual, state)))
        assert jnp.vdot(actual[-1], gradients[-1]) > 0

    def test_a_zero_core_takes_no_slot(self, key):
        a, b, c = jax.random.normal(key, (3, R, N))
        zero = jnp.zeros((R, N))
        tx = scale_by_fisher(2, 0.1)
        with_zero, state = answers(tx, [a, b, zero, zero, c])
        without, _ = answers(tx, [a, b, c])
        assert not with_zero[2].any()
        np.testing.assert_array_equal(with_zero[4], without[2])
        assert state.count["w"].value == 3

    def test_a_stack_is_its_matrices(self, key):
        gradients = jax.random.normal(key, (5, 2, 3, R, N)).at[2, 1, 1].set(0.0)
        tx = scale_by_fisher(3, 0.1)
        together, _ = answers(tx, gradients)
        for i, j in np.ndindex(2, 3):
            alone, _ = answers(tx, gradients[:, i, j])
            np.testing.assert_allclose(together[-1][i, j], alone[-1], rtol=1e-5, atol=1e-6)

    def test_the_gram_matrix_is_that_of_the_window(self, key):
        _, state = answers(scale_by_fisher(3, 0.1), jax.random.normal(key, (5, 2, R, N)))
        np.testing.assert_allclose(
            state.gram["w"].value, gram(state.window["w"].value), rtol=1e-5, atol=1e-5
        )

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**31 - 1), damping=st.floats(1e-2, 1e3))
    def test_never_lengthens_and_never_turns_back(self, seed, damping):
        """λ (λI + F)⁻¹ has its spectrum in (0, 1]."""
        window = jax.random.normal(jax.random.key(seed), (4, R, N))
        args = jnp.int32(4), window, gram(window), jnp.ones(4)
        g, u = window[-1], jax.jit(natural_gradient)(*args, jnp.float32(damping))
        assert damping * jnp.linalg.norm(u) <= jnp.linalg.norm(g) * (1 + 1e-4)
        assert jnp.vdot(u, g) > 0


class TestCoreForm:
    @pytest.mark.parametrize("root_every", [1, 3])
    @pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
    def test_equals_the_oracle(self, power, root_every, key):
        gradients = jax.random.normal(key, (7, R, N))
        tx = scale_by_core_fisher(0.9, 0.1, power=power, root_every=root_every)
        actual, _ = answers(tx, gradients)
        oracle = oracles.CoreFisher(0.9, 0.1, power, root_every)
        for count, (g, u) in enumerate(zip(gradients, actual, strict=True)):
            expected = oracle.precondition(np.asarray(g, np.float64), count)
            # r products of float32, an inverse root to 1e-5 (test below).
            assert relative_error(u, expected) < 5e-5

    def test_units_do_not_matter_at_the_square_root(self, key):
        gradients = jax.random.normal(key, (6, R, N))
        tx = scale_by_core_fisher(root_every=2)
        for a, b in zip(answers(tx, gradients)[0], answers(tx, 1024 * gradients)[0], strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("unit", [TINY, HUGE])
    @pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
    def test_extreme_units_lose_nothing(self, power, unit, key):
        gradients = jax.random.normal(key, (4, R, N))
        tx = scale_by_core_fisher(power=power)
        plain, _ = answers(tx, gradients)
        extreme, state = answers(tx, gradients * unit)
        factor = float(unit) ** (1 - 2 * power)
        # Units that are no power of two round once on the way in, and the root enlarges that.
        np.testing.assert_allclose(extreme[-1] / factor, plain[-1], rtol=1e-4, atol=1e-5)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))

    def test_a_spike_between_roots_does_not_pass(self, key):
        """The Fisher outgrows its root, so a new root meets the spike that made it grow."""
        g = jax.random.normal(key, (R, N))
        usual, _ = answers(scale_by_core_fisher(root_every=100), [g] * 4)
        spiked, _ = answers(scale_by_core_fisher(root_every=100), [g, g, g, HUGE * g])
        bound = jnp.abs(usual[-1]).max() / (1 - 0.98) ** 0.5
        assert jnp.abs(spiked[-1]).max() < 1.1 * bound

    def test_recovers_after_a_spike(self, key):
        """The scale comes down with L: the gradients after it are not lost to underflow."""
        g = jax.random.normal(key, (R, N))
        tx = scale_by_core_fisher(decay=0.1, root_every=1)
        (*_, after), _ = answers(tx, [HUGE * g] + [g] * 55)
        (*_, usual), _ = answers(tx, [g] * 56)
        np.testing.assert_allclose(after, usual, rtol=1e-3)

    def test_the_scale_keeps_the_trace_near_one(self, key):
        units = 10.0 ** jax.random.uniform(key, (12,), minval=-20, maxval=20)
        gradients = units[:, None, None] * jax.random.normal(key, (12, R, N))
        tx = scale_by_core_fisher()
        state, update = tx.init(as_core(gradients[0])), jax.jit(tx.update)
        for g in gradients:
            _, state = update(as_core(g), state)
            assert 1 <= jnp.trace(state.fisher["w"].value) < 4
            assert jnp.frexp(state.scale["w"].value)[0] == 0.5  # a power of two

    def test_a_zero_core_leaves_no_trace(self, key):
        a, b = jax.random.normal(key, (2, R, N))
        zero = jnp.zeros((R, N))
        tx = scale_by_core_fisher(root_every=1)
        with_zero, state = answers(tx, [zero, a, zero, b])
        without, plain = answers(tx, [a, b])
        assert not with_zero[0].any()
        assert not with_zero[2].any()
        np.testing.assert_array_equal(with_zero[3], without[1])
        np.testing.assert_array_equal(state.weight["w"].value, plain.weight["w"].value)

    def test_a_stack_is_its_matrices(self, key):
        gradients = jax.random.normal(key, (4, 2, 3, R, N)).at[2, 1, 1].set(0.0)
        tx = scale_by_core_fisher(root_every=2)
        together, _ = answers(tx, gradients)
        for i, j in np.ndindex(2, 3):
            alone, _ = answers(tx, gradients[:, i, j])
            np.testing.assert_allclose(together[-1][i, j], alone[-1], rtol=1e-4, atol=1e-5)

    def test_state_is_two_small_squares(self):
        state = scale_by_core_fisher().init(as_core(jnp.zeros((5, R, 1000))))
        assert isinstance(state, CoreFisherState)
        assert sum(x.size for x in jax.tree.leaves(state)) == 5 * (2 * R * R + 3) + 1


FORMS = {"window": natgalore.scale_by_fisher, "core": natgalore.scale_by_core_fisher}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
class TestBothForms:
    def test_other_leaves_pass(self, form):
        tree = {**as_core(jnp.ones((R, N))), "b": jnp.ones(3), "none": None}
        tx = form()
        updates, _ = tx.update(tree, tx.init(tree))
        assert updates["b"] is tree["b"]

    def test_leaves_may_differ_in_dtype(self, form):
        with jax.enable_x64(True):
            core = as_core(jnp.ones((R, N), jnp.float32))["w"]
            tree = {"single": core, "double": core.replace(jnp.ones((R, N), jnp.float64))}
            tx = form()
            state = tx.init(tree)
            after = jax.eval_shape(tx.update, tree, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, (tree, state))

    def test_leaves_emptied_by_a_mask_pass(self, form):
        tree = as_core(jnp.ones((R, N)))
        tx = optax.masked(form(), {"w": Core(False, tree["w"].spec)})
        updates, _ = tx.update(tree, tx.init(tree))
        np.testing.assert_array_equal(updates["w"].value, tree["w"].value)

    def test_outside_a_subspace_it_raises(self, form):
        tx, params = optax.chain(form(), optax.scale_by_adam()), {"w": jnp.ones((8, 8))}
        with pytest.raises(ValueError, match=r"works on cores.*natgalore\.chain"):
            jax.jit(tx.update)(params, jax.jit(tx.init)(params))

    @pytest.mark.filterwarnings("ignore:natgalore projects none")
    def test_projection_without_projected_leaves(self, form):
        params = {"scale": jnp.ones(8)}
        tx = natgalore.project(R, form())
        updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params))
        np.testing.assert_array_equal(updates["scale"], params["scale"])

    def test_a_tree_without_leaves_is_nothing_to_raise_about(self, form):
        form().init({})


REFUSED = [
    (natgalore.scale_by_fisher, {"window": 0}, ValueError),
    (natgalore.scale_by_fisher, {"window": 2.5}, TypeError),
    (natgalore.scale_by_fisher, {"damping": 0.0}, ValueError),
    (natgalore.scale_by_fisher, {"damping": float("nan")}, ValueError),
    (natgalore.scale_by_fisher, {"power": 2.0}, ValueError),
    (natgalore.scale_by_fisher, {"relative": "yes"}, ValueError),
    (natgalore.scale_by_fisher, {"window_dtype": int}, ValueError),
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
def test_refuses(make, bad, error):
    ((name, value),) = bad.items()
    # Called unchecked: users have no run-time type checker, and our message is what they read.
    with pytest.raises(error, match=rf"`{name}`.*{value}"):
        getattr(make, "__wrapped__", make)(**bad)
