"""The oracle against identities that it was not written from: who checks the checker."""

import itertools

import jax
import numpy as np
import optax
import pytest

from . import oracles


def always(index, count, refresh_every, total):
    return True


@pytest.fixture
def rng():
    return np.random.default_rng(2410_16029)


def test_window_fisher_is_push_through_and_woodbury(rng):
    """(λI + HHᵀ)⁻¹ h_s = H (λI + HᵀH)⁻¹ e_s = (h_s − H (λI + HᵀH)⁻¹ Hᵀ h_s) / λ."""
    window, damping = 4, 0.3
    cores = rng.standard_normal((window, 3, 5))
    columns = cores.reshape(window, -1).T
    kernel = damping * np.eye(window) + columns.T @ columns
    push_through = columns @ np.linalg.inv(kernel)[:, -1]
    newest = columns[:, -1]
    woodbury = (newest - columns @ np.linalg.inv(kernel) @ (columns.T @ newest)) / damping
    actual = oracles.natural_gradient(list(cores), damping).ravel()
    np.testing.assert_allclose(actual, push_through, rtol=1e-10)  # cond(K) ~ 1e2 of 1e-16
    np.testing.assert_allclose(actual, woodbury, rtol=1e-10, atol=1e-12)


def test_window_keeps_the_last_accepted_cores(rng):
    a, b, c, d = rng.standard_normal((4, 2, 3))
    fisher = oracles.WindowFisher(window=2, damping=0.1)
    for core in (a, b, c, np.zeros_like(a)):
        out = fisher.precondition(core, 0)
    assert not out.any()
    actual = fisher.precondition(d, 0)
    np.testing.assert_array_equal(actual, oracles.natural_gradient([c, d], 0.1))


@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_inverse_root_undoes_the_damped_fisher(power, rng):
    core = rng.standard_normal((4, 9))
    fisher = core @ core.T
    root = oracles.inverse_root(fisher, 0.1, power)
    damped = fisher + 0.1 * np.trace(fisher) / 4 * np.eye(4)
    product = damped @ np.linalg.matrix_power(root, round(1 / power))
    np.testing.assert_allclose(product, np.eye(4), atol=1e-12)


def test_core_fisher_of_a_constant_core_is_its_own_mean(rng):
    """The weight takes the bias of L's zero start out, at every step."""
    core = rng.standard_normal((3, 7))
    fisher = oracles.CoreFisher(root_every=1)
    for count in range(4):
        actual = fisher.precondition(core, count)
        expected = oracles.inverse_root(core @ core.T, 0.1, 0.5) @ core
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_core_fisher_renews_an_outgrown_root_early(rng):
    core = rng.standard_normal((3, 7))
    fisher = oracles.CoreFisher(root_every=100)
    for count, size in enumerate([1.0, 1.0, 100.0, 1e4]):
        before = fisher.root
        fisher.precondition(size * core, count)
        renewed = before is None or not np.array_equal(before, fisher.root)
        # √tr L grows √2-, 70- and 100-fold: beyond 16-fold the root is another one.
        assert renewed == (count != 1)


@pytest.mark.parametrize("basis", ["power", "svd"])
def test_basis_spans_the_leading_directions(basis, rng):
    left, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    right, _ = np.linalg.qr(rng.standard_normal((9, 6)))
    g = left * [5, 4, 3, 0.03, 0.02, 0.01] @ right.T
    start, _ = np.linalg.qr(rng.standard_normal((6, 3)))
    p = oracles.BASES[basis](g, start, turns=8)
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-14)
    # The power iteration closes in by (0.03/3)² a turn until its pull to the old P, 1e-6, holds.
    np.testing.assert_allclose(p @ p.T, left[:, :3] @ left[:, :3].T, atol=1e-5)


def test_orthonormal_has_a_positive_diagonal(rng):
    y = rng.standard_normal((6, 3))
    q = oracles.orthonormal(y)
    upper = q.T @ y
    np.testing.assert_allclose(upper, np.triu(upper), atol=1e-14)
    assert (np.diag(upper) > 0).all()


