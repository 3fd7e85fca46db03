"""Training with `natgalore.value_and_grad` against training with full gradients."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from examples.common.llama import Llama, LlamaConfig, next_token_loss
from natgalore_jax.tree.cores import Core, cores
from natgalore_jax.tree.flax_boxes import unbox
from tests.helpers.cases import quick
from tests.helpers.lowrank import (
    OPTIMIZERS,
    PARAMS,
    RANK,
    after_first_refresh,
    assert_close,
    assert_same_params,
    assert_same_training,
    batches,
    both_ways,
    full_gradients,
    galore,
    is_state,
    natural,
    projected_full_gradients,
    projection,
    small_loss,
    subspace_state,
    trained,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan", "remat"),
    list(itertools.product([False, True], repeat=2)),
)
def test_llama_cores_equal_projected_full_gradients(scan, remat):
    config = LlamaConfig(16, 24, heads=2, layers=2, vocabulary=32, scan=scan, remat=remat)
    graph, params = nnx.split(Llama(config, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
    loss = lambda params, tokens: next_token_loss(nnx.merge(graph, params), tokens)
    tx = projection(None, "short")
    opt_state = after_first_refresh(tx.init(params))
    ours = jax.jit(natgalore.value_and_grad(loss, tx, on_fallback="error"))
    (value, grads), _ = ours(params, opt_state, tokens)
    full_value, full_grads = jax.jit(jax.value_and_grad(loss))(params, tokens)
    np.testing.assert_allclose(value, full_value, rtol=1e-6)
    assert len(cores(grads)) == (7 if scan else 14)
    assert_close(unbox(grads), projected_full_gradients(unbox(full_grads), opt_state))
    updates, _ = tx.update(grads, opt_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("name", quick(["both"], [*OPTIMIZERS]))
def test_training_equals_that_of_full_gradients(name):
    """Refreshes are by passes, except with both sides projected."""
    assert_same_training(*both_ways(OPTIMIZERS[name]()))


def test_tree_without_projected_leaves():
    tx, params = optax.adam(1e-3), {"bias": jnp.ones(3)}
    loss = lambda params: jnp.sum(params["bias"] ** 2)
    (value, grads), _ = natgalore.value_and_grad(loss, tx)(params, tx.init(params))
    chex.assert_trees_all_close((value, grads), jax.value_and_grad(loss)(params))


def refreshed_at(place, refreshed, opt_state):
    """`opt_state`, with the bases of one part of the tree from another, `refreshed`."""
    new = subspace_state(refreshed)

    def put(old):
        if not is_state(old):
            return old
        fields = ("basis", "refreshed")
        of = lambda field: getattr(old, field) | {place: getattr(new, field)[place]}
        return old._replace(**{field: of(field) for field in fields})

    return jax.tree.map(put, opt_state, is_leaf=is_state)


@pytest.mark.slow
def test_cores_and_full_gradients_mix_in_one_tree():
    """Matrices with full gradients are refreshed by `update`."""
    tx = galore(stagger=False, weight_decay=0.1)
    params, x = PARAMS, batches(1)[0]
    opt_state = tx.init(params)
    gradients = jax.jit(natgalore.value_and_grad(small_loss, tx))
    update = jax.jit(tx.update)
    for _ in range(2):
        (_, ours), after = gradients(params, opt_state, x)
        full = jax.grad(small_loss)(params, x)
        mixed = full | {"layers": ours["layers"]}
        start = refreshed_at("layers", after, opt_state)
        updates, _ = update(mixed, start, params)
        expected_updates, opt_state = update(full, opt_state, params)
        chex.assert_trees_all_close(updates, expected_updates, atol=2e-5)


DATA, FSDP = PartitionSpec(), PartitionSpec("d")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weights", "refresh"),
    list(
        itertools.product((AxisType.Auto, AxisType.Explicit), (DATA, FSDP), ("passes", "gradient"))
    ),
)
def test_training_on_a_mesh_equals_one_device(kind, weights, refresh):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    tx = galore(stagger=False)
    entries = {"embed": {"bias": DATA}, "layers": {"kernel": DATA}, "out": {"kernel": weights}}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = jax.tree.map(put, {k: PARAMS[k] for k in entries}, entries)
    batch = [put(x, PartitionSpec("d")) for x in batches(3)]
    with jax.set_mesh(mesh):
        gradients = natgalore.value_and_grad(small_loss, tx, refresh=refresh)
        seen = trained(tx, gradients, params=params, batch=batch, steps=3)
    full = trained(tx, full_gradients(), steps=3)
    assert_same_params(seen, full)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals():
    tx, x = natural(), batches(1)[0]
    opt_state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="on_fallback") as error:
        natgalore.value_and_grad(small_loss, tx, on_fallback="raise")
    one_line(error)
    power = lambda params, x: small_loss(params, x) + jnp.sum(params["out"]["kernel"] ** 3)
    with pytest.raises(ValueError, match="integer_pow of `out/kernel`") as error:
        natgalore.value_and_grad(power, tx, on_fallback="error")(PARAMS, opt_state, x)
    one_line(error)
    for name, outer in {
        "MultiSteps": optax.MultiSteps(tx, 2),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "conditionally_mask": optax.transforms.conditionally_mask(tx, lambda step: step < 2),
        "conditionally_transform": optax.conditionally_transform(tx, lambda step: step < 2),
    }.items():
        with pytest.raises(ValueError, match=f"{name} around the projection.*put it in") as error:
            natgalore.value_and_grad(small_loss, outer)(PARAMS, outer.init(PARAMS), x)
        one_line(error)
    unfiltered = PARAMS | {"activation": jnp.tanh}
    with pytest.raises(TypeError, match=r"'activation' of the params.*eqx\.filter") as error:
        natgalore.value_and_grad(small_loss, tx)(unfiltered, opt_state, x)
    one_line(error)
    with pytest.raises(ValueError, match="`refresh`") as error:
        natgalore.value_and_grad(small_loss, tx, refresh="never")
    one_line(error)
    for settings in ({"basis": "svd"}, {"side": "both"}):
        other = natural(**settings)
        gradients = natgalore.value_and_grad(small_loss, other, refresh="passes")
        with pytest.raises(ValueError, match=r'"power" and "random".*`layers/kernel`') as error:
            gradients(PARAMS, other.init(PARAMS), x)
        one_line(error)
    with pytest.raises(ValueError, match="micro_batches=3 on a leading axis, found 8"):
        natgalore.value_and_grad(small_loss, tx, micro_batches=3)(PARAMS, opt_state, x)
    with pytest.raises(ValueError, match="micro_batches"):
        natgalore.value_and_grad(small_loss, tx, micro_batches=0)


def test_residual_is_refused():
    tx = natgalore.natural_galore(1e-2, RANK, residual="isotropic")
    opt_state, x = tx.init(PARAMS), batches(1)[0]
    with pytest.raises(ValueError, match="residual") as error:
        natgalore.value_and_grad(small_loss, tx)(PARAMS, opt_state, x)
    one_line(error)
    without = natural()
    (_, grads), _ = natgalore.value_and_grad(small_loss, without)(PARAMS, without.init(PARAMS), x)
    with pytest.raises(ValueError, match="residual") as error:
        tx.update(grads, opt_state, PARAMS)
    one_line(error)


def test_update_with_other_settings_than_the_state_is_refused():
    """value_and_grad refreshes by the settings in the state, so they must be those of `tx`."""
    tx, other = natural(refresh_every=3), natural(refresh_every=4)
    gradients = natgalore.value_and_grad(small_loss, other)
    (_, grads), opt_state = gradients(PARAMS, tx.init(PARAMS), batches(1)[0])
    with pytest.raises(ValueError, match="made by a projection with other settings") as error:
        other.update(grads, opt_state, PARAMS)
    one_line(error)
    leaves = jax.tree.leaves(opt_state)
    continued = jax.tree.unflatten(jax.tree.structure(other.init(PARAMS)), leaves)
    other.update(grads, continued, PARAMS)


def test_cores_of_another_state_are_refused():
    tx, other = natural(), natgalore.galore(1e-2, 5)
    x = batches(1)[0]
    (_, grads), _ = natgalore.value_and_grad(small_loss, tx)(PARAMS, tx.init(PARAMS), x)
    with pytest.raises(ValueError, match="core of another state") as error:
        other.update(grads, other.init(PARAMS), PARAMS)
    one_line(error)
    cut = jax.tree.map(
        lambda G: G.replace(G.value[..., :-1]) if isinstance(G, Core) else G,
        grads,
        is_leaf=lambda x: isinstance(x, Core),
    )
    with pytest.raises(ValueError, match="another shape") as error:
        tx.update(cut, tx.init(PARAMS), PARAMS)
    one_line(error)
