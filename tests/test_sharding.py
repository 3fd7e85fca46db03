"""A weight sharded over devices takes the same steps as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore


def train(params, gradients, tx):
    """Four steps, through a refresh of every matrix."""
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in gradients:
        params, state = step(params, state, g)
    return params


@pytest.mark.parametrize(
    ("fisher", "kwargs"),
    [("core", {}), ("window", {}), ("core", {"side": "both"}), (None, {"basis": "random"})],
    ids=["core", "window", "two-sided", "random"],
)
@pytest.mark.parametrize(
    "spec", [P("fsdp", None), P(None, "fsdp")], ids=["rows sharded", "columns sharded"]
)
def test_fsdp_equals_one_device(spec, fisher, kwargs, key):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    names = {
        "up": {"kernel": ((16, 40), spec)},
        "layers": {"mlp": {"down": {"kernel": ((2, 40, 16), P(None, *spec))}}},
        "embed": {"embedding": ((64, 16), P("fsdp", None))},
    }
    is_leaf = lambda x: isinstance(x, tuple)

    def make(k):
        return jax.tree.map(lambda x: jax.random.normal(k, x[0]), names, is_leaf=is_leaf)

    shard = lambda tree: jax.tree.map(
        lambda x, leaf: jax.device_put(x, NamedSharding(mesh, leaf[1])), tree, names
    )
    params, *gradients = [make(k) for k in jax.random.split(key, 5)]
    kwargs = {"refresh_every": 2, "weight_decay": 0.1, **kwargs}
    tx = natgalore.natural_galore(1e-2, 4, fisher=fisher, **kwargs)
    expected = train(params, gradients, tx)
    actual = train(shard(params), [shard(g) for g in gradients], tx)
    for a, b, (_, spec) in zip(
        jax.tree.leaves(actual),
        jax.tree.leaves(expected),
        jax.tree.leaves(names, is_leaf=is_leaf),
        strict=True,
    ):
        # Sums in another order, through a refresh and an inverse root: 1e-3 of an update of 1e-2.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)
    assert jnp.abs(expected["up"]["kernel"] - params["up"]["kernel"]).max() > 1e-2
