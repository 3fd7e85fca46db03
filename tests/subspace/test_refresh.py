"""The schedule of refreshes against Python integers; compilations of an update outside `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgalore_jax as natgalore
from benchmarks.speed.bench_trace import eager_compilations
from natgalore_jax.subspace.basis import METHODS
from natgalore_jax.subspace.refresh import Refresh, phase
from natgalore_jax.tree.leaf_spec import LeafSpec


def phase_in_integers(index, refresh_every, total):
    """Group `index` of at most 100 begins its period that share of it later."""
    groups = min(100, refresh_every, total)
    return (index * groups // total) * refresh_every // groups


@pytest.mark.parametrize("refresh_every", [1, 7, 200, 21_500_000, 2**31 - 1])
@pytest.mark.parametrize("total", [1, 3, 168, 5000])
def test_phases_are_exact_up_to_the_largest_period(refresh_every, total):
    index = np.arange(total)
    expected = [phase_in_integers(int(i), refresh_every, total) for i in index]
    assert phase(index, refresh_every, total, stagger=True).tolist() == expected
    assert 0 <= min(expected) <= max(expected) < refresh_every


@pytest.mark.parametrize("refresh_every", [7, 30_000_000, 2**31 - 1])
def test_every_matrix_is_due_at_its_phase_of_every_period(refresh_every):
    total = 150
    spec = LeafSpec((), (total, 8, 8), batch=(0,), rows=(1,), cols=(2,), rank=2)
    refresh = Refresh(refresh_every, METHODS["power"], None, stagger=True, seed=0)
    ones = jnp.ones(total)
    phases = np.array([phase_in_integers(i, refresh_every, total) for i in range(total)])
    for step in sorted({*phases.tolist(), refresh_every - 1}):
        due = refresh.due(spec, ones, ones.astype(jnp.int32), jnp.int32(step), total)
        np.testing.assert_array_equal(due, phases == step)


def test_third_update_outside_jit_compiles_nothing():
    """Leaf functions and inner are jitted once: fresh closures would compile on every step."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {f"layer_{i}": {"kernel": jax.random.normal(k, (17, 29))} for i, k in enumerate(keys)}
    tx = natgalore.natural_galore(1e-3, 4, refresh_every=3)
    first, _, third = eager_compilations(tx, params)
    assert first > 0
    assert third == 0
