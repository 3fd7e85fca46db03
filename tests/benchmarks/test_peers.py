"""The optimizers of other papers against float64 NumPy versions of their algorithms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from benchmarks.learning.convergence import peers
from tests.helpers.cases import quick


M, N, R, EVERY, STEPS = 6, 8, 3, 3, 7
RATE = 0.5
EPS = 1e-8

# The steps contain two refreshes: the second at step 4, for soap at step 5.
METHODS = {
    "soap": lambda rate: peers.soap(rate, precondition_every=EVERY),
    "fira": lambda rate: peers.fira(rate, R, refresh_every=EVERY, scale=0.25),
    "apollo": lambda rate: peers.apollo(rate, R, refresh_every=EVERY),
    "apollo_mini": lambda rate: peers.apollo_mini(rate, refresh_every=EVERY),
    "ldadam": lambda rate: peers.ldadam(rate, R),
    "dion": lambda rate: peers.dion(rate, R),
    "cosmos": lambda rate: peers.cosmos(rate, R),
}


# --- The papers, for G (m x n) with m ≤ n, in float64 -------------------------------------------


class Adam:
    def __init__(self, b1=0.9, b2=0.999):
        self.m, self.v, self.t, self.betas = 0.0, 0.0, 0, (b1, b2)

    def __call__(self, core):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * core
        self.v = b2 * self.v + (1 - b2) * core**2
        return self.hats()[0] / (np.sqrt(self.hats()[1]) + EPS)

    def hats(self):
        b1, b2 = self.betas
        return self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)


def limited(s, before):
    norm = np.linalg.norm(s)
    if before is not None and norm > 1.01 * before:
        s = s / norm * 1.01 * before
    return s, np.linalg.norm(s)


def soap(gradients, first_bases):
    b = 0.95
    left, right = (1 - b) * gradients[0] @ gradients[0].T, (1 - b) * gradients[0].T @ gradients[0]
    ql, qr = first_bases
    m = v = 0.0
    yield 0 * gradients[0]
    for t, g in enumerate(gradients[1:], start=1):
        m = b * m + (1 - b) * g
        v = b * v + (1 - b) * (ql.T @ g @ qr) ** 2
        u = (ql.T @ m @ qr / (1 - b**t)) / (np.sqrt(v / (1 - b**t)) + EPS)
        yield ql @ u @ qr.T
        left, right = b * left + (1 - b) * g @ g.T, b * right + (1 - b) * g.T @ g
        if t % EVERY == 0:
            rows = np.argsort(-np.diag(ql.T @ left @ ql))
            columns = np.argsort(-np.diag(qr.T @ right @ qr))
            v = v[np.ix_(rows, columns)]
            ql = np.linalg.qr(left @ ql[:, rows])[0]
            qr = np.linalg.qr(right @ qr[:, columns])[0]


def fira(gradients):
    adam, before = Adam(), None
    for t, g in enumerate(gradients):
        if t % EVERY == 0:
            p = np.linalg.svd(g)[0][:, :R]
            # The moments stay, so signs matter: the largest entry of each vector is positive.
            p = p * np.sign(p[np.abs(p).argmax(axis=0), range(R)])
        core = p.T @ g
        u = adam(core)
        phi = np.linalg.norm(u, axis=0) / np.linalg.norm(core, axis=0)
        s, before = limited((g - p @ core) * phi, before)
        yield 0.25 * (p @ u + s)


def apollo(gradients, projections, axis=0, root_of_scale=1.0):
    adam, before = Adam(), None
    for t, g in enumerate(gradients):
        core = projections[t // EVERY].T @ g
        u = adam(core)
        if axis is None:
            phi = np.linalg.norm(u) / np.linalg.norm(core)
        else:
            phi = np.linalg.norm(u, axis=axis) / np.linalg.norm(core, axis=axis)
        s, before = limited(root_of_scale * g * phi, before)
        yield s


def ldadam(gradients):
    adam, error, rho, b1, b2 = Adam(), 0.0, 0.908, 0.9, 0.999
    for t, g in enumerate(gradients):
        a = g + error
        if t == 0:
            p = np.linalg.svd(a)[0][:, :R]
            lost = 0.0
        else:
            mean, square = adam.hats()
            b = rho * p @ mean + (1 - rho) * a
            old, p = p, np.linalg.qr(b @ b.T @ p)[0]
            c = p.T @ old
            lost = old @ adam.m - p @ c @ adam.m
            spread = (c**2) @ (square - mean**2) + (c @ mean) ** 2
            adam.m, adam.v = c @ adam.m, (1 - b2**adam.t) * np.abs(spread)
        yield p @ adam(p.T @ a)
        error = a - p @ p.T @ a + b1 / (1 - b1) * lost


def cosmos(gradients):
    b1, b2, m, v, s = 0.9, 0.96, 0.0, 0.0, 0.0
    p = np.linalg.svd(gradients[0])[0][:, :R]
    for t, g in enumerate(gradients, start=1):
        second = b2 * p @ (s * np.eye(R) if t == 1 else s) @ p.T + (1 - b2) * g @ g.T
        p = np.linalg.qr(second @ p)[0]
        s = p.T @ second @ p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (p.T @ g) ** 2
        a = p @ (p.T @ m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + EPS))
        rest = m - p @ p.T @ m
        left, values, right = np.linalg.svd(rest / np.linalg.norm(rest), full_matrices=False)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        b = (left * values) @ right
        x = a + 0.2 * np.sqrt(M * N) * b / np.linalg.norm(b)
        yield np.sqrt(M * N) * x / np.linalg.norm(x)


def dion(gradients, q):
    momentum, mu = 0.0, 0.95
    for g in gradients:
        b = momentum + g
        p = np.linalg.qr(b @ q)[0]
        r = b.T @ p
        momentum = b - (1 - mu) * p @ r.T
        q = r / np.linalg.norm(r, axis=0)
        yield p @ q.T


# --- Against them -------------------------------------------------------------------------------


def gradients():
    """Gradients: for each matrix a fixed part with decaying singular values, plus noise."""
    rng = np.random.default_rng(0)
    shapes = {"stack": (2, M, N), "tall": (N, M), "wide": (M, N)}
    steady = {}
    for name, shape in shapes.items():
        U, _, V = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        steady[name] = U * 2.0 ** -np.arange(M) @ V
    noisy = lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32)
    return [jax.tree.map(noisy, steady) for _ in range(STEPS)]


@functools.cache
def run(name):
    """The gradients, and a method's updates and states of its matrices."""
    tx, grads = METHODS[name](RATE), gradients()
    state = tx.init(grads[0])
    update = jax.jit(tx.update)
    updates, states = [], [state[0].kept]
    for g in grads:
        u, state = update(g, state)
        updates.append(u)
        states.append(state[0].kept)
    return grads, updates, states


