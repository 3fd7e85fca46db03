"""States through Flax's serialization, bit for bit."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

import natgalore_jax as natgalore
from tests.helpers.cases import quick


OPTIMIZERS = {
    "core": lambda: natgalore.natural_galore(1e-2, 4, fisher="core", residual=None),
    "both sides, random": lambda: natgalore.galore(1e-2, 4, side="both", basis="random"),
    "8 bits": lambda: natgalore.quantized(
        natgalore.natural_galore(1e-2, 64, fisher="core"),
        ("linear", "square", "basis", "fisher", "root"),
    ),
}


def params(key):
    up, down = jax.random.split(key)
    return {
        "up": {"kernel": jax.random.normal(up, (2, 64, 128))},
        "down": {"kernel": jax.random.normal(down, (128, 64)), "bias": jnp.ones(64)},
    }


@pytest.mark.parametrize("name", quick(["core", "8 bits"], list(OPTIMIZERS)))
def test_bytes_of_a_state_are_read_back(name, key):
    tx, weights = OPTIMIZERS[name](), params(key)
    _, state = jax.jit(tx.update)(weights, tx.init(weights), weights)
    data = flax.serialization.to_bytes(state)
    back = flax.serialization.from_bytes(tx.init(params(jax.random.key(7))), data)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for x, y in zip(*map(jax.tree.leaves, (back, state)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_train_state_of_boxed_params(key):
    """Flax's own TrainState, whose params are in boxes that name their axes."""
    box = lambda x: nn.Partitioned(x, (None,) * (x.ndim - 1) + ("fsdp",))
    weights = jax.tree.map(box, params(key))
    tx = natgalore.galore(1e-2, 4)
    state = TrainState.create(apply_fn=None, params=weights, tx=tx)
    state = state.apply_gradients(grads=weights)
    data = flax.serialization.to_bytes(state)
    fresh = TrainState.create(apply_fn=None, params=weights, tx=tx)
    back = flax.serialization.from_bytes(fresh, data)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for x, y in zip(*map(jax.tree.leaves, (back, state)), strict=True):
        np.testing.assert_array_equal(x, y)
