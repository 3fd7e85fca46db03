"""An optimizer with a plain state is the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax

import natgalore_jax as natgalore
from tests.helpers.cases import quick


OPTIMIZERS = {
    "galore": lambda: natgalore.galore(1e-2, 4, refresh_every=2),
    "default, clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), natgalore.natural_galore(1e-2, 4, refresh_every=2)
    ),
    "8 bits": lambda: natgalore.quantized(natgalore.galore(1e-2, 64)),
    "adamw": lambda: optax.adamw(1e-2),
}


def params(key):
    up, down = jax.random.split(key)
    return {
        "layers": [{"kernel": jax.random.normal(up, (64, 128))}, {"bias": jnp.ones(3)}],
        "down": {"kernel": jax.random.normal(down, (128, 64))},
    }


@pytest.mark.parametrize("name", quick(["default, clipped"], list(OPTIMIZERS)))
def test_resumed_from_safetensors_to_the_same_bits(name, tmp_path, key):
    tx, weights = OPTIMIZERS[name](), params(key)
    plain = natgalore.plain_state(tx)
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    state, named = tx.init(weights), plain.init(weights)
    for seed in range(4):
        grads = params(jax.random.key(seed))
        expected, state = update(grads, state, weights)
        safetensors.flax.save_file(named, tmp_path / "state.safetensors")
        named = safetensors.flax.load_file(tmp_path / "state.safetensors")
        actual, named = plain_update(grads, named, weights)
        for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert isinstance(named, dict)
    assert len(named) == len(jax.tree.leaves(state))


def test_names_are_paths(key):
    state = natgalore.plain_state(OPTIMIZERS["galore"]()).init(params(key))
    assert {
        "0/basis/layers/0/kernel",
        "0/skipped/layers/1/bias",
        "0/inner_state/1/mu/down/kernel",
        "0/count",
    } <= {*state}
    assert not any("kernel/kernel" in name for name in state)


def test_equal_keys_one_below_another_stay_apart():
    params = {"w": {"w": jnp.ones((8, 16))}, "v": {"w": jnp.ones(3)}}
    tx = natgalore.galore(1e-2, 4)
    state = natgalore.plain_state(tx).init(params)
    assert len(state) == len(jax.tree.leaves(tx.init(params)))


def test_a_state_of_other_names_is_refused(key):
    tx = natgalore.plain_state(OPTIMIZERS["galore"]())
    weights = params(key)
    state = tx.init(weights)
    state["mu"] = state.pop("0/count")
    with pytest.raises(ValueError, match=r"lacks \['0/count'\], and has \['mu'\] beside it"):
        tx.update(weights, state, weights)
    with pytest.raises(ValueError, match="needs `params`"):
        tx.update(weights, state)
