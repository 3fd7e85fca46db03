"""One backward pass: its cores, other gradients, micro-batches and program."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from benchmarks.common.hlo import collectives
from examples.common.llama import Llama, LlamaConfig, next_token_loss
from natgalore_jax.lowrank_grads.loss import backward
from natgalore_jax.tree.cores import core_arrays, cores
from tests.helpers.cases import slow
from tests.helpers.compiling import AS_FOR_USERS
from tests.helpers.lowrank import (
    PARAMS,
    after_first_refresh,
    assert_close,
    assert_same_training,
    bases,
    batches,
    both_ways,
    full_gradients,
    galore,
    natural,
    product_shapes,
    projected_full_gradients,
    small_loss,
    subspace_state,
    trained,
)


@pytest.mark.parametrize("refresh", ["passes", *slow("gradient")])
def test_micro_batches_equal_one_batch(refresh):
    """Four micro-batches of two sequences, with a larger last sequence, through refreshes."""
    tx = galore(refresh_every=3, stagger=False)
    ours = natgalore.value_and_grad(
        lambda params, x: (small_loss(params, x), x[0]), tx, True, micro_batches=4, refresh=refresh
    )
    batch = [x.at[-1].multiply(3) for x in batches(5)]
    aux = []

    def split(params, opt_state, x):
        ((value, firsts), grads), opt_state = ours(params, opt_state, x.reshape(4, 2, 12))
        aux.append(firsts)
        return (value, grads), opt_state

    seen = trained(tx, split, batch=batch)
    assert_same_training(seen, trained(tx, full_gradients(), batch=batch))
    assert aux[0].shape == (4, 12)


def test_micro_batch_gradients_are_summed_in_float32():
    """Of 64 micro-batches 63 add 1/512 each to the first one's 1, less than bfloat16 resolves."""
    params = {"w": jnp.ones((8, 8), jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16)}
    tx = natgalore.galore(1e-2, 2)
    loss = lambda params, x: jnp.sum(params["b"] * x) + jnp.sum(params["w"]) * 0.0
    gradients = natgalore.value_and_grad(loss, tx, micro_batches=64, on_fallback="ignore")
    x = jnp.full((64, 8), 1 / 512, jnp.bfloat16).at[0].set(1)
    (_, grads), _ = gradients(params, tx.init(params), x)
    mean = jnp.full(8, (1 + 63 / 512) / 64, jnp.bfloat16)
    np.testing.assert_array_equal(grads["b"].astype(jnp.float32), mean.astype(jnp.float32))
    assert grads["b"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_nonfinite_cores_are_skipped():
    tx = galore(refresh_every=50, stagger=False)
    batch = batches(5)
    batch[2] = batch[2].at[0].set(jnp.inf)
    ours, full = both_ways(tx, batch=batch)
    assert_same_training(ours, full)
    skipped = lambda seen: subspace_state(seen[-1][1]).skipped
    chex.assert_trees_all_equal(skipped(ours), skipped(full))
    assert int(skipped(ours)["out"]["kernel"].value) == 1


@pytest.mark.slow
def test_aux_outputs_and_keyword_arguments():
    tx = natural()
    params, x = PARAMS, batches(1)[0]

    def loss(params, x, *, power):
        aux = {"x": x, "w": params["out"]["kernel"], "key": jax.random.key(1), "n": 2}
        return small_loss(params, x, power=power), aux

    ours = natgalore.value_and_grad(loss, tx, has_aux=True, on_fallback="error")
    for opt_state in (tx.init(params), after_first_refresh(tx.init(params))):
        ((value, aux), grads), _ = jax.jit(ours, static_argnames="power")(
            params, opt_state, x, power=4
        )
        np.testing.assert_allclose(value, small_loss(params, x, power=4), rtol=1e-6)
        chex.assert_trees_all_equal(
            (aux["x"], aux["w"], aux["n"]), (x, params["out"]["kernel"], jnp.asarray(2))
        )
        assert aux["key"] == jax.random.key(1)
        assert len(cores(grads)) == 2


@pytest.mark.slow
def test_scaled_loss_trains_like_the_loss():
    """Loss scaling of mixed precision, through a refresh."""
    tx, scale = galore(refresh_every=2, stagger=False), 2.0**10
    scaled = natgalore.value_and_grad(lambda params, x: scale * small_loss(params, x), tx)

    def unscaled(params, opt_state, x):
        (value, grads), opt_state = scaled(params, opt_state, x)
        return jax.tree.map(lambda x: x / scale, (value, grads)), opt_state

    assert_same_training(trained(tx, unscaled, steps=4), trained(tx, full_gradients(), steps=4))


def test_bfloat16_params_have_float32_cores():
    tx, x = natural(), batches(1)[0]
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    gradients = jax.jit(natgalore.value_and_grad(small_loss, tx))
    for opt_state in (tx.init(params), after_first_refresh(tx.init(params))):
        (_, grads), _ = gradients(params, opt_state, x.astype(jnp.bfloat16))
        assert {core.dtype for core in core_arrays(grads)} == {jnp.dtype(jnp.float32)}
        assert grads["embed"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("side", ["left", *slow("right", "both")])
def test_step_without_refresh_forms_no_full_gradient(side):
    """In the compiled program a full gradient would be a product of m x n entries."""
    tx = natural(side=side, stagger=False)
    opt_state, x = after_first_refresh(tx.init(PARAMS)), batches(1)[0]
    state = subspace_state(opt_state)
    step = lambda params, x: backward(small_loss, params, False, (x,), {})[0](bases(state))

    full = {"12,12", "12,20", "20,12", "3,12,12"}
    assert not full & product_shapes(step, PARAMS, x)
    assert full & product_shapes(jax.grad(small_loss), PARAMS, x)


@pytest.mark.slow
def test_data_parallel_step_reduces_cores_and_unprojected_gradients_only():
    """Bytes of all collectives of a data-parallel step without refresh."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    config = LlamaConfig(64, 176, heads=4, layers=2, vocabulary=96, scan=True, remat=True)
    model = Llama(config, nnx.Rngs(0))
    structure, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    loss = lambda params, tokens: next_token_loss(nnx.merge(structure, params), tokens)
    tx = natgalore.galore(1e-2, 8, stagger=False)
    step = natgalore.value_and_grad(loss, tx, on_fallback="error")
    replicated, split = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((), ("d",)))
    tokens = jax.ShapeDtypeStruct((8, 9), jnp.int32)
    text = (
        jax.jit(step, in_shardings=(replicated, replicated, split), out_shardings=replicated)
        .lower(params, jax.eval_shape(tx.init, params), tokens)
        .compile(compiler_options=AS_FOR_USERS)
        .as_text()
    )
    moved = sum(x.times * x.size for x in collectives(text) if x.hot)
    state = subspace_state(jax.eval_shape(tx.init, params))
    specs = {path: P[0].spec for path, P in bases(state).items()}
    sizes = [
        math.prod(specs[path].core_shape) if path in specs else w.size
        for path, w in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert moved == 4 * (sum(sizes) + 1)  # and the loss
    assert any(not x.hot for x in collectives(text))


def test_shard_map_reduces_cores_only():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    tx = natural(stagger=False)
    opt_state, x = after_first_refresh(tx.init(PARAMS)), batches(1)[0]
    mean = lambda params, x: lax.pmean(small_loss(params, x), "d")
    step = lambda params, x: backward(mean, params, False, (x,), {})[0](bases(opt_state))
    everywhere, split = PartitionSpec(), PartitionSpec("d")
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(everywhere, split), out_specs=everywhere)
    )
    _, grads = mapped(PARAMS, x)
    assert_close(grads, projected_full_gradients(jax.grad(small_loss)(PARAMS, x), opt_state))
    reduced = [
        shape
        for line in mapped.lower(PARAMS, x).compile().as_text().splitlines()
        if " all-reduce(" in line
        for shape in re.findall(r"f32\[([0-9,]*)\]", line)
    ]
    assert reduced
    assert not {"12,12", "12,20", "3,12,12"} & {*reduced}, reduced