def matrices(tree):
    """All matrices of a tree, the short side first, in float64, in their order."""
    for x in jax.tree.leaves(tree):
        for matrix in np.asarray(x, np.float64).reshape(-1, *x.shape[-2:]):
            yield matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def kept(states, name):
    """What is kept of each matrix under a name."""
    return [
        x for s in states.values() for x in np.asarray(s[name]).reshape(-1, *s[name].shape[-2:])
    ]


def oracle(method, gs, number, states):
    if method == "soap":
        return soap(gs, [kept(states[2], name)[number].astype(float) for name in ("QL", "QR")])
    if method.startswith("apollo"):
        r = 1 if method == "apollo_mini" else R
        key = jax.random.fold_in(jax.random.key(0, impl=peers.GENERATOR), number)
        times = range(1 + STEPS // EVERY)
        ps = [np.asarray(peers.random_projection(key, i, M, r), np.float64) for i in times]
        return apollo(gs, ps) if r > 1 else apollo(gs, ps, None, np.sqrt(128))
    if method == "dion":
        return dion(gs, kept(states[0], "Q")[number].astype(float))
    return {"fira": fira, "ldadam": ldadam, "cosmos": cosmos}[method](gs)


@pytest.mark.parametrize("method", quick(list(METHODS)[:1], [*METHODS]))
def test_equals_the_paper(method):
    """Wide, tall and each of a stack, through a refresh."""
    grads, updates, states = run(method)
    each = lambda trees: list(zip(*map(matrices, trees), strict=True))
    tall = 2  # by number: the stack is 0 and 1
    for number, (gs, us) in enumerate(zip(each(grads), each(updates), strict=True)):
        # Dion's √(outputs / inputs); kernels are (inputs, outputs).
        shape = np.sqrt(M / N if number == tall else N / M) if method == "dion" else 1.0
        expected = np.stack(list(oracle(method, gs, number, states)))
        # 1 − 0.999ᵗ is 1e-3 at first, of numbers that float32 rounds by 3e-8, and bases turn by
        # rounding over gaps of singular values.
        # Newton-Schulz scales the R singular values of COSMOS's rest that are rounding, 1e-7, up by
        # 3.4445⁵ = 485, each to 5e-5.
        atol = (2e-4 if method == "cosmos" else 3e-5) * np.abs(expected).max()
        np.testing.assert_allclose(np.stack(us), -RATE * shape * expected, atol=atol)


@pytest.mark.parametrize(
    ("method", "name"),
    [("soap", "QL"), ("soap", "QR"), ("fira", "P"), ("ldadam", "P"), ("cosmos", "P")],
)
def test_bases_are_orthonormal(method, name):
    for P in kept(run(method)[2][-1], name):
        # Sums of 8 products in float32, each rounded by 6e-8 at most, and of a QR or SVD of such.
        np.testing.assert_allclose(P.T @ P, np.eye(P.shape[1]), atol=4e-6)


def test_soap_starts_from_eigenvectors_of_the_first_gradient():
    grads, updates, states = run("soap")
    assert not any(x.any() for x in jax.tree.leaves(updates[0]))
    assert not any(x.any() for x in kept(states[1], "M") + kept(states[1], "V"))
    for g, Q in zip(matrices(grads[0]), kept(states[2], "QL"), strict=True):
        eigenvalues = np.sort(np.linalg.eigvalsh(g @ g.T))[::-1]
        # Relative to the largest, eigh is right to a few roundings of 6e-8.
        atol = 2e-6 * eigenvalues[0]
        np.testing.assert_allclose(Q.T @ g @ g.T @ Q, np.diag(eigenvalues), atol=atol)


def test_soap_accumulates_squares_on_every_step():
    """Steps without a refresh follow (1) in the current basis."""
    grads, _, states = run("soap")
    for t in (3, 4):  # its bases are from step 2
        gs, before, after = matrices(grads[t - 1]), kept(states[t - 1], "V"), kept(states[t], "V")
        QL, QR = kept(states[t], "QL"), kept(states[t], "QR")
        for g, old, new, ql, qr in zip(gs, before, after, QL, QR, strict=True):
            expected = 0.95 * old + 0.05 * (ql.T @ g @ qr) ** 2
            np.testing.assert_allclose(new, expected, atol=1e-6 * expected.max())  # float32


def test_fira_of_full_rank_is_adam():
    """P consists of unit vectors if the rows of the first G are orthogonal."""
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.normal(size=(N, M)))[0].T * np.arange(M, 0, -1)[:, None]
    first = {"a": jnp.asarray(rows, jnp.float32)}
    ours, adam = peers.fira(RATE, M, limit=1e9), optax.adam(RATE)
    states = [tx.init(first) for tx in (ours, adam)]
    for g in [first] + [{"a": jnp.asarray(rng.normal(size=(M, N)), jnp.float32)}] * 2:
        u, states[0] = jax.jit(ours.update)(g, states[0])
        expected, states[1] = adam.update(g, states[1])
        # P is off unit vectors by rounding over gaps of singular values, 6e-8 · 6², and Adam
        # divides: small entries of its core take some of large ones with them.
        np.testing.assert_allclose(u["a"], expected["a"], atol=2e-5)


