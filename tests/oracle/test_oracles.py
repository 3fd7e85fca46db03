"""The oracle against identities that it was not written from: who checks the checker."""

import itertools

import jax
import ml_dtypes
import numpy as np
import optax
import pytest

from tests.oracle import oracles


def always(index, count, refresh_every, total):
    return True


@pytest.fixture
def rng():
    return np.random.default_rng(2410_16029)


def test_window_fisher_equals_push_through_and_woodbury(rng):
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


@pytest.mark.parametrize("power", [0.5, 0.25])
def test_powers_of_the_window_compose_to_the_inverse(power, rng):
    """A⁻ᵖ applied 1/p times is A⁻¹: with one core in the window g is A's eigenvector."""
    cores = list(rng.standard_normal((4, 3, 5)))
    damping = 0.3
    energy = np.vdot(cores[0], cores[0])
    alone = oracles.natural_gradient(cores[:1], damping, power)
    # One column of rounding through the SVD: measured up to 1.3e-12 on a small entry.
    np.testing.assert_allclose(alone, cores[0] / (damping + energy) ** power, rtol=1e-11)
    # Of many cores: the root that made u, applied on until 1/p times, is what p = 1 solves for.
    columns = np.reshape(cores, (4, -1))
    values, vectors = np.linalg.eigh(columns.T @ columns)
    root = (vectors * (values + damping) ** -power) @ vectors.T
    rest = np.linalg.matrix_power(root, round(1 / power) - 1)
    u = oracles.natural_gradient(cores, damping, power)
    expected = oracles.natural_gradient(cores, damping).ravel()
    np.testing.assert_allclose(rest @ u.ravel(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_relative_damping_is_independent_of_units(power, rng):
    """Gradients t times as large: u is t^(1-2p) times as large, and λ that of the mean energy."""
    cores = list(rng.standard_normal((4, 3, 5)))
    one = oracles.natural_gradient(cores, 0.1, power, relative=True)
    scaled = oracles.natural_gradient([8 * core for core in cores], 0.1, power, relative=True)
    np.testing.assert_allclose(scaled, 8 ** (1 - 2 * power) * one, rtol=1e-10)
    energy = np.mean([np.linalg.norm(core) ** 2 for core in cores])
    absolute = oracles.natural_gradient(cores, 0.1 * energy, power)
    np.testing.assert_allclose(one, absolute, rtol=1e-10)


def test_rounded_window_equals_the_window_of_rounded_cores(rng):
    """Eight bits of each entry, the newest too; and again after a rotation."""

    def rounded(x):  # a float32 whose lower half is zero
        bits = np.float32(x).view(np.uint32)
        even = 0x7FFF + ((bits >> 16) & 1)
        return np.float64(((bits + even) & np.uint32(0xFFFF0000)).view(np.float32))

    a, b, c = 1e-3 * rng.standard_normal((3, 2, 3))
    turn = rng.standard_normal((2, 2))
    fisher = oracles.WindowFisher(window=2, damping=1e-6, dtype=ml_dtypes.bfloat16)
    fisher.precondition(a, 0)
    fisher.precondition(b, 0)
    assert np.abs(fisher.cores[1] - b).max() <= 2.0**-8 * np.abs(b).max()
    fisher.rotate(turn)
    cores = [rounded(turn @ rounded(b)), rounded(c)]
    actual = fisher.precondition(c, 0)
    np.testing.assert_array_equal(actual, oracles.natural_gradient(cores, 1e-6))


@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_inverse_root_inverts_the_damped_fisher(power, rng):
    core = rng.standard_normal((4, 9))
    fisher = core @ core.T
    root = oracles.inverse_root(fisher, 0.1, power)
    damped = fisher + 0.1 * np.trace(fisher) / 4 * np.eye(4)
    product = damped @ np.linalg.matrix_power(root, round(1 / power))
    np.testing.assert_allclose(product, np.eye(4), atol=1e-12)


def test_core_fisher_of_a_constant_core(rng):
    """The weight takes the bias of L's zero start out, at every step."""
    core = rng.standard_normal((3, 7))
    fisher = oracles.CoreFisher(root_every=1)
    for count in range(4):
        actual = fisher.precondition(core, count)
        expected = oracles.inverse_root(core @ core.T, 0.1, 0.5) @ core
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_core_fisher_renews_its_root_when_gradients_grow(rng):
    core = rng.standard_normal((3, 7))
    fisher = oracles.CoreFisher(root_every=100)
    for count, size in enumerate([1.0, 1.0, 100.0, 1e4]):
        before = fisher.root
        fisher.precondition(size * core, count)
        renewed = before is None or not np.array_equal(before, fisher.root)
        # √tr L grows √2-, 70- and 100-fold: beyond 16-fold the root is another one.
        assert renewed == (count != 1)


def test_float32_svd_equals_the_rounded_svd(rng):
    g, p = rng.standard_normal((6, 9)), np.eye(6, 3)
    rough, exact = (f(g, p, 1) for f in (oracles.float32_svd_basis, oracles.svd_basis))
    np.testing.assert_array_equal(rough, np.float32(rough))
    # float32 rounds at 6e-8; gaps between singular values of about a tenth cost a digit or two.
    np.testing.assert_allclose(rough, exact, atol=1e-5)


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


def test_square_of_an_unseen_direction_is_the_mean(rng):
    v = rng.random((3, 5))
    unseen = oracles.rotated_square(np.zeros((3, 3)), v)
    np.testing.assert_allclose(unseen, np.broadcast_to(v.mean(axis=0), v.shape))
    turned = oracles.rotated_square(np.array([[0, -1.0, 0], [0, 0, 1.0], [1.0, 0, 0]]), v)
    np.testing.assert_array_equal(turned, v[[1, 2, 0]])


def test_rotation_of_both_sides_equals_two_rotations(rng):
    c, d, x, v = rng.standard_normal((4, 3, 3))
    kron = np.kron(c, d) @ x.ravel()
    np.testing.assert_allclose(oracles.rotated_linear(c, x, d).ravel(), kron, rtol=1e-12)
    c, d = 0.3 * c, 0.3 * d  # rows of norm below 1
    v = v * v
    one_side = oracles.rotated_square(c, v)
    expected = oracles.rotated_square(d, one_side.T).T
    np.testing.assert_array_equal(oracles.rotated_square(c, v, d), expected)
    # The two orders agree: both are averages, one over rows, one over columns.
    first_columns = oracles.rotated_square(c, oracles.rotated_square(d, v.T).T)
    np.testing.assert_allclose(expected, first_columns, rtol=1e-12)


def test_reset_equals_rotation_into_unseen_directions(rng):
    """For squares; all else forgets, and goes on as at the first step."""
    nothing, v = np.zeros((3, 3)), rng.random((3, 5))
    np.testing.assert_allclose(
        oracles.reset_square(v, two_sided=False), oracles.rotated_square(nothing, v), rtol=1e-14
    )
    np.testing.assert_allclose(
        oracles.reset_square(v[:, :3], two_sided=True),
        oracles.rotated_square(nothing, v[:, :3], nothing),
        rtol=1e-14,
    )
    a, b = rng.standard_normal((2, 3, 5))
    for form in (oracles.WindowFisher, oracles.CoreFisher):
        fisher = form()
        fisher.precondition(a, 0)
        fisher.reset(two_sided=False)
        actual, fresh = fisher.precondition(b, 3), form().precondition(b, 3)
        np.testing.assert_array_equal(actual, fresh)
    adam = oracles.Adam(m=a, v=v)
    adam.reset(two_sided=False)
    assert not adam.m.any()
    np.testing.assert_array_equal(adam.v, oracles.reset_square(v, two_sided=False))


def test_long_side_equals_the_transposed_short_side(rng):
    gradients = rng.standard_normal((5, 6, 9))

    def trajectory(gradients, side, start):
        rows, columns = gradients[0].shape
        optimizer = oracles.NaturalGaLore(
            [np.zeros((rows, columns))], [], [start], learning_rate=0.1, due=always, side=side
        )
        for g in gradients:
            optimizer.step([g], [])
        return optimizer.matrices[0].weight

    p, q = np.eye(6, 3), np.eye(9, 3)
    transposed = gradients.transpose(0, 2, 1)
    for side, other, start in (("short", "short", p), ("long", "long", q)):
        expected = trajectory(gradients, side, start)
        np.testing.assert_array_equal(trajectory(transposed, other, start).T, expected)
    for side, other, start in (("left", "right", p), ("right", "left", q)):
        expected = trajectory(gradients, side, start)
        np.testing.assert_array_equal(trajectory(transposed, other, start).T, expected)
    both = trajectory(gradients, "both", [p, q])
    # Other orders of the same products.
    np.testing.assert_allclose(trajectory(transposed, "both", [q, p]).T, both, atol=1e-12)


def test_step_on_both_sides_stays_in_both_subspaces(rng):
    g = rng.standard_normal((6, 9))
    optimizer = oracles.NaturalGaLore(
        [np.zeros((6, 9))],
        [],
        [[np.eye(6, 3), np.eye(9, 3)]],
        learning_rate=0.1,
        due=always,
        side="both",
        basis="svd",
    )
    optimizer.step([g], [])
    matrix = optimizer.matrices[0]
    left, _, right = np.linalg.svd(g)
    spaces = left[:, :3] @ left[:, :3].T, right[:3].T @ right[:3]
    for p, space in zip(matrix.bases, spaces, strict=True):
        np.testing.assert_allclose(p @ p.T, space, atol=1e-12)
    inside = spaces[0] @ matrix.weight @ spaces[1]
    np.testing.assert_allclose(inside, matrix.weight, atol=1e-12)
    # The core is the diagonal of singular values, and Adam's first step is its sign.
    step = np.abs(matrix.bases[0].T @ matrix.weight @ matrix.bases[1])
    np.testing.assert_allclose(np.diag(step), 0.1, rtol=1e-6)


def test_torch_adam_equals_adam_with_a_larger_epsilon(rng):
    """ε / √(1 − b2ᵗ) in its place is the same formula."""
    torch_adam = oracles.TorchAdam(eps=1e-2)
    adam = oracles.Adam()
    for count, g in enumerate(rng.standard_normal((5, 3, 4))):
        adam.eps = 1e-2 / np.sqrt(1 - adam.b2 ** (count + 1))
        np.testing.assert_allclose(torch_adam.step(g, count), adam.step(g, count), rtol=1e-12)


def test_decay_after_the_step_shrinks_the_step_too(rng):
    weight, g = rng.standard_normal((2, 4, 6))
    before, after = (
        oracles.NaturalGaLore(
            [weight],
            [],
            [np.eye(4)],
            learning_rate=0.1,
            due=always,
            weight_decay=0.5,
            decay_after=decay_after,
        )
        for decay_after in (False, True)
    )
    before.step([g], [])
    after.step([g], [])
    step = before.matrices[0].weight - (1 - 0.1 * 0.5) * weight
    expected = (1 - 0.1 * 0.5) * (weight + step)
    np.testing.assert_allclose(after.matrices[0].weight, expected, rtol=1e-12)


def signed_permutations(rank):
    """The bases that span the same space: the same columns, in another order, of other signs."""
    rng = np.random.default_rng(7)
    while True:
        yield np.eye(rank)[rng.permutation(rank)] * rng.choice([-1.0, 1.0], rank)


@pytest.mark.parametrize("side", ["short", "both"])
@pytest.mark.parametrize("form", [None, oracles.WindowFisher, oracles.CoreFisher])
def test_transport_is_independent_of_order_and_signs(form, side, rng):
    """Columns of P in another order and of other signs, at every refresh: the same trajectory."""
    gradients = rng.standard_normal((7, 6, 9))
    others = signed_permutations(3)

    def renamed(g, p, turns):
        return oracles.svd_basis(g, p, turns) @ next(others)

    def trajectory(basis, transport):
        start = [np.eye(6, 3), np.eye(9, 3)] if side == "both" else np.eye(6, 3)
        optimizer = oracles.NaturalGaLore(
            [np.zeros((6, 9))],
            [],
            [start],
            learning_rate=0.1,
            due=lambda index, count, refresh_every, total: count % refresh_every == 0,
            refresh_every=2,
            fisher=form,
            basis=basis,
            side=side,
            transport=transport,
        )
        for g in gradients:
            optimizer.step([g], [])
        return optimizer.matrices[0].weight

    for transport in ("rotate", "reset"):
        expected = trajectory("svd", transport)
        np.testing.assert_allclose(trajectory(renamed, transport), expected, atol=1e-9)
    # Without it the names matter, by as much as the displacement itself.
    assert np.abs(trajectory(renamed, "keep") - trajectory("svd", "keep")).max() > 1e-2


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_unprojected_weights_equal_adamw(shape, rng):
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


def test_nonfinite_gradient_changes_only_the_moments(rng):
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
        before = matrix.weight.copy(), matrix.bases[0].copy(), matrix.adam.m.copy()
        gradients[0, 1, 2] = bad
        fisher = dict(vars(matrix.fisher))
        optimizer.step([gradients[0]], [])
        np.testing.assert_array_equal(matrix.weight, before[0])
        np.testing.assert_array_equal(matrix.bases[0], before[1])
        np.testing.assert_array_equal(matrix.adam.m, 0.9 * before[2])
        assert all(vars(matrix.fisher)[name] is value for name, value in fisher.items())
        assert matrix.skipped == 1
        gradients[0, 1, 2] = 0.0
