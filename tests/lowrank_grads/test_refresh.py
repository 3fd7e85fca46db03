"""Refreshes by passes of low-rank gradients, and by full gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from natgalore_jax.lowrank_grads import value_and_grad as module
from natgalore_jax.tree.cores import core_arrays
from tests.helpers.cases import slow
from tests.helpers.lowrank import (
    OPTIMIZERS,
    PARAMS,
    assert_same_params,
    assert_same_training,
    batches,
    both_ways,
    full_gradients,
    galore,
    natural,
    normal,
    product_shapes,
    projection,
    small_loss,
    subspace_state,
    trained,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all_at_once", "natural", "partition"])
def test_training_with_refresh_by_gradient_equals_that_of_full_gradients(name):
    assert_same_training(*both_ways(OPTIMIZERS[name](), refresh="gradient"))


@pytest.mark.slow
def test_refresh_by_gradient_equals_full_gradients_to_the_bit():
    """With refreshes at each step both sides round alike."""
    ours, full = both_ways(galore(refresh_every=1), refresh="gradient", steps=3)
    chex.assert_trees_all_equal(ours[-1][1], full[-1][1])


@pytest.mark.parametrize("size", [1e-25, *slow(1e25)])
def test_refresh_by_passes_neither_underflows_nor_overflows(size):
    """Gradients whose squares are out of the range of float32."""
    tx = galore(refresh_every=2, stagger=False)
    loss = lambda params, x: size * small_loss(params, x)
    ours = trained(tx, natgalore.value_and_grad(loss, tx, refresh="passes"), steps=3)
    full = trained(tx, full_gradients(loss), steps=3)
    P, P_full = (jax.tree.leaves(subspace_state(seen[-1][1]).basis) for seen in (ours, full))
    for got, want in zip(P, P_full, strict=True):
        assert jnp.isfinite(got).all()
        # Four power iterations: 2e-6 of the products relative to the smallest of them.
        np.testing.assert_allclose(got @ got.mT, want @ want.mT, atol=1e-3)


def test_refresh_by_passes_shifts_in_units_of_the_gradient():
    """The shift of a power iteration is in units of squared gradients."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (12, 20))
    C = jnp.asarray(U @ np.diag([1, 1e-1, 1e-4]) @ V.T, jnp.float32)  # the gradient at x = I
    loss = lambda params, x: jnp.sum((x @ params["kernel"]) * C)
    params, tx = {"kernel": jnp.zeros((12, 20))}, projection()
    spanned = []
    for refresh in ("passes", "gradient"):
        gradients = jax.jit(natgalore.value_and_grad(loss, tx, refresh=refresh))
        _, state = gradients(params, tx.init(params), jnp.eye(12))
        P = np.asarray(state.basis["kernel"].value)
        spanned.append(P @ P.T)
    # 1e-8 beside a shift of 1e-6, and rounding of 1e-7 an iteration: 0.02 seen, 0.4 in other units.
    np.testing.assert_allclose(*spanned, atol=0.1)


def test_staggered_refresh_by_passes_updates_due_matrices_only():
    tx = galore(refresh_every=8)
    ours, full = both_ways(tx, refresh="passes", steps=12)
    assert_same_training(ours, full)
    times = lambda seen: [subspace_state(state).refreshed for _, state in seen]
    chex.assert_trees_all_equal(times(ours), times(full))
    assert {int(n) for n in core_arrays(times(ours)[-2])[0]} == {2, 3}


@pytest.mark.parametrize("refresh", ["passes", *slow("gradient")])
def test_first_finite_gradient_brings_a_basis_between_refreshes(refresh):
    """The first finite gradient comes between two scheduled refreshes."""
    tx = galore(refresh_every=50, stagger=False)
    batch = [jnp.full((8, 12), jnp.nan), *batches(3)]
    ours, full = both_ways(tx, refresh=refresh, params=PARAMS, batch=batch)
    assert_same_training(ours, full)
    counts = [core_arrays(subspace_state(s).refreshed)[1] for _, s in ours]
    assert [int(n) for n in counts] == [0, 1, 1, 1]


