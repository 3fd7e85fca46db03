"""State in 8 bits: the code against its table, and optimizers that keep their state in it."""

import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.extend import core as jax_core
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from natgalore_jax.quantization import staged_update
from natgalore_jax.quantization.dynamic_8bit import (
    LINEAR,
    LINEAR_4BIT,
    SQUARE,
    block_size,
    decode,
    encode,
)
from natgalore_jax.quantization.quantized_array import QuantizedArray, dequantize, is_quantized
from tests.helpers.cases import quick, slow
from tests.helpers.compiling import jit_and_count
from tests.oracle.oracles import dynamic_code


CODES = {"linear": LINEAR, "square": SQUARE, "linear, 4 bits": LINEAR_4BIT}
# Magnitudes by how many steps above 0 they are, and the integers that stand for them.
VALUES = {
    "linear": dynamic_code(7),
    "square": dynamic_code(8),
    "linear, 4 bits": dynamic_code(3, decades=3),
}
INTEGERS = {
    "linear": np.arange(128),
    "square": np.array([0, *range(2, 256)]),
    "linear, 4 bits": np.arange(8),
}
each_code = pytest.mark.parametrize("name", CODES)


def exponents(low, high):
    """Numbers of all sizes between two powers of ten."""
    return st.floats(low, high).map(lambda x: 10.0**x)


@each_code
def test_every_value_is_that_of_the_table(name):
    value = CODES[name].value(jnp.asarray(INTEGERS[name], jnp.float32))
    # A rounded product of an exact numerator with a rounded unit, which is so by 2^-23 at most.
    np.testing.assert_allclose(value, VALUES[name], rtol=2**-22)
    assert value[-1] == 1  # so the largest of a block comes back to the bit, step after step


def test_the_table_is_that_of_the_paper():
    """To 1: its table goes on to the end of the last cell, which ours puts at its middle."""
    assert [len(x) for x in VALUES.values()] == [128, 255, 8]
    scale = 1 - 0.9 / 64 / 2
    assert VALUES["linear"][1] * scale == pytest.approx(0.55e-6)
    assert VALUES["linear"][[2, 3]] * scale == pytest.approx([3.25e-6, 7.75e-6])
    assert VALUES["square"][[1, 2]] * (1 - 0.9 / 128 / 2) == pytest.approx([3.25e-7, 7.75e-7])


@each_code
def test_what_is_encoded_once_is_encoded_for_good(name):
    """Every value of both signs, of blocks of several scales; arrays at rest do not drift."""
    code, power = CODES[name], 2 if name == "square" else 1
    values = np.concatenate([VALUES[name], np.zeros(-len(VALUES[name]) % 64)])
    signs = [1] if name == "square" else [1, -1]
    x = np.array([s * size * values**power for s in signs for size in (1.0, 1e-20, 3e20)])
    x = jnp.asarray(x, jnp.float32)
    x = jnp.concatenate([x[..., None], x[..., ::-1, None]], -1).reshape(len(x), -1)
    first = encode(code, x, x.shape[-1])
    again = encode(code, decode(*first), x.shape[-1])
    assert all(map(np.array_equal, first, again))
    np.testing.assert_allclose(decode(*first), x, rtol=1e-6)


@each_code
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 2.0, 5.0]))
def test_the_nearest_value(name, seed, spread):
    rng = np.random.default_rng(seed)
    y = 10.0 ** -np.abs(rng.normal(0, spread, 4096)).astype(np.float32)
    q = np.asarray(CODES[name].nearest(jnp.asarray(y))).astype(int)
    table = dict(zip(INTEGERS[name].tolist(), VALUES[name], strict=True))
    found = np.array([table[i] for i in q])
    nearest = np.abs(np.float64(y)[:, None] - VALUES[name]).min(axis=1)
    # Where two are as near, to the roundings of y/unit + 16·2^e, up to 9 times y/unit, either will
    # do: 2 · (9 + 1) · 2⁻²⁴ of y.
    assert (np.abs(found - y) <= nearest + 2**-19 * y).all()