@pytest.mark.parametrize("method", ["apollo", "apollo_mini"])
def test_apollo_scales_columns(method):
    grads, updates, _ = run(method)
    for g, u in zip(matrices(grads[-1]), matrices(updates[-1]), strict=True):
        scale = (-u * g).sum(axis=0) / (g * g).sum(axis=0)
        assert (scale > 0).all()
        np.testing.assert_allclose(-u, g * scale, rtol=1e-5)  # two products in float32
        if method == "apollo_mini":
            np.testing.assert_allclose(scale, scale[0], rtol=1e-5)


def test_apollo_draws_a_new_normal_projection():
    first, second = (peers.random_projection(jax.random.key(1), i, 64, 256) for i in (0, 1))
    # The standard deviation of a variance of 64 · 256 normal numbers is 1.1 % of it.
    assert first.var() * 256 == pytest.approx(1, rel=0.05)
    assert second.var() * 256 == pytest.approx(1, rel=0.05)
    assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.05


@pytest.mark.parametrize("method", ["fira", "apollo", "apollo_mini"])
def test_norms_grow_by_at_most_one_percent(method, key):
    tx = METHODS[method](1.0)
    G = jax.random.normal(key, (M, N))
    state, update = tx.init(G), jax.jit(tx.update)
    norms = []
    for sign in [1, -1] * 4 + [1] * 8:  # Adam's answer shrinks, and grows
        _, state = update(sign * G, state)
        norms.append(float(state[0].kept["norm"]))
    growth = np.array(norms[1:]) / norms[:-1]
    assert growth.max() == pytest.approx(1.01, rel=1e-6)  # a quotient of two float32
    for g in (0 * G, G):
        u, state = update(g, state)
    assert float(jnp.linalg.norm(u)) > 0.01  # nothing limits what follows a zero