def test_random_bases_have_distinct_keys():
    tx = galore(basis="random", transport="reset", refresh_every=1, stagger=False)
    ours, full = both_ways(tx, steps=3)
    assert_same_training(ours, full)
    keys = [jax.tree.leaves(subspace_state(s).basis)[0] for _, s in ours]
    assert len({tuple(np.asarray(key).ravel().tolist()) for key in keys}) == 3


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"stagger": False}, True),
        ({"refresh_every": 4}, True),  # four groups at most
        ({"refresh_every": 5}, False),
        ({"stagger": False, "side": "both"}, False),
        ({"stagger": False, "basis": "svd"}, False),
    ],
)
def test_settings_that_refresh_by_passes(settings, passes, monkeypatch):
    called = []
    for name in ("refreshed_by_passes", "refreshed_from_gradients"):
        refreshed = getattr(module, name)
        spy = lambda *args, name=name, f=refreshed: called.append(name) or f(*args)
        monkeypatch.setattr(module, name, spy)
    params = {f"layer_{i}": {"kernel": normal(i, 12, 12)} for i in range(6)}
    loss = lambda params, x: sum(jnp.sum(jnp.sin(x @ w["kernel"])) for w in params.values())
    tx = galore(**settings)
    gradients = natgalore.value_and_grad(loss, tx)
    jax.eval_shape(gradients, params, tx.init(params), batches(1)[0])
    assert called == ["refreshed_by_passes" if passes else "refreshed_from_gradients"]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_refresh_by_passes_forms_no_full_gradient(micro_batches):
    """Products and sums of the step have at most r x n or r x m entries a matrix."""
    tx = natural(stagger=False)
    gradients = natgalore.value_and_grad(small_loss, tx, micro_batches=micro_batches)
    x = batches(1)[0]
    x = x if micro_batches == 1 else x.reshape(micro_batches, -1, 12)
    full = {"12,12", "12,20", "20,12", "3,12,12", "1,12,12"}
    shapes = product_shapes(lambda *args: gradients(*args)[0][1], PARAMS, tx.init(PARAMS), x)
    assert not full & shapes
    assert {"3,12", "3,20"} & shapes
    by_gradient = natgalore.value_and_grad(small_loss, tx, refresh="gradient")
    x = batches(1)[0]
    assert full & product_shapes(lambda *args: by_gradient(*args)[0][1], PARAMS, tx.init(PARAMS), x)


def test_sharded_layers_refresh_without_moving_their_state():
    """With layers sharded over devices and `natgalore.sharded`, states stay on their devices."""
    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    shardings = {k: {} for k in ("embed", "layers", "out")}
    shardings["embed"]["bias"] = shardings["out"]["kernel"] = NamedSharding(mesh, PartitionSpec())
    shardings["layers"]["kernel"] = NamedSharding(mesh, PartitionSpec("d"))
    params = jax.tree.map(jax.device_put, {k: PARAMS[k] for k in shardings}, shardings)
    tx = natgalore.sharded(galore(stagger=False), shardings)
    gradients = natgalore.value_and_grad(small_loss, tx)
    full = trained(galore(stagger=False), full_gradients(), steps=6)
    assert_same_params(trained(tx, gradients, params=params, steps=6), full)
    step = jax.jit(lambda *args: gradients(*args)[1])
    text = step.lower(params, tx.init(params), batches(1)[0]).compile().as_text()
    gathered = [
        line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line
    ]
    # Each pass scans over the layers, weights and bases; moments and counts are not gathered.
    assert sum("f32[3,12,3]" in line for line in gathered) == 3
    assert not [line for line in gathered if "f32[3,3,12]" in line or "s32[3]" in line]
