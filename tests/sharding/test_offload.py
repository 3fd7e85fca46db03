"""State in host memory: equal steps, and the chosen arrays on the host between them."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore


WEIGHTS = {"up": (32, 48), "embed": (16, 32), "norm": (32,)}
MOMENTS = {"mu", "nu"}
ON_HOST = {
    "window": {"window"},
    "moments": MOMENTS,
    "all": {"window", "basis", "gram"} | MOMENTS,
}


def weights(key):
    keys = jax.random.split(key, len(WEIGHTS))
    return {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, WEIGHTS.items(), strict=True)
    }


def optimizer(**settings):
    settings = {"fisher": "window", "residual": None} | settings
    return natgalore.natural_galore(1e-2, 5, refresh_every=2, **settings)


def on_host(state):
    """The names of the fields with an array in host memory."""
    names = set()
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if x.sharding.memory_kind == "pinned_host":
            names |= {key.name for key in path if getattr(key, "name", "") not in ("", "value")}
    return names - {"inner_state"}


def steps(tx, params, gradients, update):
    state = tx.init(params)
    for g in gradients:
        before = [x.sharding.memory_kind for x in jax.tree.leaves(state)]
        updates, state = update(g, state, params)
        assert [x.sharding.memory_kind for x in jax.tree.leaves(state)] == before
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("what", ON_HOST)
def test_offloaded_state_gives_equal_steps(what, key):
    params, *gradients = [weights(k) for k in jax.random.split(key, 5)]
    tx = optimizer()
    expected, expected_state = steps(tx, params, gradients, jax.jit(tx.update))
    offloaded = natgalore.offload(tx, what)
    actual, state = steps(offloaded, params, gradients, jax.jit(offloaded.update))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (actual, expected))))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (state, expected_state))))
    assert on_host(state) == ON_HOST[what]
    kinds = {x.ndim for x in jax.tree.leaves(state) if x.sharding.memory_kind == "pinned_host"}
    assert kinds <= {2, 3}  # vectors and scalars stay on the device


@pytest.mark.slow
def test_donated_host_arrays_are_reused(key):
    params, *gradients = [weights(k) for k in jax.random.split(key, 5)]
    expected, _ = steps(optimizer(), params, gradients, jax.jit(optimizer().update))
    tx = natgalore.offload(optimizer())
    device = NamedSharding(jax.make_mesh((1,), ("data",)), P(), memory_kind="device")
    shardings = jax.tree.map(lambda _: device, params)
    of_state = natgalore.state_shardings(tx, params, shardings)
    update = jax.jit(tx.update, donate_argnums=1, out_shardings=(shardings, of_state))
    params, *gradients = [jax.device_put(x, device) for x in (params, *gradients)]
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    for g in gradients:
        before, (updates, state) = state, update(g, state, params)
        assert all(x.is_deleted() for x in jax.tree.leaves(before) if x.ndim > 1)
        params = optax.apply_updates(params, updates)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (params, expected))))


def test_offload_of_plain_optax(key):
    params = weights(key)
    tx = natgalore.offload(optax.adamw(1e-2), "moments")
    assert on_host(tx.init(params)) == MOMENTS
    with pytest.raises(ValueError, match="`what` must be one of 'all', 'moments', 'window', got"):
        natgalore.offload(optax.adamw(1e-2), "basis")


@pytest.mark.parametrize(
    "kind",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)],
    ids=["Auto", "Explicit"],
)
def test_offload_of_sharded_state(kind, key):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    partitions = {"up": P("fsdp", "tensor"), "embed": P("fsdp"), "norm": P()}
    on_mesh = {name: NamedSharding(mesh, spec) for name, spec in partitions.items()}
    params, *gradients = [weights(k) for k in jax.random.split(key, 4)]
    expected, _ = steps(optimizer(), params, gradients, jax.jit(optimizer().update))
    tx = natgalore.offload(natgalore.sharded(optimizer(), on_mesh))
    with jax.set_mesh(mesh):
        params, *gradients = [jax.device_put(x, on_mesh) for x in (params, *gradients)]
        actual, state = steps(tx, params, gradients, jax.jit(tx.update))
        of_state = natgalore.state_shardings(tx, params, on_mesh)
        initial = jax.jit(tx.init, out_shardings=of_state)(params)
    for x, y, s in zip(*map(jax.tree.leaves, (state, initial, of_state)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
        assert y.sharding.memory_kind == x.sharding.memory_kind == s.memory_kind, x.shape
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert np.allclose(
            a, b, rtol=1e-5, atol=1e-5
        )  # sums in another order, see test_state_shardings
    everything = natgalore.state_shardings(tx, params, on_mesh, memory_kind="pinned_host")
    assert {s.memory_kind for s in jax.tree.leaves(everything)} == {"pinned_host"}
