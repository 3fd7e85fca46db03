"""Cores through loops, branches, calls and custom rules, against projected full gradients."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.helpers.lowrank import Cases, X, assert_cores_equal_projected_gradients


CASES = Cases()


@CASES((3, 12, 12))
@CASES((3, 12, 12), side="right")
@CASES((3, 12, 12), side="both")
def scanned(W):
    y, _ = lax.scan(lambda y, w: (jnp.tanh(y @ w), None), X, W)
    return jnp.sum(y**2)


@CASES((3, 12, 12))
@CASES((3, 12, 12), side="both", basis="random")
def scanned_remat(W):
    step = jax.checkpoint(lambda y, w: (jnp.tanh(y @ w), y.sum()))
    y, sums = lax.scan(step, X, W, reverse=True)
    return jnp.sum(y**2) + jnp.sum(sums**2)


@CASES((12, 12))
def recurrent(W):
    """W is a constant of the scan."""
    y, _ = lax.scan(lambda y, x: (jnp.tanh(x + y @ W), None), X[0], X)
    return jnp.sum(y**2)


@CASES((3, 12, 12))
def layer_by_index(W):
    y = lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ W[i]), X)
    for i in range(3):
        y = jnp.tanh(y @ W[i])
    return jnp.sum(y**2)


@CASES((12, 12))
def conditional(W):
    y = lax.cond(X[0, 0] > -9, lambda x: jnp.tanh(x @ W), lambda x: x, X)
    return jnp.sum(lax.switch(1, [jnp.sin, lambda x: x @ W, jnp.cos], y) ** 2)


@CASES((12, 12))
def while_loop(W):
    """Constants of a loop without a reverse pass."""
    stopped = lax.stop_gradient(W)
    y = lax.while_loop(lambda y: jnp.sum(y**2) > 1, lambda y: jnp.tanh(y @ stopped) / 2, X)
    return jnp.sum((y + X @ W) ** 2)


@CASES((3, 12, 8))
@CASES((3, 12, 8), side="both")
def mapped(W):
    return jnp.sum(jax.vmap(lambda w: jnp.sum(jnp.tanh(X @ w) ** 2))(W))


@CASES((12, 8))
def nested_jit(W):
    return jnp.sum(jax.jit(lambda x, w: jax.jit(jnp.tanh)(x @ w))(X, W) ** 2)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@CASES((12, 8))
def custom_rules(W):
    """Custom rules of values other than weights."""
    return jnp.sum(doubled(jax.nn.silu(jax.nn.relu(X @ W) + X @ W)) ** 2)


@CASES((12, 8), fallback=("custom_vjp_call",))
def custom_rule_of_weight(W):
    return jnp.sum(jnp.tanh(X @ doubled(W)) ** 2)


@CASES((12, 8))
def stopped(W):
    return jnp.sum(jnp.tanh(X @ W) ** 2) * jnp.sum(lax.stop_gradient(W) ** 2)


@CASES((12, 8), (12,))
def with_other_leaves(W, b):
    return jnp.sum(jnp.tanh((X + b[None]) @ W) ** 2)


@CASES((12, 12))
def gradient_inside(W):
    """A penalty on the gradient by x: W inside a differentiated program."""
    return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ W) ** 2))(X) ** 2)


@pytest.mark.parametrize("name", CASES)
def test_cores_equal_projected_full_gradients(name):
    assert_cores_equal_projected_gradients(CASES[name])
