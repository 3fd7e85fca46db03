"""Bases and core Fishers in 8 bits: what has to hold of each beside being near."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from natgalore_jax.quantization import staged_update
from natgalore_jax.quantization.dynamic_8bit import (
    LINEAR,
    decode as decode_linear,
    encode as encode_linear,
)
from natgalore_jax.quantization.quantized_array import dequantize, is_quantized
from natgalore_jax.quantization.symmetric_16bit import LEVELS, SymmetricArray, decode, encode
from natgalore_jax.util.linalg import inverse_root
from tests.helpers.cases import slow
from tests.helpers.compiling import jit_and_count


HALF = 0.5 / LEVELS  # of a step of a correlation
ROUNDING = 2e-6  # of a correlation in float32: two products and a square root, of at most 1


def coded_arrays(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(x)]


def spectrum(r, decades, spread, rng):
    """A semidefinite r x r matrix and cores of its covariance, `spread` from its axes."""
    turn = np.eye(r) + spread * rng.normal(size=(r, r)) / np.sqrt(r)
    Q = np.linalg.qr(turn if spread < np.inf else rng.normal(size=(r, r)))[0]
    sizes = np.logspace(0, -decades / 2, r)[:, None]
    return [Q @ (sizes * rng.normal(size=(r, 2 * r))) / np.sqrt(2 * r) for _ in range(3)]


def symmetric_oracle(A):
    """Equation (1), in float64."""
    root = np.sqrt(np.diag(A))
    scale = np.outer(root, root)
    rho = np.divide(A, scale, out=np.zeros_like(A), where=scale > 0)
    back = np.rint(rho * LEVELS) / LEVELS * scale
    np.fill_diagonal(back, np.diag(A))
    return back, scale


# --- Core Fishers ---------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([2, 17, 64]),
    st.floats(0, 5),
    st.sampled_from([0.0, 0.3, np.inf]),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_correlations_have_sixteen_bits(seed, r, decades, spread, size):
    cores = spectrum(r, decades, spread, np.random.default_rng(seed))
    A = np.float64(np.float32(size * sum(R @ R.T for R in cores)))
    A = (A + A.T) / 2
    codes, diagonal = encode(jnp.asarray(A, jnp.float32))
    assert codes.dtype == jnp.int8
    back = np.asarray(decode(codes, diagonal))
    np.testing.assert_array_equal(back, back.T)
    np.testing.assert_array_equal(np.diag(back), np.float32(np.diag(A)))
    expected, scale = symmetric_oracle(A)
    # Where a correlation is halfway the oracle may round the other way: a step more.
    assert (np.abs(back - expected) <= (2 * HALF + ROUNDING) * scale).all()
    assert (np.abs(back - A) <= (HALF + ROUNDING) * scale).all()
    again = encode(decode(codes, diagonal))
    assert all(map(np.array_equal, again, (codes, diagonal)))  # at rest it does not drift


def test_every_pair_of_bytes_comes_back():
    """All q from -32512 to 32512, in matrices of two. A product R Rᵀ may be symmetric to rounding
    alone, so that the bytes of a pair would be of two q: one of them is read."""
    q = np.arange(-LEVELS, LEVELS + 1)
    A = np.ones((len(q), 2, 2), np.float32)
    A[:, 0, 1] = A[:, 1, 0] = q / LEVELS
    codes, diagonal = encode(jnp.asarray(np.tril(A)))
    np.testing.assert_array_equal(256 * np.int32(codes[:, 1, 0]) + codes[:, 0, 1], q)
    # Two roundings of the quotient, here and there.
    np.testing.assert_allclose(decode(codes, diagonal), A, rtol=2**-22)


def test_nothing_is_zero_and_what_is_not_finite_is_nan():
    A = jnp.eye(5) + 0.5
    A = A.at[2].set(0).at[:, 2].set(0).at[1, 0].set(jnp.inf).at[0, 1].set(jnp.inf)
    back = np.asarray(decode(*encode(jnp.stack([A, 0 * jnp.eye(5)]))))
    assert np.isnan(back[0, [0, 1], [1, 0]]).all()
    assert np.isnan(back[0]).sum() == 2
    assert (back[0, 2] == 0).all()
    assert (back[0, 3, 4], back[0, 3, 3]) == (pytest.approx(0.5, abs=2e-5), 1.5)
    assert (back[1] == 0).all()


@pytest.mark.parametrize(
    ("r", "spread"),
    [
        (64, np.inf),
        pytest.param(64, 0.3, marks=pytest.mark.slow),
        pytest.param(128, np.inf, marks=pytest.mark.slow),
    ],
)
def test_the_inverse_root_is_that_of_the_fisher(r, spread):
    """|δL_ij| ≤ h √(L_ii L_jj), so |δL| ≤ h tr L = η λ with η = h r/ρ, and (L + λI)(1 - η) ≤
    L' + λI ≤ (L + λI)(1 + η), of which the inverse root keeps the order: Z' lies within
    (1 ± η)^-½ Z. The float32 of the root is right to 1e-4 of its largest eigenvalue, which beside
    the least is √(r (1 + 1/ρ)) as large."""
    rho, rng = 0.1, np.random.default_rng(r)
    cores = spectrum(r, 4, spread, rng)
    L = sum(R @ R.T for R in cores) / 3
    shift = rho * np.trace(L) / r * np.eye(r)
    root = lambda L: np.float64(inverse_root(jnp.asarray(L + shift, jnp.float32), 0.5, rho))
    Z = np.linalg.inv(np.linalg.cholesky(L + shift))  # of whom ZᵀZ is the inverse: any root does
    values, vectors = np.linalg.eigh(L + shift)
    quarter = (vectors * values**0.25) @ vectors.T  # Z^-½
    back = np.asarray(decode(*encode(jnp.asarray(L, jnp.float32))))
    whitened = quarter @ root(back) @ quarter - np.eye(r)
    eta = (HALF + ROUNDING) * r / rho
    assert eta < 0.03
    assert np.linalg.norm(whitened, 2) < (1 - eta) ** -0.5 - 1 + 1e-4 * np.sqrt(r * (1 + 1 / rho))
    assert np.linalg.eigvalsh(back + shift).min() > 0
    # The code of moments is too coarse for it, near its axes by far, in other bases altogether.
    rough = np.float64(decode_linear(*encode_linear(LINEAR, jnp.asarray(L, jnp.float32), 64)))
    rough = Z @ (np.tril(rough) + np.tril(rough, -1).T + shift) @ Z.T - np.eye(r)
    assert np.linalg.norm(rough, 2) > (3 if spread < np.inf else 10) * eta


def cores_of(fisher, roles, steps, refresh_every=100, rank=64, **kwargs):
    """Of a projection with one stage: its state and update after each step, in full and coded."""
    tx = natgalore.chain(natgalore.project(rank, refresh_every=refresh_every), fisher)
    params = {"kernel": jnp.zeros((96, 128))}
    sizes = jnp.logspace(0, -1.5, 96)[:, None]

    def gradient(t):
        common, new = (
            jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (96, 128)) for i in (0, t)
        )
        return {"kernel": sizes * (0.7 * common + 0.7 * new)}

    for method in (tx, natgalore.quantized(tx, roles, stochastic=())):
        (update, traces), state = jit_and_count(method.update), method.init(params)
        run = []
        for t in range(1, steps + 1):
            updates, state = update(gradient(t), state, params)
            run.append((np.float64(updates["kernel"]), state))
        assert len(traces) == 1
        yield run


@pytest.mark.slow
def test_a_tracked_fisher_stays_near():
    """Each step's rounding is of h √(L_ii L_jj) at most, then decays as L does: T h in all, and
    the diagonal, which is never rounded, is that of float32."""
    steps = 30
    fisher = natgalore.scale_by_core_fisher()
    exact, mine = cores_of(fisher, ("fisher", "root"), steps)
    state = mine[-1][1].inner_state[0].inner_state[0]
    assert [type(x) for x in coded_arrays(state)] == 2 * [SymmetricArray]
    L = np.asarray(exact[-1][1][0].inner_state[0].fisher["kernel"].value)
    back = np.asarray(state.fisher["kernel"].value.decode())
    np.testing.assert_allclose(np.diag(back), np.diag(L), rtol=1e-5)
    scale = np.sqrt(np.outer(np.diag(L), np.diag(L)))
    assert (np.abs(back - L) <= (steps * HALF + 1e-5) * scale).all()
    assert np.abs(back - L).max() > 0
    # By the same bound, as a share of λ: the answer is wrong by half of it at most (here by 3e-4).
    eta = 2 * steps * HALF * 64 / 0.1
    for (U, _), (V, _) in zip(exact, mine, strict=True):
        assert np.linalg.norm(V - U) < eta / 2 * np.linalg.norm(U)
    assert np.linalg.norm(V - U) < 2e-3 * np.linalg.norm(U)  # of roundings of random signs


# --- Bases ----------------------------------------------------------------------------------------

PARAMS = {"up": {"kernel": jnp.zeros((256, 320))}, "layers": {"kernel": jnp.zeros((3, 256, 320))}}


def gradients(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    sizes = jnp.logspace(0, -2, 256)[:, None]
    some = lambda key, shape: jnp.broadcast_to(sizes, shape) * jax.random.normal(key, shape)
    named = zip(PARAMS, keys, strict=True)
    return {k: {"kernel": some(key, PARAMS[k]["kernel"].shape)} for k, key in named}


@functools.cache
def bases_over_time():
    """The codes of both bases after each of 9 steps, a refresh of one of four matrices in each
    other one, and the last state."""
    tx = natgalore.project(64, optax.identity(), refresh_every=8)
    tx = natgalore.quantized(tx, "basis", stochastic=())
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    codes = []
    for t in range(9):
        _, state = update(gradients(t), state, PARAMS)
        basis = state.inner_state.basis
        arrays = [basis[name]["kernel"].value for name in PARAMS]
        codes.append([np.asarray(x.codes).reshape(-1, 256, 64) for x in arrays])
    return codes, state


def test_bases_are_orthonormal_when_they_are_read():
    """From codes to 1.5 %, or 3 % where few numbers of a row are large, and after a turn of
    P (3I - PᵀP)/2 to 3/4 of the square of that."""

    def check(raw, basis, G):
        far = lambda P: np.linalg.norm(np.swapaxes(P, -1, -2) @ P - np.eye(64), 2, (-2, -1)).max()
        assert 3e-3 < far(raw) < 0.03
        assert far(basis) < 0.76 * far(raw) ** 2 + 1e-6
        # It is the nearest one, so that no column is further than codes were from orthonormal.
        assert np.linalg.norm(basis - raw, axis=-2).max() < far(raw) / 2 * (1 + 1e-3)
        # What is left of a gradient has of the span what PᵀP lacks of the identity, of the core.
        turned = np.swapaxes(basis, -1, -2)
        leak = lambda P: np.linalg.norm(turned @ (G - P @ (np.swapaxes(P, -1, -2) @ G)))
        assert leak(basis) < 2 * far(basis) * np.linalg.norm(turned @ G) < leak(raw)

    _, state = bases_over_time()
    found = state.inner_state.basis
    for name in PARAMS:
        raw = np.float64(found[name]["kernel"].value.decode())
        basis = np.float64(dequantize(found)[name]["kernel"].value)
        check(raw, basis, np.float64(gradients(9)[name]["kernel"]))


def test_codes_of_a_basis_change_when_it_does():
    """One matrix at a time, in its turn; orthonormal again, it is not rounded again."""
    codes, _ = bases_over_time()
    at_all = np.zeros(4, bool)
    for before, after in itertools.pairwise(codes):
        changed = (np.concatenate(before) != np.concatenate(after)).any(axis=(1, 2))
        assert changed.sum() <= 1
        at_all |= changed
    assert at_all.all()


# --- All of it ------------------------------------------------------------------------------------

ROLES = ("linear", "square", "basis", "fisher", "root")
ALL = {
    "core": functools.partial(natgalore.natural_galore, fisher="core"),
    "window": functools.partial(
        natgalore.natural_galore, fisher=natgalore.scale_by_fisher(3, relative=True)
    ),
}


@pytest.mark.parametrize(
    ("fisher", "refresh"),
    [
        pytest.param("core", "gradient", marks=pytest.mark.slow),
        pytest.param("core", "passes", marks=pytest.mark.slow),
        pytest.param("window", "gradient", marks=pytest.mark.slow),
        pytest.param("window", "passes", marks=pytest.mark.slow),
    ],
)
def test_gradients_from_the_backward_pass(fisher, refresh):
    """A refresh there carries what is in 8 bits, and leaves it so; without one nothing changes."""
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    params = {"up": {"kernel": 0.1 * normal(0, 128, 256)}}
    loss = lambda p, x, y: jnp.mean(jnp.tanh(x @ p["up"]["kernel"]) * y)
    plain = ALL[fisher](1e-2, 64, refresh_every=2, residual=None)
    tx = natgalore.quantized(plain, ROLES)
    gradients = jax.jit(natgalore.value_and_grad(loss, tx, refresh=refresh))
    update, full = jax.jit(tx.update), jax.jit(jax.value_and_grad(loss))
    ours = theirs = tx.init(params)
    assert len(coded_arrays(ours)) == (5 if fisher == "core" else 3)
    for step in range(4):
        batch = normal(2 * step + 1, 256, 128), normal(2 * step + 2, 256, 256)
        (_, grads), after = gradients(params, ours, *batch)
        assert jax.tree.structure(after) == jax.tree.structure(ours)
        if step % 2:
            assert all(map(np.array_equal, *map(jax.tree.leaves, (after, ours))))
        mine, ours = update(grads, after, params)
        expected, theirs = update(full(params, *batch)[1], theirs, params)
    # A refresh rounds what it has turned to nearest before the step does, moments by up to 3.5 %.
    a, b = mine["up"]["kernel"], expected["up"]["kernel"]
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("fisher", "kind"),
    slow(*itertools.product(("core", "window"), (AxisType.Auto, AxisType.Explicit))),
)
def test_sharded_as_the_arrays_are(fisher, kind, monkeypatch):
    """Codes and scales are divided over all axes of the weight."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))
    lies = {"kernel": NamedSharding(mesh, P(None, "fsdp", "tensor"))}
    stage = {"core": natgalore.scale_by_core_fisher(), "window": natgalore.scale_by_fisher(3)}
    plain = natgalore.chain(natgalore.project(64, stage[fisher]))
    alone = natgalore.quantized(plain, ROLES, stochastic=())
    tx = natgalore.sharded(alone, lies)
    params = {"kernel": jnp.zeros((2, 128, 256))}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (2, 128, 256))}
    _, expected = jax.jit(alone.update)(grads, alone.init(params), params)
    monkeypatch.setattr(staged_update, "LEAST", 1)
    with jax.set_mesh(mesh):
        params, grads = (jax.device_put(x, lies) for x in (params, grads))
        told = natgalore.state_shardings(tx, params, lies)
        state = jax.jit(tx.init)(params)
        _, after = jax.jit(tx.update)(grads, state, params)
    for x, y, s in zip(*map(jax.tree.leaves, (state, after, told)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim), (x.shape, x.sharding.spec, s.spec)
        assert y.sharding.is_equivalent_to(s, y.ndim), (y.shape, y.sharding.spec, s.spec)
    arrays = coded_arrays(after)
    for x in arrays:
        for part in (x.codes, x.scales):
            assert part.addressable_shards[0].data.size == part.size // 8
    assert len(arrays) == (3 if fisher == "core" else 1)  # windows are not encoded
    # Sums in another order move a number near a border to the next cell, 7 % off, and few are.
    for x, y in zip(arrays, coded_arrays(expected), strict=True):
        a, b = np.float64(x.decode()), np.float64(y.decode())
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_memory_report_counts_pairs_and_diagonals():
    params = {"kernel": jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)}
    fisher = natgalore.natural_galore(1.0, rank=64, fisher="core")
    roles = {"L": "fisher", "root": "root", "both": ("fisher", "root")}
    methods = {k: natgalore.quantized(fisher, x, stochastic=()) for k, x in roles.items()}
    report = natgalore.memory_report(params, {"float32": fisher, **methods}).projected
    saved = 4 * 64 * 64 - (64 * 64 + 4 * 64)
    assert [report["float32"] - report[k] for k in roles] == [saved, saved, 2 * saved]
