"""docs/memory.md: its snippets run and print what they say, and its tables are the counted ones."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.memory import bench_bytes, draw_memory
from examples.common import llama
from natgalore_jax.planning import model_shapes as shapes
from natgalore_jax.planning.byte_counts import byte_count_of


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/memory.md").read_text()
FIGURES = json.loads((ROOT / "benchmarks/results/bytes.json").read_text())
GB = "{:.1f} GB".format
CASES = [(size, dtype) for size in ("1b", "7b") for dtype in ("float32", "bfloat16")]


def rows(name):
    """The cells of each row of a table that begins with `name`, without it."""
    found = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in found]


@pytest.mark.parametrize("name", bench_bytes.METHODS)
def test_tables_are_the_counted_ones(name):
    (totals,) = rows(name)
    assert totals == [GB(sum(FIGURES[size][dtype][name].values()) / 1e9) for size, dtype in CASES]


def test_what_a_compiler_for_cpus_sets_aside():
    held = FIGURES["1b"]["temporaries"]
    of = [GB(held[name] / 1e9) for name in ("8-bit AdamW", "AdamW")]
    assert f"set aside {of[0]} for 8-bit AdamW's step and {of[1]} for AdamW's" in PAGE


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


METHODS = ("adamw", "adamw_8bit", "galore_cores", "galore_8bit_cores")


@pytest.mark.parametrize("name", METHODS)
def test_steps_with_8_bit_state(name):
    methods = results("quantized-1b")["layouts"]["data"]["methods"]
    of, speed = methods[name], methods["adamw"]["tokens_per_second"]
    sizes = [GB(of[kind] / 1e9) for kind in ("argument_bytes", "temp_bytes", "peak_bytes")]
    cells = [f"{of['tokens_per_second']:,.0f}", f"{of['tokens_per_second'] / speed:.2f}", *sizes]
    assert rows(f"`{name}`") == [cells]


def test_time_and_peak_of_8_bits():
    methods = results("quantized-1b")["layouts"]["data"]["methods"]
    time = {name: of["median_step_seconds"] for name, of in methods.items()}
    ratios = [time["adamw_8bit"] / time["adamw"], time["galore_8bit_cores"] / time["galore_cores"]]
    assert f"takes {ratios[0]:.2f} and {ratios[1]:.2f} of the time" in PAGE
    adamw, adamw_8bit, cores, cores_8bit = (methods[name]["peak_bytes"] / 1e9 for name in METHODS)
    readme = (ROOT / "README.md").read_text()
    assert (
        f"takes {ratios[1]:.2f} of the time with float32 state (AdamW's {ratios[0]:.2f})" in readme
    )
    assert f"{GB(cores_8bit)} at most for {cores:.1f} ({adamw_8bit:.1f} for {adamw:.1f})" in readme


def test_seven_billion():
    found = results("seven-billion")
    last = found["records"][-1]
    peak, limit = last["peak_bytes_in_use"], found["limit_bytes"]
    assert peak < limit == 24 * 2**30
    assert f"**{GB(peak / 1e9)} at most, {peak / 2**30:.1f} GiB**" in PAGE
    assert f"to {last['last_validation_loss']:.2f} after {last['step']} steps" in PAGE
    readme = (ROOT / "README.md").read_text()
    assert f"in 24 GiB, {peak / 2**30:.1f} GiB at its peak" in readme
    for text in (PAGE, readme):
        assert f"{round(last['tokens_per_second'], -2):,.0f} tokens" in text


@pytest.mark.parametrize("name", ["8-bit AdamW", "GaLore in 8 bits, low-rank gradients"])
def test_figures_are_those_of_this_library(name):
    method, of = bench_bytes.METHODS[name], FIGURES["1b"]
    tx = method.make(of["rank"])
    bill = byte_count_of(tx, shapes.llama("1b", "bfloat16"), method.low_rank_gradients)
    assert bill.bytes == of["bfloat16"][name]


def test_all_methods_are_drawn():
    assert draw_memory.SHOWN.keys() == bench_bytes.METHODS.keys()


def test_snippets_run_and_print_what_is_said(capsys):
    scope: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (said,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(snippets[0], "docs/memory.md", "exec"), scope)
    assert capsys.readouterr().out == said
    for snippet in snippets[1:]:
        exec(compile(snippet, "docs/memory.md", "exec"), scope)
    assert int(capsys.readouterr().out) > 0


@pytest.mark.slow
def test_the_benchmark_counts_and_compiles(small, monkeypatch):
    monkeypatch.setattr(shapes, "LLAMA", {"tiny": shapes.Sizes(32, 88, 2, 256)})
    two_layers = dataclasses.replace(llama.CONFIGS["tiny"], layers=2)
    monkeypatch.setitem(llama.CONFIGS, "tiny", two_layers)
    methods = ("AdamW", "GaLore in 8 bits, low-rank gradients")
    of = {name: bench_bytes.METHODS[name] for name in methods}
    monkeypatch.setattr(bench_bytes, "METHODS", of)
    words = "--sizes tiny --compiled tiny --seq-len 8 --out bytes.json"
    monkeypatch.setattr(sys, "argv", ["bench_bytes.py", *words.split()])
    bench_bytes.main()
    found = json.loads(Path("bytes.json").read_text())["tiny"]
    assert found["temporaries"].keys() == of.keys()
    assert all(found["temporaries"].values())
    assert found["float32"]["AdamW"]["state"] == 2 * found["float32"]["AdamW"]["weights"] + 4
