"""Optimizers under `jax.vmap`, as for random seeds or ensembles, are separate optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from tests.helpers.cases import quick


RUNS, STEPS = 3, 5
OPTIMIZERS = {
    "default": lambda: natgalore.natural_galore(1e-2, 4, refresh_every=2),
    "core": lambda: natgalore.natural_galore(
        1e-2, 4, refresh_every=2, fisher="core", residual=None
    ),
    "window": lambda: natgalore.natural_galore(
        1e-2, 4, refresh_every=2, fisher="window", residual=None
    ),
    "both sides": lambda: natgalore.galore(1e-2, 4, refresh_every=2, side="both"),
    "random": lambda: natgalore.galore(1e-2, 4, refresh_every=2, basis="random"),
    "8 bits": lambda: natgalore.quantized(natgalore.galore(1e-2, 32, refresh_every=2)),
}


def trees(seed):
    up, down, stack = jax.random.split(jax.random.key(seed), 3)
    return {
        "up": {"kernel": jax.random.normal(up, (64, 96))},
        "down": {"kernel": jax.random.normal(down, (96, 64))},
        "layers": {"kernel": jax.random.normal(stack, (3, 64, 96)), "bias": jnp.ones((3, 96))},
    }


def gradients(step):
    """One tree per run; one run has a zero gradient first, one a NaN, so that refreshes differ."""
    runs = [trees(10 * step + i) for i in range(RUNS)]
    if step == 0:
        runs[1] = jax.tree.map(jnp.zeros_like, runs[1])
        kernel = runs[2]["layers"]["kernel"]
        runs[2]["layers"]["kernel"] = kernel.at[1, 0, 0].set(jnp.nan)
    return runs


stack = lambda runs: jax.tree.map(lambda *x: jnp.stack(x), *runs)


@pytest.mark.parametrize("name", quick(["default"], list(OPTIMIZERS)))
def test_runs_under_vmap_are_separate_runs(name):
    tx = OPTIMIZERS[name]()
    params = [trees(100 + i) for i in range(RUNS)]
    states = [tx.init(x) for x in params]
    together, weights = jax.vmap(tx.init)(stack(params)), stack(params)
    update, updates_together = jax.jit(tx.update), jax.jit(jax.vmap(tx.update))
    for step in range(STEPS):
        grads = gradients(step)
        results = [update(*x) for x in zip(grads, states, params, strict=True)]
        states = [state for _, state in results]
        updates, together = updates_together(stack(grads), together, weights)
        expected = stack([update for update, _ in results])
        # In 8 bits a number near a border is encoded to the next cell, 7 % off.
        atol = 2e-4 if name == "8 bits" else 2e-5
        for x, y in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
            # Products of a batch sum in another order, through a refresh and Adam's division.
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=atol)
    refreshed = lambda state: [
        x for path, x in jax.tree_util.tree_leaves_with_path(state) if ".refreshed" in str(path)
    ]
    for x, y in zip(refreshed(together), refreshed(stack(states)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", quick(["galore"], ["galore", "core"]))
def test_bases_are_refreshed_on_due_steps_alone(name):
    """A condition on a batched predicate would run the refresh on every step."""
    calls = []

    def basis(G, P, key):
        jax.debug.callback(lambda _: calls.append(1), key[0] if key.ndim else 0)
        return P

    settings = {"galore": {}, "core": {"inner": natgalore.scale_by_core_fisher()}}[name]
    tx = natgalore.project(
        4, basis=basis, refresh_every=4, stagger=False, **{"inner": optax.identity()} | settings
    )
    params = stack([trees(i) for i in range(RUNS)])
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(tx.update))
    per_step = []
    for _ in range(6):
        _, state = update(params, state, params)
        jax.effects_barrier()
        per_step.append(len(calls))
        calls.clear()
    assert [count > 0 for count in per_step] == [True, False, False, False, True, False]


def test_nested_vmap():
    tx = OPTIMIZERS["core"]()
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (2, 3, 16, 24))}}
    both = lambda f: jax.jit(jax.vmap(jax.vmap(f)))
    state = both(tx.init)(params)
    updates, _ = both(tx.update)(params, state, params)
    one = jax.tree.map(lambda x: x[1, 2], params)
    expected, _ = tx.update(one, tx.init(one), one)
    np.testing.assert_allclose(
        updates["up"]["kernel"][1, 2], expected["up"]["kernel"], rtol=1e-3, atol=1e-6
    )
