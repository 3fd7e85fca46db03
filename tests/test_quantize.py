"""State in 8 bits: the code against its table, and optimizers that keep their state in it."""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from natgalore_jax.codes import (
    LINEAR,
    SQUARE,
    Coded,
    block_size,
    coded,
    decode,
    decoded,
    encode,
    is_coded,
    recoded,
)

from .oracles import dynamic_code


CODES = {"linear": LINEAR, "square": SQUARE}
# Magnitudes by how many steps above 0 they are, and the integers that stand for them.
VALUES = {"linear": dynamic_code(7), "square": dynamic_code(8)}
INTEGERS = {"linear": np.arange(128), "square": np.array([0, *range(2, 256)])}
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
    assert [len(x) for x in VALUES.values()] == [128, 255]
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
    # Where two are as near, to the few roundings of float32 in y/unit + 16·2^e, either will do.
    assert (np.abs(found - y) <= nearest + 2**-21 * y).all()


@each_code
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([16, 43, 128]), exponents(-30, 30))
def test_errors_are_half_a_gap_of_the_block(name, seed, block, size):
    rng = np.random.default_rng(seed)
    x = (size * rng.normal(size=(3, 4 * block)) * 10 ** rng.normal(size=(3, 4 * block))).astype("f")
    x = np.abs(x) if name == "square" else x
    with np.errstate(under="ignore"):
        x = np.where(np.abs(x) < 1e-37, 0, x).astype("f")
    codes, scales = encode(CODES[name], jnp.asarray(x), block)
    assert codes.dtype == (jnp.uint8 if name == "square" else jnp.int8)
    np.testing.assert_array_equal(scales, np.abs(x).reshape(3, 4, block).max(axis=-1))
    back = np.float64(decode(codes, scales))
    assert (np.sign(back) == np.sign(x))[np.abs(x) >= 1e-12 * np.abs(x).max()].all() or (
        name == "linear"
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

    A magnitude from half the first value on becomes that value. Of √v the largest share is lost
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
    "natural_galore": functools.partial(natgalore.natural_galore, rank=32, refresh_every=10),
    "random, isotropic": functools.partial(
        natgalore.galore, rank=32, basis="random", residual="isotropic", refresh_every=10
    ),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def coded_arrays(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_coded) if is_coded(x)]


@each
def test_the_state_is_that_of_the_optimizer_with_moments_in_8_bits(name):
    tx = OPTIMIZERS[name](1e-2)
    params = random(0)
    plain, state = tx.init(params), natgalore.quantized(tx).init(params)
    back = decoded(state.inner_state)
    assert jax.tree.structure(back) == jax.tree.structure(plain)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (back, plain))))
    arrays = coded_arrays(state)
    assert len(arrays) == 4  # mu and nu of two leaves; the bias is small
    assert sorted(x.codes.dtype.name for x in arrays) == 2 * ["int8"] + 2 * ["uint8"]
    abstract = jax.eval_shape(natgalore.quantized(tx).init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


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


def run(tx, steps=150, lr_steps=None):
    """Least squares of a product of two matrices; the losses."""
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
    (params, state), losses = train((params, tx.init(params)))
    return params, state, losses


@pytest.mark.parametrize(
    ("name", "roles"),
    [("adamw", MOMENTS), ("galore", MOMENTS), ("natural_galore", {*MOMENTS, "basis"})],
)
def test_trains_as_in_float32(name, roles):
    tx = OPTIMIZERS[name](3e-3)
    _, _, losses = run(tx)
    _, state, mine = run(natgalore.quantized(tx, roles))
    assert coded_arrays(state)
    # A code's error is at most 3.5 % of what it stands for in its first decade, and independent
    # from number to number: a step differs by a few percent of its length, in no direction, and
    # 150 of them by as much in the loss's logarithm.
    np.testing.assert_allclose(np.log(mine[10::20]), np.log(losses[10::20]), atol=0.08)
    assert mine[-1] < 0.1 * mine[0]