@pytest.mark.parametrize("name", quick(list(CODES)[:1], [*CODES]))
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([16, 43, 128]), exponents(-30, 30))
def test_errors_are_half_a_gap_of_the_block(name, seed, block, size):
    rng = np.random.default_rng(seed)
    x = (size * rng.normal(size=(3, 4 * block)) * 10 ** rng.normal(size=(3, 4 * block))).astype("f")
    x = np.abs(x) if name == "square" else x
    with np.errstate(under="ignore"):
        x = np.where(np.abs(x) < 1e-37, 0, x).astype("f")
    codes, scales = encode(CODES[name], jnp.asarray(x), block)
    assert codes.dtype == {"square": jnp.uint8, "linear": jnp.int8}.get(name, jnp.int4)
    np.testing.assert_array_equal(scales, np.abs(x).reshape(3, 4, block).max(axis=-1))
    back = np.float64(decode(codes, scales))
    assert (np.sign(back) == np.sign(x))[np.abs(x) >= 1e-12 * np.abs(x).max()].all() or (
        name != "square"
    )
    root = (lambda x: np.sqrt(np.float64(x))) if name == "square" else np.float64
    largest = root(np.repeat(np.asarray(scales), block, axis=-1))
    y = np.abs(root(x)) / largest
    above = np.searchsorted(VALUES[name], y).clip(1, len(VALUES[name]) - 1)
    half = (VALUES[name][above] - VALUES[name][above - 1]) / 2
    if name == "square":  # what is not 0 goes up to the first value
        half = np.where((above == 1) & (y > 0), VALUES[name][1], half)
    assert (np.abs(root(back) - root(x)) <= (half + 1e-6 * y) * largest).all()


def test_no_step_of_adam_grows_by_more_than_the_cells_allow():
    """|m|/√v, decoded, of any m and v: m is at most doubled, √v at most divided by 1.88.

    A max_abs from half the first value on becomes that value. Of √v the largest share is lost
    where the first decade ends, halfway to the next value. Where v is not 0 it stays so.
    """
    rng = np.random.default_rng(0)
    m = (rng.normal(size=(64, 128)) * 10 ** rng.uniform(-8, 0, (64, 128))).astype("f")
    v = (10 ** rng.uniform(-18, 0, (64, 128))).astype("f")
    m_back = np.float64(decode(*encode(LINEAR, jnp.asarray(m), 128)))
    v_back = np.float64(decode(*encode(SQUARE, jnp.asarray(v), 128)))
    at_random = encode(SQUARE, jnp.asarray(v), 128, jax.random.key(0))
    assert (v_back > 0).all()
    assert (decode(*at_random) > 0).all()
    values = VALUES["square"][1:]
    grown = ((values[:-1] + values[1:]) / 2 / values[:-1]).max()
    assert grown < 1.88
    assert (np.abs(m_back) <= np.abs(m) * 2 * (1 + 1e-6)).all()
    assert (np.sqrt(v_back) >= np.sqrt(v) / grown * (1 - 1e-6)).all()


@each_code
def test_rounding_at_random_has_the_right_mean(name):
    n, size = 20000, 32
    rng = np.random.default_rng(1)
    x = 10 ** rng.uniform(-4, 0, size)
    x[0], x[1:3] = 1, [0.9999, 0.05]
    x = jnp.asarray(x if name == "square" else x * rng.choice([-1, 1], size), jnp.float32)
    keys = jax.random.split(jax.random.key(2), n)
    sample = jax.jit(jax.vmap(lambda key: decode(*encode(CODES[name], x, size, key))))
    found = np.float64(sample(keys))
    low, high = found.min(axis=0), found.max(axis=0)
    # Never further than a neighbour, so the mean of n has a standard error of half a gap/√n.
    values = VALUES[name] ** (2 if name == "square" else 1)
    for a, b, y in zip(*np.sort(np.abs([low, high]), axis=0), np.abs(x), strict=True):
        at = np.searchsorted(values, y * (1 - 1e-6))
        assert a >= values[at - 1] * (1 - 1e-6)
        assert b <= values[at] * (1 + 1e-6)
    assert (np.abs(found.mean(axis=0) - x) <= 5 * (high - low) / 2 / np.sqrt(n) + 1e-7).all()
    assert (high > low)[1:].sum() >= size - 3