def test_ldadam_of_full_rank_has_no_error(key):
    tx = peers.ldadam(RATE, M)
    state, update = tx.init(jnp.zeros((M, N))), jax.jit(tx.update)
    for k in jax.random.split(key, 4):
        G = jax.random.normal(k, (M, N))
        _, state = update(G, state)
        # A − P PᵀA, and nine times as much of the momentum, in float32.
        assert jnp.abs(state[0].kept["error"]).max() < 1e-5 * jnp.abs(G).max()


def test_dion_ends_with_equal_singular_values():
    """Updates have the norm of equal singular values, and converge to them for a fixed gradient."""
    _, updates, states = run("dion")
    for x in (x for u in updates for x in jax.tree.leaves(u)):
        norm = RATE * np.sqrt(R * x.shape[-1] / x.shape[-2])
        np.testing.assert_allclose(np.linalg.norm(x, axis=(-2, -1)), norm, rtol=1e-5)  # float32
    for Q in kept(states[-1], "Q"):
        np.testing.assert_allclose(np.linalg.norm(Q, axis=0), 1, rtol=1e-6)
    G = next(matrices(gradients()[0]))
    U, _, V = np.linalg.svd(G, full_matrices=False)
    G = jnp.asarray(U[:, :R] * 2.0 ** -np.arange(R) @ V[:R], jnp.float32)
    tx = peers.dion(1.0, R)
    state, update = tx.init(G), jax.jit(tx.update)
    for _ in range(16):
        u, state = update(G, state)
    # Each turn divides by four what a column has of those before it: 4⁻¹⁶ is below rounding.
    np.testing.assert_allclose(
        np.linalg.svd(u, compute_uv=False),
        np.sqrt(N / M) * np.array([1] * R + [0] * (M - R)),
        atol=1e-5,
    )


# --- Common properties --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_types(method):
    """Updates have the gradient's dtype, state is float32, and steps keep both."""
    params = {"a": jnp.zeros((2, N, M), jnp.bfloat16), "b": None}
    tx = METHODS[method](RATE)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state)
    assert (updates["a"].shape, updates["a"].dtype) == ((2, N, M), jnp.bfloat16)
    assert after == state
    dtypes = {name: x.dtype for name, x in state[0].kept["a"].items() if name != "key"}
    assert set(dtypes.values()) == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_the_learning_rate_may_be_traced_or_a_schedule():
    grads, updates, _ = run("dion")

    @jax.jit
    def first(rate):
        tx = METHODS["dion"](rate)
        return tx.update(grads[0], tx.init(grads[0]))[0]

    scheduled = METHODS["dion"](optax.constant_schedule(RATE))
    for same in (first(RATE), scheduled.update(grads[0], scheduled.init(grads[0]))[0]):
        # Programs may round the products differently.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, updates[0])


@pytest.mark.parametrize(("method", "primitive"), [("soap", "eigh"), ("fira", "svd")])
def test_a_step_without_a_refresh_factorises_nothing(method, primitive):
    """The factorisations of a stack too are inside the branch of a condition."""

    def names(jaxpr, into_conditions):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            if eqn.primitive.name != "cond" or into_conditions:
                for inner in jaxprs_in_params(eqn.params):
                    yield from names(inner, into_conditions)

    tx, G = METHODS[method](RATE), jnp.zeros((2, M, N))
    jaxpr = jax.make_jaxpr(tx.update)(G, tx.init(G)).jaxpr
    assert primitive in set(names(jaxpr, True))
    assert primitive not in set(names(jaxpr, False))
