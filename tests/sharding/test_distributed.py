"""`over_layers`: a stack's layers one by one, as on TPUs, equal the stack at once.

The programs that XLA:TPU makes of it are in `tests/integration/test_tpu_compiler.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from natgalore_jax.sharding import distributed
from natgalore_jax.sharding.distributed import over_layers
from natgalore_jax.sharding.partitioning import LeafPartition
from natgalore_jax.subspace import projection
from natgalore_jax.tree.leaf_spec import LeafSpec
from tests.helpers.cases import slow


NOWHERE = LeafPartition(None, P())
STACKS = {
    "layers": LeafSpec((), (3, 4, 6), (0,), (1,), (2,), rank=2),
    "transposed": LeafSpec((), (3, 6, 4), (0,), (2,), (1,), rank=2),
    "layers second": LeafSpec((), (4, 3, 6), (1,), (0,), (2,), rank=2),
    "layers and experts": LeafSpec((), (3, 2, 4, 6), (0, 1), (2,), (3,), rank=2),
    "experts before layers": LeafSpec((), (2, 4, 3, 6), (2, 0), (1,), (3,), rank=2),
    "rows of two axes": LeafSpec((), (2, 3, 2, 6), (1,), (0, 2), (3,), rank=2),
    "blocks": LeafSpec((), (4, 18), (1,), (0,), (2,), rank=2, split=(4, 3, 6)),
}


@pytest.fixture
def on_tpu(monkeypatch):
    """Takes the branch for TPUs, for matrices of any size, and traces anew."""
    branch = lambda *args, tpu, default: tpu(*args)
    monkeypatch.setattr(distributed, "by_platform", branch)
    monkeypatch.setattr(distributed, "LEAST_LAYER", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", STACKS)
def test_over_layers_equals_the_function_of_the_stack(name, on_tpu, key):
    spec, views = STACKS[name], []
    G = jax.random.normal(key, spec.shape)
    P_ = jax.random.normal(key, spec.basis_shape)

    def core(view, leaf, G, P):
        views.append(view)
        return jnp.einsum("...mr,...mn->...rn", P, view.to_view(G))

    R = over_layers(core, spec, NOWHERE, G, P_, full=(True, False))
    assert [len(view.batch) for view in views] == [len(spec.batch) - 1]
    by_numpy = np.einsum("...mr,...mn->...rn", P_, np.asarray(spec.to_view(G)))
    # Sums of 4 or 6 products in float32.
    np.testing.assert_allclose(R, by_numpy, rtol=1e-5, atol=1e-6)
    lift = lambda view, leaf, R, P: P @ R
    full = over_layers(lift, spec, NOWHERE, R, P_, full_result=True)
    np.testing.assert_allclose(full, np.asarray(P_) @ by_numpy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [2, 4])  # the second and last four begin at the third layer
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 2, 4, 3), (2, 4, 6, 3)])
def test_over_layers_takes_several_layers_at_once(shape, at_once, on_tpu, key):
    batch = tuple(axis for axis in range(len(shape) - 1) if axis != shape.index(4))
    batch = tuple(sorted(batch, key=lambda axis: -shape[axis]))  # the six layers first
    spec = LeafSpec((), shape, batch, (shape.index(4),), (len(shape) - 1,), rank=2)
    G, seen = jax.random.normal(key, shape), []

    def double(view, leaf, G):
        seen.append((view.batch_shape[0], G.dtype))
        return 2 * view.to_view(G)

    run = functools.partial(over_layers, double, spec, NOWHERE, G, full=(True,), at_once=at_once)
    np.testing.assert_array_equal(run(), 2 * spec.to_view(G))
    np.testing.assert_array_equal(run(full_result=True), 2 * spec.to_view(G))
    kept = run(full_result=True, kept_in=jnp.bfloat16)
    np.testing.assert_array_equal(kept, 2 * spec.to_view(G.astype(jnp.bfloat16).astype(G.dtype)))
    assert kept.dtype == G.dtype
    assert seen == [(at_once, dtype) for dtype in (jnp.float32, jnp.float32, jnp.bfloat16)]


@pytest.mark.parametrize(
    ("partition", "kept"),
    [(P(), P()), (P(None, "x"), P("x")), (P(None, None, "x"), P(None, "x")), (P("x"), None)],
)
def test_layers_keep_the_partition_of_their_axes(partition, kept, on_tpu):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    spec = LeafSpec((), (4, 8, 8), (0,), (1,), (2,), rank=2)
    seen = []
    f = lambda view, leaf, x: seen.append((view, leaf.partition)) or x
    over_layers(f, spec, LeafPartition(mesh, partition), jnp.zeros(spec.shape))
    # Layers that the mesh divides stay together.
    assert seen == [(spec, partition) if kept is None else (spec.layer, kept)]


def test_layers_stay_together_on_a_mesh_that_may_divide_them(on_tpu):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    spec, seen = STACKS["layers"], []
    f = lambda view, leaf, x: seen.append(view) or x
    x = jax.device_put(jnp.zeros(spec.shape), NamedSharding(mesh, P()))
    jax.jit(lambda x: over_layers(f, spec, NOWHERE, x))(x)
    assert seen == [spec]


def test_small_matrices_stay_together(on_tpu, monkeypatch):
    spec, seen = STACKS["layers"], []
    f = lambda view, leaf, x: seen.append(view) or x
    for least in (spec.m * spec.n + 1, spec.m * spec.n):
        monkeypatch.setattr(distributed, "LEAST_LAYER", least)
        over_layers(f, spec, NOWHERE, jnp.zeros(spec.shape))
    assert seen == [spec, spec.layer]


SETTINGS = {
    "whitened": {},
    "none": {"residual": None, "fisher": "core"},
    "both sides, momentum": {"side": "both", "residual_momentum": 0.9},
    "isotropic": {"residual": "isotropic"},
}


@pytest.mark.parametrize("name", ["whitened", *slow("none", "both sides, momentum", "isotropic")])
def test_sharded_updates_layer_by_layer_equal_those_of_stacks(name, key, request, monkeypatch):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    kernels = {
        "up": (P(None, "fsdp", "tensor"), (8, 16, 24)),  # a layer on every fourth device, twice
        "down": (P(None, "tensor"), (3, 24, 16)),  # two layers at a time, one of them twice
    }
    params, shardings = {}, {}
    for i, (leaf, (partition, shape)) in enumerate(kernels.items()):
        sharding = NamedSharding(mesh, partition)
        x = jax.random.normal(jax.random.fold_in(key, i), shape)
        params[leaf] = {"kernel": jax.device_put(x, sharding)}
        shardings[leaf] = {"kernel": sharding}
    grads = jax.tree.map(lambda x: x.at[1].multiply(jnp.nan) + 1, params)

    def two_updates():
        tx = natgalore.natural_galore(1e-2, 6, refresh_every=2, **SETTINGS[name])
        tx = natgalore.sharded(tx, shardings)

        @jax.jit
        def run(params):
            state = tx.init(params)
            for g in (params, grads):
                updates, state = tx.update(g, state, params)
            return updates, state

        return run(params)

    expected = two_updates()
    request.getfixturevalue("on_tpu")
    monkeypatch.setattr(projection, "dtype_on_tpu", lambda: None)  # `polar` is that of CPUs
    # Sums of at most 24 products in another order, through a QR and four orthogonalisations.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, two_updates(), expected)
