"""docs/memory.md: its snippets run, and its bytes are those that this library counts."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

import natgalore_jax as natgalore
from benchmarks.common.doc_tables import read
from benchmarks.memory import bench_bytes, calculator, draw_memory
from examples.common import llama
from natgalore_jax.planning import model_shapes as shapes
from natgalore_jax.planning.byte_counts import byte_count_of


PAGE = (Path(__file__).parents[2] / "docs/memory.md").read_text()


@pytest.mark.parametrize("name", ["8-bit AdamW", "GaLore in 8 bits, low-rank gradients"])
def test_figures_are_those_of_this_library(name):
    method, of = bench_bytes.METHODS[name], read("bytes")["1b"]
    tx = method.make(of["rank"])
    bill = byte_count_of(tx, shapes.llama("1b", "bfloat16"), method.low_rank_gradients)
    assert bill.bytes == of["bfloat16"][name]


def test_devices_of_the_calculator_share_the_bytes(monkeypatch):
    monkeypatch.setattr(calculator, "FRACTIONS", (8,))
    numbers = calculator.model("60m")
    state, cores = (numbers["ranks"][64][kind] for kind in ("state", "gradients"))
    full = natgalore.plan(shapes.llama("60m", "float32"), rank=64, bits=32)
    assert (state[32][0], cores["float32"][0]) == (full.bytes["state"], full.bytes["gradients"])
    for shares in (numbers["weights"]["float32"], state[32], cores["float32"], state[8]):
        for devices, share in zip(calculator.DEVICES, shares, strict=True):
            # Norms and counts are on every device.
            assert shares[0] / devices <= share < 1.02 * shares[0] / devices


def test_all_methods_are_drawn():
    assert draw_memory.SHOWN.keys() == bench_bytes.METHODS.keys()


def test_snippets_run_and_print_what_the_page_shows(capsys):
    scope: dict = {}
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(snippet, "docs/memory.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert printed.startswith(shown)
    assert int(printed.removeprefix(shown)) > 0  # the temporaries of a step


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
