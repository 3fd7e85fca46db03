"""docs/sharding.md: its recipes run, and its table of shardings is the rule of the code."""

import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

from benchmarks.common.doc_tables import read
from benchmarks.speed import bench_residual_traffic
from natgalore_jax.selection.select import MatrixView, select
from natgalore_jax.sharding.partitioning import LeafPartition, role_partition, state_partition
from natgalore_jax.tree.state_roles import AXES, axis_size


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/sharding.md").read_text()
RECIPES = dict(re.findall(r"\n###? ([^\n]+)\n(.*?)(?=\n###? |\Z)", PAGE, flags=re.DOTALL))
LEAF = LeafPartition(AbstractMesh((2, 2, 2), ("layers", "a", "c")), P("layers", "a", "c"))
STACKED = 3  # the case of four layers with sharded rows, run by the quick tests


def snippets(recipe):
    return re.findall(r"```python\n(.*?)```", RECIPES[recipe], flags=re.DOTALL)


@pytest.mark.slow
def test_the_recipes_run():
    scope: dict = {}
    ran = [recipe for recipe in RECIPES if snippets(recipe)]
    assert ran[0] == "Recipes"
    assert len(ran) == 8
    for recipe in ran:
        for snippet in snippets(recipe):
            exec(compile(snippet, f"docs/sharding.md, {recipe}", "exec"), scope)
        if recipe == "`shard_map` and `pmap`":
            same_step_on_one_device(scope)


def same_step_on_one_device(scope):
    weights, tx, loss_fn = scope["weights"], scope["tx"], scope["loss_fn"]
    grads = jax.grad(loss_fn)(weights, jax.numpy.ones((32, 64)))
    updates, _ = jax.jit(tx.update)(grads, tx.init(weights), weights)
    expected = optax.apply_updates(weights, updates)
    replica = jax.tree.map(lambda x: x[-1], scope["replicated"][0])
    for actual in (scope["params"], replica):
        for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)  # sums of eight parts: some eps


@pytest.mark.parametrize(
    ("words", "role", "side"),
    [
        ("basis P", "basis", "left"),
        ("momentum of the residual", "full", "left"),
        ("momentum of the residual", "full", "both"),
        ("core, moments", "linear", "left"),
        ("core, moments", "square", "left"),
        ('cores and moments of `side="both"`', "linear", "both"),
        ("window of", "window", "left"),
        ("Gram matrix", "gram", "left"),
        ("core Fisher and its root", "fisher", "left"),
        ("core Fisher and its root", "root", "left"),
        ("count of refreshes", "scalar", "left"),
    ],
)
def test_the_table_is_the_rule(words, role, side):
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {words}")]
    sharding = row.strip("| ").split("|")[-1].strip().replace("…batch", "'layers'")
    names = {"a": "a", "c": "c", "None": None}
    # A tuple of one entry needs a comma in Python.
    entries = [*eval(sharding.replace(")", ",)"), {"__builtins__": {}}, names)]
    weight = jax.ShapeDtypeStruct((2, 32, 48), "float32")
    (spec,), _ = select([weight], 8, side, MatrixView(1, 2))
    while entries[-1] is None:
        entries.pop()
    sizes = [axis_size(axis, spec) or 4 for axis in AXES[role]]
    assert state_partition((2, *sizes), role, spec, LEAF) == P(*entries)


def test_the_second_basis_is_sharded_as_the_other_axis():
    assert '| second basis Q, of `side="both"` | (…, n, r) | (…batch, (c, a), None) |' in PAGE
    weight = jax.ShapeDtypeStruct((2, 32, 48), "float32")
    (spec,), _ = select([weight], 8, "both", MatrixView(1, 2))
    assert role_partition("basis", spec.transposed, LEAF) == P("layers", ("c", "a"))


@pytest.mark.parametrize("residual", bench_residual_traffic.RESIDUALS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if i == STACKED else pytest.mark.slow, id=str(i))
        for i, case in enumerate(read("residual-traffic")["cases"])
    ],
)
def test_residual_traffic_is_that_of_the_results(case, residual):
    received = bench_residual_traffic.received(case["shape"], case["sharding"], residual)
    # Versions of XLA differ by a few small reductions.
    assert received == pytest.approx(case[residual], rel=0.1, abs=8)
