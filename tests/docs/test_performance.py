"""docs/performance.md: its tables are the measured ones."""

import itertools
import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/performance.md").read_text()


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def cells(section, first):
    """Of the row of a section that begins with `first`, without it."""
    (text,) = [part for part in PAGE.split("\n## ") if part.startswith(section)]
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


OURS = ("galore", "natural_galore_fisher")
TREES = results("step")["trees"]


def is_row(*cells):
    return f"\n| {' | '.join(cells)} |\n" in PAGE


@pytest.mark.parametrize("name", ["adamw", *OURS, "adafactor", "lion"])
def test_the_update_alone(name):
    of, adamw = TREES[0]["methods"][name], TREES[0]["methods"]["adamw"]
    assert is_row(
        f"`{name}`",
        f"{of['hot_ms']:.2f}",
        f"{of['hot_ms'] / adamw['hot_ms']:.2f}",
        f"{of['slowest_ms'] / of['median_ms']:.2f}",
        f"{of['first_ms']:.0f}",
        f"{of['compile_seconds']:.1f}",
        f"{of['temp_bytes'] / 1e6:.0f} MB",
        f"{of['state_bytes'] / 1e6:,.0f} MB",
    )


@pytest.mark.parametrize("tree", TREES[:3], ids=lambda t: f"{t['dtype']}-{t['decay']}")
def test_the_update_alone_in_variants(tree):
    adamw, *ours = (tree["methods"][name]["hot_ms"] for name in ("adamw", *OURS))
    ratios = (f"{x / adamw:.2f}" for x in ours)
    assert is_row(tree["dtype"], f"{tree['decay']}", f"{adamw:.2f}", *ratios)


def test_the_update_alone_on_an_h100():
    ratios = []
    for tree in results("step-h100")["trees"]:
        adamw, *ours = (tree["methods"][name]["hot_ms"] for name in ("adamw", *OURS))
        ratios.append(" and ".join(f"{x / adamw:.2f}" for x in ours))
    assert f"these ratios were better: {', '.join(ratios)} (" in PAGE
    assert f"on an H100 {ratios[0]}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("tree", TREES[3:], ids=lambda t: t["tree"])
@pytest.mark.parametrize("name", ["adamw", *OURS, "contrib_galore", "muon"])
def test_the_update_alone_of_layers_apart(tree, name):
    of, *peers = (tree["methods"][x] for x in (name, "adamw", "contrib_galore"))
    assert is_row(
        tree["tree"],
        f"`{name}`",
        f"{of['hot_ms']:.2f}",
        *(f"{of['hot_ms'] / peer['hot_ms']:.2f}" for peer in peers),
        f"{of['slowest_ms'] / of['median_ms']:.1f}",
        f"{of['refreshes_ms']:,.0f}",
        f"{of['compile_seconds']:.1f}",
    )


def test_how_the_update_grows():
    for rows in results("step")["scaling"].values():
        for row in rows:
            sizes = (f"{row[name]}" for name in ("width", "rank", "layers"))
            times = (f"{row['methods'][name]['hot_ms']:.2f}" for name in ("adamw", *OURS))
            assert is_row(*sizes, *times)


def test_the_update_alone_with_a_residual():
    (tree,) = results("step-residual")["trees"]
    hot = {name: of["hot_ms"] for name, of in tree["methods"].items()}
    longer = 100 * (hot["galore_isotropic"] / hot["galore"] - 1)
    assert f"hot step is {longer:.0f} % longer" in PAGE
    assert f"takes {hot['natural_galore']:.0f} ms for `galore`'s {hot['galore']:.1f}" in PAGE


@pytest.mark.parametrize(("size", "words"), [("60m", "at 60m"), ("1b", "at 1b and rank 512")])
def test_training_steps_of_other_sizes(size, words):
    methods = results(f"train-{size}")["layouts"]["data"]["methods"]
    speed = {name: of["tokens_per_second"] for name, of in methods.items()}
    ratios = " and ".join(f"{speed[name] / speed['adamw']:.2f}" for name in OURS)
    assert re.search(rf"{ratios}( of AdamW's tokens/s)? {words}", PAGE)


@pytest.mark.parametrize("name", ["adamw", *OURS])
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