def test_square_of_a_direction_never_seen_is_the_mean(rng):
    v = rng.random((3, 5))
    unseen = oracles.rotated_square(np.zeros((3, 3)), v)
    np.testing.assert_allclose(unseen, np.broadcast_to(v.mean(axis=0), v.shape))
    turned = oracles.rotated_square(np.array([[0, -1.0, 0], [0, 0, 1.0], [1.0, 0, 0]]), v)
    np.testing.assert_array_equal(turned, v[[1, 2, 0]])


def signed_permutations(rank):
    """The bases that span the same space: the same columns, in another order, of other signs."""
    rng = np.random.default_rng(7)
    while True:
        yield np.eye(rank)[rng.permutation(rank)] * rng.choice([-1.0, 1.0], rank)


@pytest.mark.parametrize("form", [None, oracles.WindowFisher, oracles.CoreFisher])
def test_rotation_forgets_the_names_of_the_directions(form, rng):
    """Columns of P in another order and of other signs, at every refresh: the same trajectory."""
    gradients = rng.standard_normal((7, 6, 9))
    others = signed_permutations(3)

    def renamed(g, p, turns):
        return oracles.svd_basis(g, p, turns) @ next(others)

    def trajectory(basis, transport):
        start = np.eye(6, 3)
        optimizer = oracles.NaturalGaLore(
            [np.zeros((6, 9))],
            [],
            [start],
            learning_rate=0.1,
            due=lambda index, count, refresh_every, total: count % refresh_every == 0,
            refresh_every=2,
            fisher=form,
            basis=basis,
            transport=transport,
        )
        for g in gradients:
            optimizer.step([g], [])
        return optimizer.matrices[0].weight

    expected = trajectory("svd", "rotate")
    np.testing.assert_allclose(trajectory(renamed, "rotate"), expected, atol=1e-9)
    # Without it the names matter, by as much as the displacement itself.
    assert np.abs(trajectory(renamed, "keep") - trajectory("svd", "keep")).max() > 1e-2


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_is_adamw_where_nothing_is_projected(shape, rng):
    """With P = I, all of one rank and no Fisher, what is left is optax.adamw."""
    weight, bias = rng.standard_normal(shape), rng.standard_normal(3)
    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
    optimizer = oracles.NaturalGaLore(
        [weight],
        [bias],
        [np.eye(min(shape))],
        learning_rate=0.1,
        due=always,
        basis=lambda g, p, turns: p,
        **settings,
    )
    gradients = [(rng.standard_normal(shape), rng.standard_normal(3)) for _ in range(5)]
    with jax.enable_x64(True):
        tx = optax.adamw(0.1, **settings)
        params = (jax.numpy.asarray(weight), jax.numpy.asarray(bias))
        state = tx.init(params)
        for g in gradients:
            optimizer.step([g[0]], [g[1]])
            updates, state = tx.update(jax.tree.map(jax.numpy.asarray, g), state, params)
            params = optax.apply_updates(params, updates)
        actual = optimizer.matrices[0].weight, optimizer.others[0].weight
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), actual, params)


def test_a_bad_gradient_leaves_no_trace_but_in_the_moments(rng):
    """It takes no slot in the window, no weight in L, moves no basis and moves no weight."""
    gradients = rng.standard_normal((3, 4, 6))
    for form, bad in itertools.product(
        (oracles.WindowFisher, oracles.CoreFisher), (np.nan, np.inf)
    ):
        optimizer = oracles.NaturalGaLore(
            [np.zeros((4, 6))], [], [np.eye(4, 2)], learning_rate=0.1, due=always, fisher=form
        )
        for g in gradients:
            optimizer.step([g], [])
        matrix = optimizer.matrices[0]
        before = matrix.weight.copy(), matrix.basis.copy(), matrix.adam.m.copy()
        gradients[0, 1, 2] = bad
        fisher = dict(vars(matrix.fisher))
        optimizer.step([gradients[0]], [])
        np.testing.assert_array_equal(matrix.weight, before[0])
        np.testing.assert_array_equal(matrix.basis, before[1])
        np.testing.assert_array_equal(matrix.adam.m, 0.9 * before[2])
        assert all(vars(matrix.fisher)[name] is value for name, value in fisher.items())
        assert matrix.skipped == 1
        gradients[0, 1, 2] = 0.0
