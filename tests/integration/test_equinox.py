"""Equinox: modules with holes, weights of (out, in), trained as a plain list of their arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.tree.cores import Core, cores


STEPS = 4  # through two refreshes of each matrix
TARGETS = jax.random.normal(jax.random.key(1), (8, 12))


class Scale(eqx.Module):
    """An array alone in its module, and called as Flax calls the array in a box."""

    value: jax.Array

    def __call__(self, x):
        return self.value * x


class Model(eqx.Module):
    """Its function and the bias that is not there are holes in the params."""

    embed: eqx.nn.Embedding
    scale: Scale
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    activation: object

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(16, 12, key=keys[0])
        self.scale = Scale(jnp.ones(12))
        self.up = eqx.nn.Linear(12, 20, use_bias=False, key=keys[1])
        self.down = eqx.nn.Linear(20, 12, key=keys[2])
        self.activation = jax.nn.relu

    def __call__(self, token):
        return self.down(self.activation(self.up(self.scale(self.embed(token)))))


def loss(model):
    return jnp.square(jax.vmap(model)(jnp.arange(8) % 5) - TARGETS).mean()


OPTIMIZERS = {
    name: natgalore.natural_galore(1e-2, 4, refresh_every=2, weight_decay=0.1, **kwargs)
    for name, kwargs in {
        "core": {},
        "random, both sides": {"basis": "random", "side": "both"},
    }.items()
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(tx, marks=() if name == "core" else pytest.mark.slow, id=name)
        for name, tx in OPTIMIZERS.items()
    ],
)
def test_module_trains_like_the_list_of_its_arrays(tx):
    model = Model(jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    assert params.activation is None
    assert params.up.bias is None
    state = tx.init(params)

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    weights, structure = jax.tree.flatten(params)
    # The names that tell an embedding from a kernel are the list's to keep.
    names = ["embedding", "scale", "kernel", "kernel", "bias"]
    weights = [{name: x} for name, x in zip(names, weights, strict=True)]
    list_state = tx.init(weights)

    @jax.jit
    def list_step(weights, state):
        whole = lambda weights: eqx.combine(structure.unflatten(jax.tree.leaves(weights)), rest)
        grads = jax.grad(lambda weights: loss(whole(weights)))(weights)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
        weights, list_state = list_step(weights, list_state)
    mine = jax.tree.leaves((eqx.filter(model, eqx.is_inexact_array), state))
    for x, y in zip(mine, jax.tree.leaves((weights, list_state)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_out_by_in_weights_are_projected_on_the_short_side():
    params = eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array)
    rows = {row.path: row for row in natgalore.describe(OPTIMIZERS["core"], params).rows}
    assert {name: row.side for name, row in rows.items() if row.rank} == {
        "up/weight": "right",  # (20, 12)
        "down/weight": "left",  # (12, 20)
    }
    assert rows["embed/weight"].view == "an embedding"


@pytest.mark.slow
def test_updates_have_the_structure_of_the_module():
    tx = OPTIMIZERS["core"]
    params = eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array)
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    mu = state[0].inner_state[1].mu
    assert isinstance(mu.up.weight, Core)
    assert isinstance(mu.scale, Scale)
    assert len(cores(mu)) == 2


def test_unfiltered_model_is_refused():
    with pytest.raises(
        TypeError, match=r"leaf 'activation' .* `eqx.filter\(model, eqx.is_array\)`"
    ):
        natgalore.natural_galore(1e-2, 4).init(Model(jax.random.key(0)))
