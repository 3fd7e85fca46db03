"""Cores through slices, reshapes, gathers and elementwise operations of a weight."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.helpers.lowrank import VIEW, Cases, X, assert_cores_equal_projected_gradients, normal


CASES = Cases()


@CASES((12, 10))
@CASES((12, 10), side="right")
@CASES((12, 10), side="both")
def heads_by_reshape(W):
    return jnp.sum(jnp.tanh(jnp.einsum("td,dhk->thk", X, W.reshape(12, 2, 5))) ** 2)


@CASES((12, 10), side="both")
def flattened(W):
    """A reshape that mixes rows and columns, and one that takes them apart again."""
    return jnp.sum(jnp.tanh(X @ W.reshape(-1).reshape(12, 10)) ** 2)


@CASES((30, 12))
@CASES((30, 12), side="right")
@CASES((30, 12), side="both")
def tied_embedding(W):
    y = jnp.tanh(jnp.take(W, jnp.array([[3, 1, 29], [3, 3, 7]]), axis=0))
    return jnp.sum(jax.nn.log_softmax(y @ W.T) ** 2)


@CASES((3, 12, 8))
def experts_by_index(W):
    return jnp.sum(jnp.tanh(jnp.einsum("ti,tij->tj", X, W[jnp.array([0, 1, 2, 1, 0] * 2)])) ** 2)


@CASES((12, 24))
@CASES((12, 24), view=VIEW(0, 1, blocks={1: 3}))
@CASES((12, 24), view=VIEW(0, 1, blocks={1: 3}), side="both")
def fused(W):
    """A split and a slice of the weight, and all of it."""
    q, k, v = jnp.split(W, 3, axis=1)
    y = jnp.tanh(X @ q) * jnp.tanh(X @ k) + X @ v
    return jnp.sum(y**2) + jnp.sum(jnp.tanh(X @ W[:, 8:]) ** 2) + jnp.sum(jnp.tanh(X @ W) ** 2)


@CASES((12, 24), view=VIEW(0, 1, blocks={1: 3}), fallback=("slice",))
def cut_across_blocks(W):
    return jnp.sum(jnp.tanh(X @ W[:, 5:12]) ** 2)


@CASES((3, 3, 6, 8), view=VIEW(2, 3), fallback=("conv_general_dilated",))
def convolution(W):
    x = normal(1, 2, 7, 7, 6)
    y = lax.conv_general_dilated(x, W, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(jnp.tanh(y) ** 2)


@CASES((12, 8))
def scaled(W):
    return jnp.sum(jnp.tanh(X @ (-W * 0.5 / 3.0) * jnp.tanh(X @ (W * X[0, 0]))) ** 3)


@CASES((12, 8), fallback=("integer_pow", "mul"))
def elementwise(W):
    return jnp.sum(jnp.tanh(X @ (W * X[:1, :8])) ** 2) + jnp.sum(W**2)


@pytest.mark.parametrize("name", CASES)
def test_cores_equal_projected_full_gradients(name):
    assert_cores_equal_projected_gradients(CASES[name])
