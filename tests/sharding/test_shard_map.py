"""Steps inside `jax.shard_map` equal those on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from tests.sharding.test_state_shardings import KINDS, OPTIMIZERS, train, types


DEVICES = 4
# Sums in another order, through a refresh and an inverse root: 1e-3 of an update of 1e-2.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def natural_galore(**settings):
    settings = {"fisher": "core", "residual": None} | settings
    return natgalore.natural_galore(1e-2, 3, refresh_every=2, weight_decay=0.1, **settings)


def weights(seed, *first):
    """Weights of one model, or of several models along the axes `first`."""
    rng = np.random.default_rng(seed)
    shapes = {"layers": (2, 8, 12), "norm": (12,)}
    return {name: rng.normal(size=(*first, *s)).astype("float32") for name, s in shapes.items()}


def make_mesh(kind):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def put(tree, mesh, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def assert_close(actual, expected):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def one(tree):
    return jax.tree.map(lambda x: x[0], tree)


def many(tree):
    return jax.tree.map(lambda x: x[None], tree)


def reducing(tx):
    """`tx` whose update first averages the gradients over devices."""

    def update(updates, state, params):
        mean = jax.lax.pmean(one(updates), "data")
        return tx.update(mean, state, params)

    return optax.GradientTransformation(tx.init, update)


def mapped(tx, mesh, **settings):
    """`tx` whose update runs per device, with its own gradients and shared params and state."""
    specs = {"in_specs": (P("data"), P(), P()), "out_specs": P()}
    update = jax.shard_map(tx.update, mesh=mesh, **specs, **settings)
    return optax.GradientTransformation(tx.init, update)


GRADIENTS = [weights(seed, DEVICES) for seed in range(1, 6)]  # through two refreshes


@functools.cache
def on_one_device(name):
    means = [jax.tree.map(lambda x: x.mean(axis=0), g) for g in GRADIENTS]
    return train(weights(0), means, natural_galore(**OPTIMIZERS[name]))[0]


def data_parallel(name, kind, jitted=True, **settings):
    mesh = make_mesh(kind)
    tx = mapped(reducing(natural_galore(**OPTIMIZERS[name])), mesh, **settings)
    gradients = [put(g, mesh, P("data")) for g in GRADIENTS]
    actual, _ = train(put(weights(0), mesh, P()), gradients, tx, jitted)
    assert_close(actual, on_one_device(name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reduced_gradients_equal_one_device(kind):
    data_parallel("core", kind)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_optimizers_equal_one_device(name, kind, check_vma):
    data_parallel(name, kind, check_vma=check_vma)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_eager_steps_equal_one_device(kind):
    data_parallel("core", kind, jitted=False)


@pytest.mark.parametrize("leaf", ["layers", "norm"])
def test_unreduced_gradients_are_refused(leaf):
    tx, params = natural_galore(), weights(0)
    mesh = jax.make_mesh((2, 2), ("data", "expert"))

    def update(g, params):
        g = one(g)
        mean = jax.lax.pmean(g, ("data", "expert"))
        return tx.update({**mean, leaf: g[leaf]}, tx.init(params), params)

    step = functools.partial(jax.shard_map, update, mesh=mesh, out_specs=P())
    specs = (P(("data", "expert")), P())
    g, params = put(weights(1, DEVICES), mesh, specs[0]), put(params, mesh, P())
    with pytest.raises(
        ValueError,
        match=rf"^the gradient of `{leaf}` differs between devices along 'data', 'expert' and its "
        r"state does not: reduce the gradients first \(jax\.lax\.pmean\)\.",
    ):
        jax.eval_shape(step(in_specs=specs), g, params)
    jax.eval_shape(
        step(in_specs=specs, check_vma=False), g, params
    )  # types without axes of variation


def ensemble(tx):
    """`tx` for one model per device; arrays have a leading axis of devices."""
    mesh = make_mesh(AxisType.Explicit)
    on_each = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("data"))
    return optax.GradientTransformation(
        jax.jit(on_each(lambda params: many(tx.init(one(params))), in_specs=P("data"))),
        on_each(lambda *trees: many(tx.update(*map(one, trees))), in_specs=(P("data"),) * 3),
    )


@pytest.mark.parametrize(
    "name", ["core", *[pytest.param(x, marks=pytest.mark.slow) for x in [*OPTIMIZERS][1:]]]
)
def test_one_model_per_device(name):
    tx, mesh = natural_galore(**OPTIMIZERS[name]), make_mesh(AxisType.Explicit)
    params, *gradients = [weights(seed, DEVICES) for seed in range(4)]
    stacked = [put(tree, mesh, P("data")) for tree in (params, *gradients)]
    actual, _ = train(stacked[0], stacked[1:], ensemble(tx))
    for i in range(DEVICES):
        alone = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        expected, _ = train(alone(params), [alone(g) for g in gradients], tx)
        assert_close(alone(jax.device_get(actual)), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_created_inside_varies_as_its_weights(name):
    tx, mesh = natural_galore(**OPTIMIZERS[name]), make_mesh(AxisType.Explicit)

    def step(params):
        state = tx.init(one(params))
        updates, after = tx.update(one(params), state, one(params))
        assert types(after) == types(state)
        return many(updates)

    step = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    jax.eval_shape(step, put(weights(0, DEVICES), mesh, P("data")))


def test_decay_rate_that_varies_between_models():
    """JAX broadcasts the scalar before the cast; the decay is still recognised as scalar."""
    decayed = optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, w: u - jnp.full_like(w, 0.1) * w, updates, params
        )
    )
    tx = ensemble(natgalore.project(3, decayed))
    params = put(weights(0, DEVICES), make_mesh(AxisType.Explicit), P("data"))
    jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)


@pytest.mark.slow
def test_sharded_experts_beside_shared_weights():
    """Experts are sharded manually; shared weights have reduced gradients and one state."""
    tx, mesh = natural_galore(), make_mesh(AxisType.Explicit)

    def model(seed):
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.normal(size=shape).astype("float32")
        return {"experts": normal(DEVICES, 8, 12), "shared": normal(8, 12)}

    params, *gradients = [model(seed) for seed in range(4)]
    own = lambda tree, i: {**tree, "experts": tree["experts"][i : i + 1]}
    spec_of = lambda path, _: P("data") if "experts" in jax.tree_util.keystr(path) else P()
    specs = lambda tree: jax.tree_util.tree_map_with_path(spec_of, tree)
    of_params, of_state = specs(params), specs(jax.eval_shape(tx.init, own(params, 0)))
    on_each = functools.partial(jax.shard_map, mesh=mesh)
    by_hand = optax.GradientTransformation(
        jax.jit(on_each(tx.init, in_specs=(of_params,), out_specs=of_state)),
        on_each(
            tx.update,
            in_specs=(of_params, of_state, of_params),
            out_specs=(of_params, of_state),
        ),
    )
    shardings = {name: NamedSharding(mesh, spec) for name, spec in of_params.items()}
    placed = [jax.device_put(tree, shardings) for tree in (params, *gradients)]
    actual, _ = train(placed[0], placed[1:], by_hand)
    for i in range(DEVICES):
        expected, _ = train(own(params, i), [own(g, i) for g in gradients], tx)
        assert_close(own(jax.device_get(actual), i), expected)


def over_one_axis(kind):
    """A transformation that averages over axis "data", for weights sharded over "tensor"."""
    mesh = jax.make_mesh((DEVICES, 2), ("data", "tensor"), axis_types=(kind, kind))
    partitions = {"layers": P("tensor"), "norm": P()}
    on_mesh = lambda tree, *first: jax.device_put(
        tree, {name: NamedSharding(mesh, P(*first, *spec)) for name, spec in partitions.items()}
    )
    tx = mapped(reducing(natural_galore()), mesh, axis_names={"data"})
    return tx, on_mesh(weights(0)), [on_mesh(g, "data") for g in GRADIENTS]


def test_partial_shard_map_on_explicit_axes():
    tx, params, gradients = over_one_axis(AxisType.Explicit)
    _, state = jax.eval_shape(tx.update, gradients[0], tx.init(params), params)
    assert state[0].basis["layers"].value.sharding.spec == P("tensor", None, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_partial_shard_map_equals_one_device(kind):
    tx, params, gradients = over_one_axis(kind)
    actual, _ = train(params, gradients, tx)
    assert_close(actual, on_one_device("core"))
