"""Cores of weights in products, against projected full gradients."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from natgalore_jax.lowrank_grads.loss import backward
from natgalore_jax.subspace.state import bases_of
from tests.helpers.lowrank import (
    VIEW,
    Cases,
    X,
    after_first_refresh,
    assert_cores_equal_projected_gradients,
    normal,
    projection,
    subspace_state,
)


CASES = Cases()


@CASES((12, 8), (8, 9))
@CASES((12, 8), (8, 9), side="right")
@CASES((12, 8), (8, 9), side="both")
@CASES((12, 8), (8, 9), side="short", basis="random")
def dense(W1, W2):
    return jnp.sum(jnp.tanh(jnp.tanh(X @ W1) @ W2) ** 2)


@CASES((12, 8))
@CASES((12, 8), side="right")
@CASES((12, 8), side="both")
def weight_first(W):
    return jnp.sum(jnp.tanh(W.T @ X.T) ** 2) + jnp.sum(jnp.tanh(W @ jnp.ones((8, 5))) ** 2)


@CASES((12, 2, 5), view=VIEW(0, (1, 2)))
@CASES((12, 2, 5), view=VIEW(0, (1, 2)), side="right")
@CASES((12, 2, 5), view=VIEW(0, (1, 2)), side="both")
@CASES((12, 2, 5), view=VIEW(0, 2))  # a matrix for each head
def heads(W):
    y = jnp.einsum("td,dhk->thk", X, W)
    return jnp.sum(jnp.tanh(jnp.einsum("thk,dhk->td", y, W)) ** 2)


@CASES((12, 12))
def several_uses(W):
    return jnp.sum(jnp.tanh(jnp.tanh(X @ W) @ W.T @ W) ** 2)


@CASES((4, 12, 8), (4, 8, 12))
@CASES((4, 12, 8), (4, 8, 12), side="both")
def experts(W1, W2):
    y = jnp.tanh(jnp.einsum("td,edf->etf", X, W1))
    return jnp.sum(jnp.einsum("etf,efd->td", y, W2) ** 2)


@CASES((12, 8), (8, 9), rtol=2e-2)  # full gradients round to bfloat16 too: 4e-3
@CASES((12, 8), (8, 9), rtol=2e-2, side="both")
def bfloat16(W1, W2):
    W1, W2, x = (a.astype(jnp.bfloat16) for a in (W1, W2, X))
    return jnp.sum((jnp.tanh(x @ W1) @ W2).astype(jnp.float32) ** 2)


@CASES((12, 12), fallback=("dot_general",))
def product_of_weights(W):
    return jnp.sum(jnp.tanh(X @ (W @ W)) ** 2)


@pytest.mark.parametrize("name", CASES)
def test_cores_equal_projected_full_gradients(name):
    assert_cores_equal_projected_gradients(CASES[name])


def test_largest_array_is_the_weight():
    """(x P) B needs no larger array; x B has the axes of both."""
    params = {"kernel": normal(1, 12, 20)}
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["kernel"]))
    state = subspace_state(after_first_refresh(projection().init(params)))
    step = lambda params, x: backward(loss, params, False, (x,), {})[0](bases_of([state]))
    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(step)(params, X)))
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == 12 * 20
