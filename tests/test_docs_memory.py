"""docs/memory.md: its snippets run and print what they say, and its tables are the counted ones."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from natgalore_jax import shapes
from natgalore_jax.counts import bill_of


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import bench_bytes
import draw_memory
import llama


ROOT = Path(__file__).parents[1]
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
    totals, beside = rows(name)
    assert totals == [GB(sum(FIGURES[size][dtype][name].values()) / 1e9) for size, dtype in CASES]
    held, counted = FIGURES["1b"]["temporaries"][name], FIGURES["1b"]["float32"][name]
    at_rest = counted["weights"] + counted["state"]
    assert beside == [GB(held / 1e9), GB((held + at_rest) / 1e9)]


@pytest.mark.parametrize("name", ["8-bit AdamW", "GaLore in 8 bits, low-rank gradients"])
def test_figures_are_those_of_this_library(name):
    method, of = bench_bytes.METHODS[name], FIGURES["1b"]
    tx = method.make(of["rank"])
    bill = bill_of(tx, shapes.llama("1b", "bfloat16"), method.low_rank_gradients)
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