@each_code
def test_zeros_are_exact_and_what_is_not_finite_is_nan(name):
    x = np.ones((3, 64), np.float32)
    x[0], x[1, 3:6], x[2, :3] = 0, [np.nan, np.inf, np.inf], 0
    x[2, 5] = 1e-42  # denormal, which devices flush
    for key in (None, jax.random.key(0)):
        back = np.asarray(decode(*encode(CODES[name], jnp.asarray(x), 64, key)))
        np.testing.assert_array_equal(np.isnan(back), ~np.isfinite(x))
        assert (back[np.isfinite(x) & (x == 1)] == 1).all()
        assert (back[x == 0] == 0).all()
    nothing = jnp.full((1, 64), 1e-42)
    assert (decode(*encode(CODES[name], nothing, 64)) == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_comes_back(dtype):
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(dtype)
    codes, scales = encode(LINEAR, x, 32)
    assert scales.dtype == decode(codes, scales).dtype == dtype
    np.testing.assert_array_equal(scales, jnp.abs(x).reshape(4, 2, 32).max(-1))


@given(st.integers(1, 40000))
def test_blocks_divide_their_axis(n):
    b = block_size(n)
    divisors = [d for d in range(1, 129) if n % d == 0]
    if b is None:
        assert max(divisors) < 16
        return
    assert n % b == 0
    assert 16 <= b <= 128
    assert b >= 32 or max(divisors) < 32
    assert all((n // b) % 8 == 0 for d in divisors if d >= 32 and (n // d) % 8 == 0)


# --- Optimizers -----------------------------------------------------------------------------------

SHAPES = {"up": {"kernel": (64, 256)}, "down": {"kernel": (2, 256, 64)}, "bias": (64,)}
MOMENTS = {"linear", "square"}


def random(seed, dtype=jnp.float32):
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [jax.random.normal(k, s, dtype) for k, s in zip(keys, leaves, strict=True)]
    return treedef.unflatten(normal) | {"frozen": None}


OPTIMIZERS = {
    "adamw": functools.partial(optax.adamw, weight_decay=0.1),
    "galore": functools.partial(natgalore.galore, rank=32, refresh_every=10, weight_decay=0.1),
    "natural_galore": functools.partial(
        natgalore.natural_galore, rank=32, refresh_every=10, fisher="core", residual=None
    ),
    "random, isotropic": functools.partial(
        natgalore.galore, rank=32, basis="random", residual="isotropic", refresh_every=10
    ),
}
each = pytest.mark.parametrize("name", quick(["adamw"], [*OPTIMIZERS]))


def coded_arrays(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(x)]


@pytest.mark.slow
@each
def test_the_state_is_that_of_the_optimizer_with_moments_in_8_bits(name):
    tx = OPTIMIZERS[name](1e-2)
    params = random(0)
    plain, state = tx.init(params), natgalore.quantized(tx).init(params)
    back = dequantize(state.inner_state)
    assert jax.tree.structure(back) == jax.tree.structure(plain)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (back, plain))))
    arrays = coded_arrays(state)
    assert len(arrays) == 4  # mu and nu of two leaves; the bias is small
    assert sorted(x.codes.dtype.name for x in arrays) == 2 * ["int8"] + 2 * ["uint8"]
    abstract = jax.eval_shape(natgalore.quantized(tx).init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


@pytest.mark.slow
def test_other_roles_on_request():
    params = random(0)
    tx = natgalore.natural_galore(1e-2, rank=64, select=[("up|down", "auto"), ("", None)])
    state = natgalore.quantized(tx, ["basis"], stochastic=()).init(params)
    assert len(coded_arrays(state)) == 2
    assert {x.codes.dtype for x in coded_arrays(state)} == {jnp.dtype("int8")}
    assert coded_arrays(state.inner_state[0].basis) == coded_arrays(state)
    assert state.key is None
    energy = natgalore.explained_energy(state, random(1))
    exact = natgalore.explained_energy(tx.init(params), random(1))
    for leaf in exact:
        np.testing.assert_allclose(energy[leaf], exact[leaf], rtol=0.02)


def run(tx, steps=121):
    """Least squares of a product of two matrices: the state at the end, and the losses."""
    keys = jax.random.split(jax.random.key(5), 4)
    x = jax.random.normal(keys[0], (256, 64)) * jnp.logspace(0, -1, 64)[None]
    y = x @ (jax.random.normal(keys[1], (64, 64)) / 8)
    params = {
        "up": {"kernel": jax.random.normal(keys[2], (64, 128)) / 8},
        "down": {"kernel": jax.random.normal(keys[3], (128, 64)) / 11},
    }

    def loss(p):
        return jnp.mean((x @ p["up"]["kernel"] @ p["down"]["kernel"] - y) ** 2)

    def step(at, _):
        params, state = at
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    train = jax.jit(lambda at: jax.lax.scan(step, at, None, steps))
    (_, state), losses = train((params, tx.init(params)))
    return state, np.float64(losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "roles"),
    [
        ("adamw", {}, MOMENTS),
        pytest.param("galore", {}, MOMENTS, marks=pytest.mark.slow),
        ("natural_galore", {"rank": 64, "side": "both"}, {*MOMENTS, "basis", "fisher", "root"}),
    ],
)
def test_trains_as_in_float32(name, rank, roles):
    """Inside a scan. A number of the code's first decade is right to 3.5 %, so a step is at most
    that much too long or too short, and the loss where time had run by as much faster or slower:
    of a loss that falls exponentially, that share of its logarithm's fall. Spans of bases are right
    to 1.5 %, once on the way down and once on the way up, and inverse roots to 0.2 %."""
    tx = OPTIMIZERS[name](3e-3, **rank)
    _, losses = run(tx)
    state, mine = run(natgalore.quantized(tx, tuple(roles)))
    assert len(coded_arrays(state)) == (12 if "basis" in roles else 4)
    fallen = np.log(losses / losses[0])[30::30]
    assert fallen[-1] < -2
    share = 0.035 + 2 * 0.015 * ("basis" in roles)
    assert (np.abs(np.log(mine / losses)[30::30]) <= share * np.abs(fallen)).all()
    assert (mine != losses)[5:].all()


