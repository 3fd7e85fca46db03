"""docs/sharding.md: its recipes run, and its tables say what the code does and was measured."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from examples.common import llama
from examples.pretraining import llama_sharding
from natgalore_jax.selection.select import MatrixView, select
from natgalore_jax.sharding.partitioning import role_partition
from tests.helpers.hlo import collectives


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/sharding.md").read_text()
RECIPES = dict(re.findall(r"\n###? ([^\n]+)\n(.*?)(?=\n###? |\Z)", PAGE, flags=re.DOTALL))
START = "Recipes"


def snippets(recipe):
    return re.findall(r"```python\n(.*?)```", RECIPES[recipe], flags=re.DOTALL)


@pytest.mark.slow
def test_the_recipes_run():
    scope: dict = {}
    ran = [recipe for recipe in RECIPES if snippets(recipe)]
    assert ran[0] == START
    assert len(ran) == 6
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
        ("core, moments", "linear", "left"),
        ("core, moments", "square", "left"),
        ('cores and moments of `side="both"`', "linear", "both"),
        ("window of", "window", "left"),
        ("its Gram matrix", "gram", "left"),
        ("its Gram matrix", "fisher", "left"),
        ("its Gram matrix", "root", "left"),
        ("count of refreshes", "scalar", "left"),
    ],
)
def test_the_table_is_the_rule(words, role, side):
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {words}")]
    said = row.strip("| ").split("|")[-1].strip(" ()").replace("…batch", "layers")
    entries = [None if name == "None" else name for name in said.split(", ")]
    weight = jax.ShapeDtypeStruct((2, 32, 48), "float32")
    (spec,), _ = select([weight], 8, side, MatrixView(1, 2))
    while entries[-1] is None:
        entries.pop()
    assert role_partition(role, spec, P("layers", "a", "c")) == P(*entries)


def test_the_second_basis_lies_as_the_other_axis():
    assert '| second basis Q, of `side="both"` | (…, n, r) | (…batch, c, None) |' in PAGE
    weight = jax.ShapeDtypeStruct((2, 32, 48), "float32")
    (spec,), _ = select([weight], 8, "both", MatrixView(1, 2))
    assert role_partition("basis", spec.transposed, P("layers", "a", "c")) == P("layers", "c")


def test_the_offloading_table_is_the_measured_one():
    results = json.loads((ROOT / "benchmarks/results/offload.json").read_text())
    for name, figures in results["variants"].items():
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
        gib = lambda key, figures=figures: f"{figures[key] / 2**30:.2f} GiB"
        ms = lambda key, figures=figures: f"{figures[key]:.0f} ms"
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
            gib("state_on_device"),
            gib("state_on_host"),
            gib("device_bytes_one_program"),
            ms("milliseconds_one_program"),
            gib("device_bytes_two_programs"),
            ms("milliseconds_two_programs"),
        ]


@pytest.mark.parametrize(
    ("label", "spec", "shape"),
    [
        pytest.param("fsdp, none", P("fsdp"), (256, 512), marks=pytest.mark.slow),
        pytest.param("none, fsdp", P(None, "fsdp"), (256, 512), marks=pytest.mark.slow),
        pytest.param("fsdp, tensor", P("fsdp", "tensor"), (256, 512), marks=pytest.mark.slow),
        ("four layers, fsdp, none", P(None, "fsdp"), (4, 256, 512)),
        pytest.param("four layers, on fsdp", P("fsdp"), (4, 256, 512), marks=pytest.mark.slow),
    ],
)
def test_what_a_residual_moves_is_what_is_said(label, spec, shape):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    lies = NamedSharding(mesh, spec)
    params = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=lies)

    def moved(residual):
        tx = natgalore.galore(1e-2, 16, refresh_every=4, residual=residual)
        tx = natgalore.sharded(tx, {"kernel": lies})
        where = natgalore.state_shardings(tx, {"kernel": params}, {"kernel": lies})
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            *(jax.eval_shape(tx.init, {"kernel": params}), where),
        )
        step = jax.jit(tx.update, out_shardings=({"kernel": lies}, where))
        text = step.lower({"kernel": params}, state, {"kernel": params}).compile().as_text()
        return round(sum(one.times * one.received for one in collectives(text) if one.hot))

    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {label} |")]
    said = [int(cell.replace(",", "")) for cell in row.strip("|").split("|")[1:]]
    isotropic, whitened = moved("isotropic"), moved("whitened")
    assert isotropic == pytest.approx(said[0], rel=0.1, abs=8)
    assert whitened == pytest.approx(said[1], rel=0.1, abs=8)


def test_the_state_of_a_device_under_fsdp_is_what_is_said():
    params = llama.abstract_params(dataclasses.replace(llama.CONFIGS["350m"], scan=True))
    lies = llama_sharding.param_shardings(llama_sharding.make_mesh((1, 8, 1)), params)

    def megabytes(tx, zero_axis=None):
        where = natgalore.state_shardings(tx, params, lies, zero_axis=zero_axis)
        arrays = zip(*map(jax.tree.leaves, (jax.eval_shape(tx.init, params), where)), strict=True)
        held = (math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in arrays)
        return f"{sum(held) / 1e6:.0f} MB"

    tx = natgalore.natural_galore(1e-3, 256)
    for page in (PAGE, (ROOT / "README.md").read_text()):
        (said,) = [line for line in page.splitlines() if "instead of 671 MB" in line]
        assert f"{megabytes(tx, 'fsdp')} " in said
        assert f"instead of {megabytes(tx)}" in said
        assert megabytes(optax.adamw(1e-3)) in said


def test_the_table_of_two_gpus_is_the_measured_one():
    results = json.loads((ROOT / "benchmarks/results/sharded.json").read_text())
    said = {
        tuple(cells[:2]): cells[2:]
        for line in PAGE.splitlines()
        if len(cells := [cell.strip(" `") for cell in line.strip("|").split("|")]) == 8
    }
    full_names = {"contrib_galore": "optax.contrib.galore", "adamw_unrolled": "adamw"}
    compared = 0
    for layout, measured in results["layouts"].items():
        methods = measured["methods"]
        for name, of in methods.items():
            unrolled = name in ("contrib_galore", "adamw_unrolled")
            adamw = methods["adamw_unrolled" if unrolled else "adamw"]
            travels = [
                sum(kind["bytes"] for kind in of["collectives"].get(when, {}).values()) / 1e6
                for when in ("every step", "refresh")
            ]
            row = said[
                f"{layout}, unrolled" if unrolled else layout,
                full_names.get(name, name),
            ]
            assert row == [
                f"{of['tokens_per_second']:,.0f}",
                f"{of['tokens_per_second'] / adamw['tokens_per_second']:.2f}",
                f"{of['slowest_step_seconds'] / of['median_step_seconds']:.2f}",
                f"{of['argument_bytes'] / 1e6:,.0f} MB",
                *(f"{moved:,.0f} MB" for moved in travels),
            ]
            compared += 1
    assert compared == 11
    first = results["layouts"]["fsdp"]["methods"]
    assert f"takes {first['contrib_galore']['first_step_seconds']:.1f} s" in PAGE
    assert f"AdamW's {first['adamw_unrolled']['first_step_seconds']:.1f} s" in PAGE
