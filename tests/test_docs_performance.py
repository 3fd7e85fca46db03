"""docs/performance.md: its tables are the measured ones."""

import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/performance.md").read_text()


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def cells(section, first):
    """Of the row of a section that begins with `first`, without it."""
    (text,) = [part for part in PAGE.split("\n## ") if part.startswith(section)]
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.mark.parametrize("name", ["adamw", "galore", "natural_galore", "adafactor", "lion"])
def test_the_update_alone(name):
    (tree,) = results("step")["trees"]
    of, adamw = tree["methods"][name], tree["methods"]["adamw"]
    assert cells("The update alone", f"`{name}`") == [
        f"{of['hot_ms']:.2f}",
        f"{of['hot_ms'] / adamw['hot_ms']:.2f}",
        f"{of['slowest_ms'] / of['median_ms']:.2f}",
        f"{of['first_ms']:.0f}",
        f"{of['temp_bytes'] / 1e6:.0f} MB",
        f"{of['state_bytes'] / 1e6:,.0f} MB",
    ]


@pytest.mark.parametrize("tree", results("step-variants")["trees"], ids=lambda t: t["dtype"])
def test_the_update_alone_in_variants(tree):
    adamw, *ours = (
        tree["methods"][name]["hot_ms"] for name in ("adamw", "galore", "natural_galore")
    )
    cells = [tree["dtype"], f"{tree['decay']}", f"{adamw:.2f}", *(f"{x / adamw:.2f}" for x in ours)]
    assert f"| {' | '.join(cells)} |\n" in PAGE


@pytest.mark.parametrize("name", ["adamw", "galore", "natural_galore"])
def test_a_whole_training_step(name):
    methods = results("train-350m")["layouts"]["data"]["methods"]
    of, adamw = methods[name], methods["adamw"]
    assert cells("A whole training step", f"`{name}`") == [
        f"{of['tokens_per_second']:,.0f}",
        f"{of['tokens_per_second'] / adamw['tokens_per_second']:.2f}",
        f"{of['slowest_step_seconds'] / of['median_step_seconds']:.2f}",
        f"{1e3 * of['first_step_seconds']:.0f}",
        f"{of['argument_bytes'] / 1e6:,.0f} MB",
    ]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("tensor-float32 (`HIGH`, what the library takes)", "high"),
        ("three bfloat16 products", "BF16_BF16_F32_X3"),
        ("three tensor-float32 products", "TF32_TF32_F32_X3"),
        ("float32 (`HIGHEST`)", "highest"),
    ],
)
def test_which_arithmetic(words, name):
    of = results("matmul")["350m, float32"][name]
    assert cells("Which arithmetic", words) == [
        f"{of['down_ms']:.2f}",
        f"{of['up_ms']:.2f}",
        f"{of['down_error']:.0e}",
        f"{of['up_error']:.0e}",
    ]


@pytest.mark.parametrize("name", ["adamw", "galore", "natural_galore", "contrib_galore"])
def test_on_a_cpu(name):
    (tree,) = results("step-cpu")["trees"]
    of, theirs = tree["methods"][name], tree["methods"]["contrib_galore"]
    assert cells("On a CPU", f"`{name.replace('contrib_', 'optax.contrib.')}`") == [
        f"{of['hot_ms']:.2f}",
        f"{of['hot_ms'] / theirs['hot_ms']:.2f}",
        f"{of['slowest_ms'] / of['median_ms']:.2f}",
        f"{of['slowest_ms']:.1f}",
    ]


def test_the_readme_says_the_same_of_an_update():
    readme = (ROOT / "README.md").read_text()
    for tree in results("step-variants")["trees"]:
        if tree["dtype"] == "float32":
            of = {name: row["hot_ms"] for name, row in tree["methods"].items()}
            ratios = (f"{of[name] / of['adamw']:.2f}" for name in ("galore", "natural_galore"))
            assert " and ".join(ratios) in readme