def test_a_block_recovers_from_one_large_gradient():
    """What is rounded to nearest falls with the largest of its block; at random it does not."""

    def roots(tx):
        def step(state, t):
            g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (128, 32))
            g = g.at[:, 5].mul(jnp.where(t == 300, 1000.0, 1.0))
            return tx.update(g, state)[1], None

        state, _ = jax.lax.scan(step, tx.init(jnp.zeros((128, 32))), jnp.arange(1500))
        return jnp.sqrt(dequantize(getattr(state, "inner_state", state)).nu)

    adam = optax.scale_by_adam()
    mine, nearest, exact = [
        np.asarray(jax.jit(lambda tx=tx: roots(tx))())
        for tx in (
            natgalore.quantized(adam),
            natgalore.quantized(adam, stochastic=()),
            adam,
        )
    ]
    assert np.median(nearest / exact) < 0.8
    # After the large gradient the others are in the third decade, whose cells are 14 % of them.
    assert abs(np.median(mine / exact) - 1) < 0.03
    assert np.abs(mine / exact - 1).mean() < 0.14


def steps(tx, params, state, first, last):
    update, traces = jit_and_count(tx.update)
    for i in range(first, last):
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), random(i + 10), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1
    return params, state


@pytest.mark.slow
@each
def test_goes_on_to_the_same_bits_from_numpy(name):
    """Codes, scales and the key of the rounding are all there is; one program for all steps."""
    tx = natgalore.quantized(OPTIMIZERS[name](1e-2), seed=3)
    params = random(0, jnp.bfloat16)
    at = steps(tx, params, tx.init(params), 0, 3)
    saved = [np.asarray(x) for x in jax.tree.leaves(at)]
    restored = jax.tree.structure(jax.eval_shape(lambda: (params, tx.init(params)))).unflatten(
        [jnp.asarray(x) for x in saved]
    )
    expected, actual = steps(tx, *at, 3, 5), steps(tx, *restored, 3, 5)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (actual, expected))))
    other = natgalore.quantized(OPTIMIZERS[name](1e-2), seed=4)
    _, different = steps(other, params, other.init(params), 0, 3)
    assert not all(map(np.array_equal, *map(jax.tree.leaves, (different, at[1]))))


def test_every_leaf_and_step_is_rounded_by_a_key_of_its_own():
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}
    grads = jax.tree.map(lambda x: jnp.tile(jnp.linspace(0.1, 1, 64)[None], (64, 1)), params)
    tx = natgalore.quantized(optax.scale_by_rms(decay=0.0))  # nu is the newest square
    state = tx.init(params)
    found = []
    for _ in range(2):
        _, state = jax.jit(tx.update)(grads, state)
        found += [np.asarray(x.codes) for x in coded_arrays(state)]
    for i, one in enumerate(found):
        assert all((one != other).any() for other in found[:i])