def test_a_whole_training_step_with_a_residual():
    methods = results("train-residual")["layouts"]["data"]["methods"]
    names = ("galore", "galore_isotropic", "natural_galore")
    ratios = [
        f"{methods[name]['tokens_per_second'] / methods['adamw']['tokens_per_second']:.2f}"
        for name in names
    ]
    assert f"{ratios[0]} of AdamW's tokens/s, {ratios[1]} with an isotropic" in PAGE
    assert f"and {ratios[2]} with a whitened one" in PAGE
    (tree,) = results("step-residual")["trees"]
    refreshes = tree["methods"]["galore"]["refreshes_ms"]  # all matrices once, in 200 steps
    more = refreshes * (1 / 50 - 1 / 200)
    part = more / methods["natural_galore"]["mean_step_seconds"] / 10
    assert f"take {refreshes:.0f} ms together" in PAGE
    assert f"cost {more:.1f} ms a step, {part:.1f} % of its time" in PAGE


CORES = (ROOT / "docs/low-rank-gradients.md").read_text()


MEASURED = {  # label of the table's rows: file
    f"{size}, r = {rank}{label}": f"cores-{size}{'' if rank == 128 else f'-{rank}'}{name}"
    for size, rank in itertools.product(("350m", "1b"), (128, 256, 512))
    for label, name in (("", ""), (", 8 micro-batches", "-8"))
}


@pytest.mark.parametrize(("label", "name"), MEASURED.items())
@pytest.mark.parametrize("method", ["adamw", "galore", "galore_cores"])
def test_gradients_that_are_cores(label, name, method):
    methods = results(name)["layouts"]["data"]["methods"]
    of, adamw = methods[method], methods["adamw"]
    cells = (
        label,
        f"`{method}`",
        f"{of['tokens_per_second']:,.0f}",
        f"{of['tokens_per_second'] / adamw['tokens_per_second']:.2f}",
        f"{of['slowest_step_seconds'] / of['median_step_seconds']:.1f}",
        f"{of['temp_bytes'] / 1e6:,.0f} MB",
        f"{of['peak_bytes'] / 1e6:,.0f} MB",
    )
    assert f"\n| {' | '.join(cells)} |\n" in CORES


def test_what_cores_take_in_a_period():
    """Of 200 steps, one of them the refresh."""
    to = {"galore": [], "adamw": []}
    peaks = []
    for name in MEASURED.values():
        methods = results(name)["layouts"]["data"]["methods"]
        seconds = {
            method: 199 * of["median_step_seconds"] + of["slowest_step_seconds"]
            for method, of in methods.items()
        }
        for other, ratios in to.items():
            ratios.append(seconds["galore_cores"] / seconds[other])
        peaks.append(methods["galore_cores"]["peak_bytes"] / methods["adamw"]["peak_bytes"])
    times = [f"{min(of):.2f} to {max(of):.2f}" for of in to.values()]
    assert f"takes {times[0]} of `galore`'s time and {times[1]} of AdamW's" in CORES
    assert f"with {min(peaks):.2f} to {max(peaks):.2f} of AdamW's peak" in CORES


def test_what_cores_move_and_hold():
    methods = results("cores-1b")["layouts"]["data"]["methods"]
    ours, adamw = methods["galore_cores"], methods["adamw"]
    time = ours["median_step_seconds"] / adamw["median_step_seconds"]
    peaks = [f"{of['peak_bytes'] / 1e9:.1f} GB" for of in (ours, adamw)]
    words = f"took {time:.2f} of AdamW's time on one H200, and {' at most instead of '.join(peaks)}"
    assert words in (ROOT / "README.md").read_text()
    moved = results("cores-moved")["layouts"]["data"]["methods"]
    ours, adamw = (
        moved[name]["collectives"]["every step"]["all-reduce"]["bytes"] / 1e6
        for name in ("galore_cores", "adamw")
    )
    words = f"sums {ours:,.0f} MB in place of AdamW's {adamw:,.0f} MB, {ours / adamw:.2f} of it"
    assert words in CORES
    assert ours / adamw < 0.35


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


@pytest.mark.parametrize("name", ["adamw", *OURS, "contrib_galore"])
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
    for tree in TREES[:2]:
        of = {name: row["hot_ms"] for name, row in tree["methods"].items()}
        assert " and ".join(f"{of[name] / of['adamw']:.2f}" for name in OURS) in readme
