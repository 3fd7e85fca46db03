"""Rounded sums are bfloat16 neighbours of the exact sums, with the exact mean."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from natgalore_jax.quantization.stochastic_rounding import neighbour


KEYS = jax.random.split(jax.random.key(0), 4096)
numbers = st.builds(
    lambda size, power, sign: np.float32(sign * size * 2.0**power),
    st.floats(1, 2, width=32),
    st.integers(-100, 100),
    st.sampled_from([-1, 1]),
)


def neighbours(x):
    """The bfloat16 numbers below and above x, by NumPy's rounding."""
    near = np.asarray(x, np.float64).astype(ml_dtypes.bfloat16)
    other = np.nextafter(near, np.where(near > x, -np.inf, np.inf).astype(near.dtype))
    pair = np.sort(np.stack([near, other]).astype(np.float64), axis=0)
    return np.where(near.astype(np.float64) == x, near.astype(np.float64), pair)


@settings(max_examples=40, deadline=None)
@given(numbers)
def test_probability_of_each_neighbour(x):
    drawn = np.asarray(jax.vmap(neighbour, (None, 0))(jnp.asarray(x), KEYS), np.float64)
    below, above = neighbours(np.float64(x))
    assert set(drawn) <= {below, above}
    gap = above - below
    probability = (x - below) / gap if gap else 0.0
    # Five standard deviations of a mean of 4096 draws; hypothesis tries 40 numbers.
    tolerance = 5 * np.sqrt(probability * (1 - probability) / len(KEYS)) + 1e-9
    assert abs(np.mean(drawn == above) * (gap > 0) - probability) <= tolerance


def test_bfloat16_numbers_and_nonfinite_numbers_are_unchanged():
    x = jnp.array([0.0, -0.0, 1.5, -(2.0**-120), jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(neighbour(x, jax.random.key(1)), x)
    last = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # the largest NaNs
    assert np.all(np.isnan(jax.vmap(neighbour, (None, 0))(jnp.asarray(last), KEYS[:64])))


def weights(dtype=jnp.bfloat16):
    normal = np.random.default_rng(0).normal(size=(64, 256))
    return {"up": jnp.asarray(normal, dtype), "norm": jnp.ones(256, jnp.float32), "none": None}


def stepped(tx, params, grads, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_small_updates_accumulate():
    """100 steps of 2e-4 of the weight; with rounding to nearest none changes it."""
    params, rate = weights(), 2e-4
    rounding = optax.chain(optax.sgd(rate), natgalore.stochastic_rounding())
    stochastic = stepped(rounding, params, params, 100)[0]["up"]
    nearest = stepped(optax.sgd(rate), params, params, 100)[0]["up"]
    initial = np.asarray(params["up"], np.float64)
    assert np.array_equal(np.asarray(nearest), np.asarray(params["up"]))
    change = np.sum(initial * (np.asarray(stochastic, np.float64) - initial)) / np.sum(initial**2)
    # The gradient is the initial weight: 100 steps of 2e-4. The noise of a step is at most 2^-8 of
    # a weight, and over 100 steps and 16384 weights 2^-8 * 10 / 128 = 3e-4.
    assert change == pytest.approx(-100 * rate, abs=5e-4)


def test_updated_weight_is_a_neighbour_of_the_sum():
    """For updates and weights of all magnitudes, applied by Optax."""
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=4096) * 10.0 ** rng.integers(-8, 8, 4096), jnp.bfloat16)
    u = jnp.asarray(rng.normal(size=4096) * 10.0 ** rng.integers(-8, 8, 4096), jnp.bfloat16)
    tx = natgalore.stochastic_rounding(3)
    updates, _ = tx.update(u, tx.init(w), w)
    assert updates.dtype == jnp.float32
    result = np.asarray(optax.apply_updates(w, updates), np.float64)
    below, above = neighbours(np.asarray(w, np.float32) + np.asarray(u, np.float32))
    assert np.all((result == below) | (result == above))


def test_zero_updates_and_other_dtypes_are_unchanged():
    params = weights()
    tx = natgalore.stochastic_rounding()
    grads = {"up": jnp.zeros_like(params["up"]), "norm": jnp.full(256, 1e-9), "none": None}
    updates, state = tx.update(grads, tx.init(params), params)
    assert not np.any(updates["up"])
    assert updates["norm"] is grads["norm"]
    assert updates["none"] is None
    assert not np.array_equal(state.key, tx.init(params).key)


def test_random_numbers_differ_between_steps_leaves_and_seeds():
    params = {"a": jnp.ones(512, jnp.bfloat16), "b": jnp.ones(512, jnp.bfloat16)}
    grads = jax.tree.map(lambda w: w * jnp.bfloat16(2.0**-9), params)
    draws = []
    for seed in (0, 1):
        tx = natgalore.stochastic_rounding(seed)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            draws += [np.asarray(updates[name]).tobytes() for name in params]
    assert len(set(draws)) == 8


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_rounding_equals_one_device(axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type, axis_type))
    params = {name: w for name, w in weights().items() if w is not None}
    tx = optax.chain(optax.sgd(1e-3), natgalore.stochastic_rounding())
    expected, state = stepped(tx, params, params, 2)
    shardings = {"up": NamedSharding(mesh, P("a", "b")), "norm": NamedSharding(mesh, P())}
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        sharded, sharded_state = stepped(tx, placed, placed, 2)
    assert sharded["up"].sharding.is_equivalent_to(shardings["up"], 2)
    np.testing.assert_array_equal(np.asarray(sharded["up"]), np.asarray(expected["up"]))
    np.testing.assert_array_equal(np.asarray(sharded_state[-1].key), np.asarray(state[-1].key))


def test_nnx_optimizer_with_a_projection():
    model = nnx.Linear(64, 256, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tx = optax.chain(natgalore.galore(1e-3, rank=8), natgalore.stochastic_rounding())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((4, 64))) ** 2))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    assert model.kernel.dtype == jnp.bfloat16
    assert np.mean(np.asarray(model.kernel[...]) != before) > 0.1


def test_errors():
    tx, params = natgalore.stochastic_rounding(), {"kernel": jnp.ones((16, 64), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"must follow `natgalore.project`, not be inside"):
        natgalore.project(4, tx).init(params)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="`seed` must be in"):
        natgalore.stochastic_rounding(-1)