def test_each_step_inside_a_projection_is_rounded_by_its_own_key():
    params = {"a": jnp.zeros((64, 128))}
    grads = {"a": jax.random.normal(jax.random.key(0), (64, 128))}
    inner = optax.scale_by_rms(decay=0.0)  # nu is the newest square
    tx = natgalore.quantized(natgalore.project(32, inner, refresh_every=10))
    state = tx.init(params)
    found = []
    for _ in range(3):  # one with a refresh, two without
        _, state = jax.jit(tx.update)(grads, state)
        (nu,) = coded_arrays(state)
        found.append(np.asarray(nu.codes))
    for i, one in enumerate(found):
        assert all((one != other).any() for other in found[:i])


@pytest.mark.slow
def test_what_is_not_finite_stays_so_in_adamw_and_out_of_a_projection():
    params = random(0)
    bad = jax.tree.map(lambda g: g.at[..., 3].set(jnp.nan), random(1))
    params, bad = ({"up": x["up"]} for x in (params, bad))
    for name in ("adamw", "galore"):
        tx = natgalore.quantized(OPTIMIZERS[name](1e-2))
        plain = OPTIMIZERS[name](1e-2)

        @jax.jit
        def run(tx=tx, plain=plain):
            states = tx.init(params), plain.init(params)
            for grads in ({"up": random(2)["up"]}, bad, {"up": random(3)["up"]}):
                updates, states = zip(
                    *(o.update(grads, s, params) for o, s in zip((tx, plain), states, strict=True)),
                    strict=True,
                )
            return updates

        mine, exact = run()
        for x, y in zip(*map(jax.tree.leaves, (mine, exact)), strict=True):
            np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        assert bool(np.isnan(mine["up"]["kernel"]).any()) == (name == "adamw")


