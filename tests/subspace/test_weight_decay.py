"""Which inner optimizers may decay weights they never see, and that they do it right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import natgalore_jax as natgalore
from tests.helpers.cases import quick
from tests.helpers.compiling import AS_FOR_USERS


LR, WD = 1e-2, 0.1
PARAMS = {"up": {"kernel": jnp.full((16, 40), 3.0)}, "norm": {"scale": jnp.full(16, 2.0)}}


def last_update(tx, steps=3):
    """The last of some updates: two per accumulation of MultiSteps."""
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for count in range(steps):
        key = jax.random.fold_in(jax.random.key(0), count)
        gradients = jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape), PARAMS)
        updates, state = update(gradients, state, PARAMS)
    return updates


def matrices_only(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def by_last_key(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


# name -> (optimizer of a given weight decay, what it multiplies whole weights with)
DECOUPLED = {
    "adamw": (lambda wd: optax.adamw(LR, weight_decay=wd), -LR * WD),
    "adamw, schedule": (
        lambda wd: optax.adamw(optax.linear_schedule(LR, 0.0, 4), weight_decay=wd),
        -LR * WD / 2,
    ),
    "adamw, mask by ndim": (
        lambda wd: optax.adamw(LR, weight_decay=wd, mask=matrices_only),
        -LR * WD,
    ),
    "adamw, rematerialised": (
        lambda wd: optax.adamw(LR, weight_decay=wd)._replace(
            update=jax.checkpoint(optax.adamw(LR, weight_decay=wd).update)
        ),
        -LR * WD,
    ),
    "adamw, mask by key": (lambda wd: optax.adamw(LR, weight_decay=wd, mask=by_last_key), -LR * WD),
    "inject_hyperparams": (
        lambda wd: optax.inject_hyperparams(optax.adamw)(LR, weight_decay=wd),
        -LR * WD,
    ),
    "lion": (lambda wd: optax.lion(LR, weight_decay=wd), -LR * WD),
    "clip before adamw": (
        lambda wd: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR, weight_decay=wd)),
        -LR * WD,
    ),
    "partition by a callable": (
        lambda wd: optax.partition(
            {True: optax.adamw(LR, weight_decay=wd), False: optax.sgd(LR)}, by_last_key
        ),
        -LR * WD,
    ),
    "muon": (lambda wd: optax.contrib.muon(LR, weight_decay=wd), -LR * WD),
    "adan": (lambda wd: optax.adan(LR, weight_decay=wd), -LR * WD),
    "partition": (
        lambda wd: optax.partition(
            {"a": optax.adamw(LR, weight_decay=wd), "b": optax.sgd(LR)},
            {"up": {"kernel": "a"}, "norm": {"scale": "b"}},
        ),
        -LR * WD,
    ),
    "sgd": (lambda wd: optax.sgd(LR, 0.9), 0.0),
}


@pytest.mark.parametrize("name", quick(list(DECOUPLED)[:1], [*DECOUPLED]))
def test_full_weight_decays(name):
    """What decay adds to the update is a·W, where the same optimizer without it adds nothing."""
    make, factor = DECOUPLED[name]
    with_decay, without = (
        last_update(natgalore.chain(natgalore.project(4), make(wd))) for wd in (WD, 0.0)
    )
    added = with_decay["up"]["kernel"] - without["up"]["kernel"]
    # A difference of numbers near 1e-2: float32's 6e-8 of that, against 3e-3.
    np.testing.assert_allclose(added, factor * PARAMS["up"]["kernel"], rtol=1e-5, atol=1e-8)


def test_mask_excludes_leaves_from_decay():
    make, _ = DECOUPLED["adamw, mask by key"]
    tx = natgalore.chain(natgalore.project(4), make(WD))
    plain = last_update(natgalore.chain(natgalore.project(4), make(0.0)))
    np.testing.assert_array_equal(last_update(tx)["norm"]["scale"], plain["norm"]["scale"])


COUPLED = {
    "clip after decay": optax.chain(optax.adamw(LR, weight_decay=WD), optax.clip(1.0)),
    "global norm after decay": optax.chain(
        optax.adamw(LR, weight_decay=WD), optax.clip_by_global_norm(1.0)
    ),
    "L2": optax.chain(optax.add_decayed_weights(WD), optax.scale_by_adam()),
    "lamb": optax.lamb(LR, weight_decay=WD),
    "positive weights": optax.chain(optax.sgd(LR), optax.keep_params_nonnegative()),
    "schedule-free": optax.contrib.schedule_free_adamw(LR, weight_decay=WD),
}


@pytest.mark.parametrize("inner", COUPLED.values(), ids=COUPLED)
def test_other_uses_of_weights_are_refused(inner):
    tx = natgalore.project(4, inner, transport="keep")
    with pytest.raises(ValueError, match=r"cannot work on cores.*after `natgalore\.project_back"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_decay_without_params_raises():
    tx = natgalore.chain(natgalore.project(4), optax.adamw(LR, weight_decay=WD))
    with pytest.raises(ValueError, match=r"params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.slow
def test_inner_without_decay_has_the_same_program():
    """No product with the weight in the program: as many bytes and flops as without params."""
    tx = natgalore.project(4, optax.scale_by_adam())
    state = tx.init(PARAMS)
    program = lambda *args: jax.jit(tx.update).lower(PARAMS, state, *args).compile(AS_FOR_USERS)
    assert program(PARAMS).cost_analysis()["flops"] == program().cost_analysis()["flops"]
