"""The schedule of refreshes against Python integers; compilations of an update outside `jit`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from benchmarks.speed.bench_trace import eager_compilations
from natgalore_jax.subspace.basis import METHODS
from natgalore_jax.subspace.refresh import Refresh, phase
from natgalore_jax.subspace.state import subspace_states
from natgalore_jax.tree.cores import cores
from natgalore_jax.tree.leaf_spec import LeafSpec
from tests.helpers.cases import slow
from tests.oracle import oracles


@pytest.mark.parametrize("refresh_every", [1, 7, 200, 21_500_000, 2**31 - 1])
@pytest.mark.parametrize("total", [1, 3, 168, 5000])
def test_phases_are_exact_up_to_the_largest_period(refresh_every, total):
    index = np.arange(total)
    expected = [oracles.phase(int(i), refresh_every, total, stagger=True) for i in index]
    assert phase(index, refresh_every, total, stagger=True).tolist() == expected
    assert 0 <= min(expected) <= max(expected) < refresh_every


@pytest.mark.parametrize("refresh_every", [7, 30_000_000, 2**31 - 1])
def test_every_matrix_is_due_at_its_phase_of_every_period(refresh_every):
    total = 150
    spec = LeafSpec((), (total, 8, 8), batch=(0,), rows=(1,), cols=(2,), rank=2)
    refresh = Refresh(refresh_every, METHODS["power"], None, stagger=True, seed=0)
    ones = jnp.ones(total)
    phases = np.array([oracles.phase(i, refresh_every, total, True) for i in range(total)])
    for step in sorted({*phases.tolist(), refresh_every - 1}):
        due = refresh.due(spec, ones, ones.astype(jnp.int32), jnp.int32(step), total)
        np.testing.assert_array_equal(due, phases == step)


def test_third_update_outside_jit_compiles_nothing():
    """Leaf functions and inner are jitted once: fresh closures would compile on every step."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {f"layer_{i}": {"kernel": jax.random.normal(k, (17, 29))} for i, k in enumerate(keys)}
    tx = natgalore.natural_galore(1e-3, 4, refresh_every=3)
    first, _, third = eager_compilations(tx, params)
    assert first > 0
    assert third == 0


def draw(i):
    keys = jax.random.split(jax.random.key(i), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (2, 8, 12))},
        "b": {"kernel": jax.random.normal(keys[1], (12, 8))},
    }


def trained(tx, flags):
    """The weights and the state after steps with these `refresh_bases`."""
    step = jax.jit(tx.update, static_argnames="refresh_bases")
    weights = draw(100)
    state = tx.init(weights)
    for i, flag in enumerate(flags):
        updates, state = step(draw(i), state, weights, refresh_bases=flag)
        weights = optax.apply_updates(weights, updates)
    return weights, state


CHOSEN = {
    "galore": lambda: natgalore.galore(1e-2, 4, refresh_every=3, stagger=False),
    "core Fisher": lambda: natgalore.natural_galore(
        1e-2, 4, fisher="core", refresh_every=3, stagger=False
    ),
    "8 bits": lambda: natgalore.quantized(
        natgalore.galore(1e-2, 4, refresh_every=3, stagger=False), ("linear", "square", "basis")
    ),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), natgalore.galore(1e-2, 4, refresh_every=3, stagger=False)
    ),
    "partition": lambda: optax.partition(
        {"x": natgalore.galore(1e-2, 4, refresh_every=3, stagger=False)},
        lambda tree: jax.tree.map(lambda _: "x", tree),
    ),
}


@pytest.mark.parametrize("name", ["galore", *slow("core Fisher", "8 bits", "chain", "partition")])
def test_chosen_refreshes_equal_those_of_the_schedule(name):
    chosen = trained(CHOSEN[name](), [i % 3 == 0 for i in range(8)])
    scheduled = trained(CHOSEN[name](), [None] * 8)
    # Other programs round otherwise; Adam divides small differences.
    tolerance = {"atol": 2e-3 if name == "8 bits" else 1e-5}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance), *[chosen[0], scheduled[0]]
    )
    counts = [
        [n.value for state in subspace_states(x[1]) for n in cores(state.refreshed)]
        for x in (chosen, scheduled)
    ]
    assert [n.tolist() for n in counts[0]] == [[3, 3], 3]
    jax.tree.map(np.testing.assert_array_equal, *counts)


def test_a_program_without_refreshes_has_no_condition():
    tx = CHOSEN["galore"]()
    state = tx.init(draw(0))
    update = jax.jit(tx.update, static_argnames="refresh_bases")
    text = {
        x: update.lower(draw(0), state, draw(0), refresh_bases=x).as_text() for x in (None, False)
    }
    assert "stablehlo.while" in text[None]
    for name in ("stablehlo.while", "stablehlo.case", "stablehlo.if", "geqrf"):
        assert name not in text[False]


def test_a_matrix_without_gradient_keeps_its_basis():
    """Also if all are due: a basis of zeros or NaN would be one of rounding."""
    tx = CHOSEN["galore"]()
    weights = draw(0)
    state = tx.init(weights)
    grads = draw(1)
    grads["a"]["kernel"] = grads["a"]["kernel"].at[0].set(0.0).at[1].set(jnp.nan)
    _, state = tx.update(grads, state, weights, refresh_bases=True)
    (subspace,) = subspace_states(state)
    assert [n.value.tolist() for n in cores(subspace.refreshed)] == [[0, 0], 1]
    assert [n.value.tolist() for n in cores(subspace.skipped)] == [[0, 1], 0]


def test_refresh_bases_is_static():
    tx = CHOSEN["galore"]()
    weights = draw(0)
    state = tx.init(weights)
    with pytest.raises(TypeError, match="`refresh_bases` must be True, False or None"):
        jax.jit(tx.update)(weights, state, weights, refresh_bases=True)
    with pytest.raises(TypeError, match="got 1"):
        tx.update(weights, state, weights, refresh_bases=1)


def test_true_refreshes_off_the_schedule():
    tx = CHOSEN["galore"]()
    weights = draw(0)
    state = tx.init(weights)
    for _ in range(2):  # by the schedule only the first step would refresh
        _, state = tx.update(weights, state, weights, refresh_bases=np.int32(0) % 50 == 0)
    (subspace,) = subspace_states(state)
    assert [n.value.tolist() for n in cores(subspace.refreshed)] == [[2, 2], 2]


@pytest.mark.slow
def test_refresh_bases_is_for_whole_gradients():
    tx = CHOSEN["galore"]()
    weights = draw(0)
    state = tx.init(weights)
    loss = lambda w: jnp.sum((jnp.ones((3, 12)) @ w["b"]["kernel"]) ** 2)
    (_, grads), state = natgalore.value_and_grad(loss, tx, on_fallback="ignore")(weights, state)
    with pytest.raises(ValueError, match="value_and_grad refreshes the bases of cores"):
        tx.update(grads, state, weights, refresh_bases=False)