@pytest.mark.slow
def test_around_and_inside_of_other_wrappers():
    params = {"up": {"kernel": random(0)["up"]["kernel"]}}
    grads = [{"up": {"kernel": random(i)["up"]["kernel"]}} for i in range(4)]
    inject = optax.inject_hyperparams(natgalore.galore, static_args=natgalore.STATIC_ARGS["galore"])
    within = natgalore.quantized(inject(learning_rate=1e-2, rank=32))
    tx = optax.MultiSteps(within, 2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in grads:
        _, state = update(g, state, params)
    assert state.gradient_step == 2
    assert len(coded_arrays(state.inner_opt_state)) == 2
    assert coded_arrays(state) == coded_arrays(state.inner_opt_state)
    assert state.inner_opt_state.inner_state.hyperparams["learning_rate"] == np.float32(1e-2)
    host = natgalore.offload(natgalore.quantized(natgalore.galore(1e-2, 32)), "moments")
    for x in coded_arrays(jax.jit(host.update)(grads[0], host.init(params), params)[1]):
        assert x.codes.sharding.memory_kind == x.scales.sharding.memory_kind == "pinned_host"


def equations(jaxpr, in_loop=False):
    """The equations of a program and of its calls and loops, and whether a loop contains them."""
    for eqn in jaxpr.eqns:
        yield eqn, in_loop
        for inner in jax_core.jaxprs_in_params(eqn.params):
            yield from equations(inner, in_loop or eqn.primitive.name == "while")


def shapes_of_codes(jaxpr, primitive, in_loop):
    """The shapes of the 8-bit operands of each equation of a primitive, if it has any."""
    shapes = [
        [v.aval.shape for v in eqn.invars if v.aval.dtype in (jnp.int8, jnp.uint8)]
        for eqn, within in equations(jaxpr)
        if eqn.primitive.name == primitive and within == in_loop
    ]
    return [x for x in shapes if x]


def decoded_shapes(jaxpr, in_loop):
    return {shape for (shape,) in shapes_of_codes(jaxpr, "convert_element_type", in_loop)}


@pytest.mark.parametrize("refresh", ["passes", *slow("gradient")])
def test_gradients_from_the_backward_pass(refresh):
    """`value_and_grad` leaves the state, on a step without a refresh, as it was."""
    keys = jax.random.split(jax.random.key(1))
    params = {"up": {"kernel": 0.1 * jax.random.normal(keys[0], (128, 256))}}
    x = jax.random.normal(keys[1], (256, 128))
    loss = lambda p: jnp.mean(jnp.tanh(x @ p["up"]["kernel"]) ** 2)
    tx = natgalore.quantized(natgalore.galore(1e-2, 32, refresh_every=2), (*MOMENTS, "basis"))
    gradients = jax.jit(natgalore.value_and_grad(loss, tx, refresh=refresh))
    full = jax.jit(jax.value_and_grad(loss))
    # Moments are decoded within a refresh alone; the basis before it, if a pass is run in any case.
    program = jax.make_jaxpr(gradients)(params, tx.init(params))
    expected = {(128, 32)} if refresh == "passes" else set()
    assert decoded_shapes(program, in_loop=False) == expected
    ours = theirs = tx.init(params)
    for step in range(4):
        (_, grads), after = gradients(params, ours)
        assert jax.tree.structure(after) == jax.tree.structure(ours)
        if step % 2:
            assert all(map(np.array_equal, *map(jax.tree.leaves, (after, ours))))
        mine, ours = jax.jit(tx.update)(grads, after, params)
        expected, theirs = jax.jit(tx.update)(full(params)[1], theirs, params)
    # A refresh rounds what it has turned to nearest before Adam's step does, by up to 3.5 %.
    a, b = mine["up"]["kernel"], expected["up"]["kernel"]
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_one_matrix_is_decoded_at_a_refresh(monkeypatch):
    """In a refresh codes are decoded in the shape of one matrix; in the rest of an update, in
    stages of whole leaves."""
    m, n, r = 128, 192, 32
    params = {f"layers_{i}": {"kernel": jnp.zeros((3, m, n))} for i in "abcd"}
    params["up"] = {"kernel": jnp.zeros((m, n))}
    plain = natgalore.galore(1e-2, r, refresh_every=5)
    tx = natgalore.quantized(plain, (*MOMENTS, "basis"))
    state = tx.init(params)
    assert len(coded_arrays(state)) == 3 * 5

    def program():  # of a new function, so that it is traced again
        return jax.make_jaxpr(jax.jit(lambda *trees: tx.update(*trees)))(params, state, params)

    barriers = lambda program: shapes_of_codes(program, "optimization_barrier", in_loop=False)
    at_once = program()
    assert decoded_shapes(at_once, in_loop=True) == {(m, r), (r, n)}
    # Bases for the projection and moments for Adam.
    leaves = {(3, m, r), (m, r), (3, r, n), (r, n)}
    assert decoded_shapes(at_once, in_loop=False) == leaves
    assert not barriers(at_once)
    monkeypatch.setattr(staged_update, "LEAST", 1000)
    staged = program()
    assert decoded_shapes(staged, in_loop=True) == {(m, r), (r, n)}
    # One stage a leaf: a barrier has the moments of two leaves, the last those of `up`.
    stack, matrix = 2 * [(3, r, n)], 2 * [(r, n)]
    assert barriers(staged) == [stack + stack, stack + stack, stack + stack, matrix + stack]


def test_memory_report_counts_codes_and_scales():
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}}
    galore = natgalore.galore(1.0, rank=16)
    methods = {"galore": galore, "quantized": natgalore.quantized(galore)}
    report = natgalore.memory_report(params, methods)
    moments = 2 * 16 * 256
    saved = 4 * moments - (moments + 4 * moments // 32)
    assert report.projected["galore"] - report.projected["quantized"] == saved
    assert report.total["galore"] - report.total["quantized"] == saved - 2 * 4  # and the key
    adamw = natgalore.memory_report(params, {"a": natgalore.quantized(optax.adamw(1.0)), **methods})
    assert adamw.projected["a"] == 2 * 64 * 256 + 2 * 2 * 64 * 8  # scales are bfloat16, as it is


class Memory(NamedTuple):
    weights: object


def test_refusals():
    params = {"up": {"kernel": jnp.zeros((64, 128))}}
    adam = optax.scale_by_adam()
    roles = "'linear', 'full', 'square', 'basis', 'fisher', 'root'"
    with pytest.raises(ValueError, match=rf"^`roles` must be one of {roles}, got 'gram'.$"):
        natgalore.quantized(adam, ["linear", "gram"])
    unchecked = getattr(natgalore.quantized, "__wrapped__", natgalore.quantized)
    for name in ("roles", "stochastic"):
        with pytest.raises(TypeError, match=rf"^`{name}` must be names of roles, .* got 8.$"):
            unchecked(adam, **{name: 8})
    for role in ("basis", "fisher"):
        one_of = f"must be one of 'linear', 'full', 'square', got '{role}'"
        with pytest.raises(ValueError, match=rf"^`stochastic` {one_of}.$"):
            natgalore.quantized(adam, stochastic=role)
    with pytest.raises(ValueError, match=r"^`seed` must be in"):
        natgalore.quantized(adam, seed=-1)
    inside = natgalore.chain(natgalore.project(16), natgalore.quantized(adam))
    with pytest.raises(ValueError, match=r"^`quantized` goes around `natgalore.project`, not into"):
        inside.init(params)
    with pytest.raises(ValueError, match=r"^`tx` is quantized already: give `quantized` the"):
        natgalore.quantized(natgalore.quantized(adam)).init(params)
    own = optax.GradientTransformation(Memory, lambda g, state, params=None: (g, state))
    with pytest.warns(UserWarning, match=r"^`quantized` does not encode Memory.weights: declare"):
        state = natgalore.quantized(own).init(params)
    assert not coded_arrays(state)
    with warnings.catch_warnings(action="error"):
        natgalore.quantized(own).init({"up": jnp.zeros((31, 128))})  # small


# --- Meshes ---------------------------------------------------------------------------------------

LIES = {"up": {"kernel": P("fsdp", "tensor")}, "down": {"kernel": P(None, "fsdp", "tensor")}}
LIES |= {"bias": P(), "frozen": None}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *slow(("adamw", AxisType.Explicit)),
        ("galore", AxisType.Explicit),
        *slow(("adamw", AxisType.Auto), ("galore", AxisType.Auto)),
    ],
)
def test_sharded_as_the_arrays_are(name, kind, monkeypatch):
    """And updated in stages, as on one device all at once."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))
    on_mesh = jax.tree.map(lambda spec: NamedSharding(mesh, spec), LIES)
    plain = OPTIMIZERS[name](1e-2)
    tx = natgalore.sharded(natgalore.quantized(plain), on_mesh)
    alone = natgalore.quantized(plain)
    params, grads = random(0), random(1)
    _, expected = jax.jit(alone.update)(grads, alone.init(params), params)
    monkeypatch.setattr(staged_update, "LEAST", 1)
    with jax.set_mesh(mesh):
        params, grads = (jax.device_put(x, on_mesh) for x in (params, grads))
        told = natgalore.state_shardings(tx, params, on_mesh)
        state = jax.jit(tx.init)(params)
        _, after = jax.jit(tx.update)(grads, state, params)
    for x, y, s in zip(*map(jax.tree.leaves, (state, after, told)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim), (x.shape, x.sharding.spec, s.spec)
        assert y.sharding.is_equivalent_to(s, y.ndim), (y.shape, y.sharding.spec, s.spec)
    exact = natgalore.state_shardings(plain, params, on_mesh)
    array = lambda x: x.codes if is_quantized(x) else x
    codes = jax.tree.map(array, told.inner_state, is_leaf=is_quantized)
    assert jax.tree.leaves(codes) == jax.tree.leaves(exact)  # lie as the arrays do
    for x, y in zip(coded_arrays(told), coded_arrays(after), strict=True):
        # Where a mesh axis cannot share the blocks, it divides another axis of the scales.
        parts = lambda sharding, part: part.size // math.prod(sharding.shard_shape(part.shape))
        assert parts(x.scales, y.scales) == parts(x.codes, y.codes)
    # Sums in another order move a number near a border to the next cell, 7 % off, and few are.
    for x, y in zip(*map(coded_arrays, (after, expected)), strict=True):
        assert np.mean(np.asarray(x.codes) != np.asarray(y.codes)) < 0.01
        np.testing.assert_allclose(x.scales, y.scales, rtol=1e-4)


@pytest.mark.slow
def test_scales_of_few_blocks_are_divided_by_rows():
    mesh = jax.make_mesh((8,), ("fsdp",))
    lies = NamedSharding(mesh, P(None, "fsdp"))
    tx = natgalore.quantized(optax.adamw(1e-2))
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((128, 96)), lies)
        (mu, nu) = coded_arrays(natgalore.state_shardings(tx, params, lies))
        state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)[1]
    assert mu == nu == QuantizedArray(lies, NamedSharding(mesh, P("fsdp")))
    for x in coded_arrays(state):
        assert x.codes.sharding.is_equivalent_to(lies, 2)
        assert x.scales.shape == (128, 2)
        assert x.scales.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp")), 2)
