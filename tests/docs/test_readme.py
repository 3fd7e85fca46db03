"""Every Python snippet of the README runs, and every figure in it is in a results file."""

import ast
import json
import re
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


def test_snippets_run_in_order(capsys):
    scope: dict = {}
    for snippet in SNIPPETS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["loss"] > 0
    # What the README says is printed, but for the conditions, whose last digits machines differ in.
    printed = re.sub(r"\de\+\d\d", "*", capsys.readouterr().out)
    (block,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert printed == re.sub(r"\de\+\d\d", "*", block)


def test_the_snippet_is_short_and_shows_the_line_it_replaces():
    lines = [line for line in SNIPPETS[0].splitlines() if line.strip()]
    assert len(lines) <= 16
    assert any(line.startswith("# tx = optax.adamw(schedule") for line in lines)


def test_three_spellings_are_one_thing():
    (snippet,) = (x for x in SNIPPETS if x.count("tx = ") == 3 and "project_back" in x)
    params = {"kernel": jax.random.normal(jax.random.key(0), (130, 140))}

    @jax.jit(static_argnums=0)
    def trained(update, state):
        def step(carry, key):
            params, state = carry
            updates, state = update({"kernel": jax.random.normal(key, (130, 140))}, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), 52)  # new bases at 0 and 50
        return jax.lax.scan(step, (params, state), keys)[0][0]["kernel"]

    scope = {"natgalore": natgalore, "optax": optax}
    results = []
    for line in ast.parse(snippet).body:
        exec(ast.unparse(line), scope)
        results.append(trained(scope["tx"].update, scope["tx"].init(params)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])  # it is one program


def test_inline_code_names_what_exists():
    for name in re.findall(r"natgalore\.(\w+)", README):
        assert hasattr(natgalore, name), name


@pytest.mark.parametrize("name", ["natural_galore", "galore", "adamw", "contrib_galore"])
def test_training_table_is_the_measured_one(name):
    figures = json.loads((ROOT / "benchmarks/results/pretrain.json").read_text())[name]
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        f"{figures['learning_rate']:g}",
        f"{figures['validation_loss']:.3f}",
        f"{figures['state_bytes'] / 1e6:.2f} MB",
        f"{figures['tokens_per_second']:,.0f}",
    ]


@pytest.mark.parametrize("size", ["60m", "130m", "350m", "1b", "7b"])
def test_memory_table_is_the_measured_one(size):
    figures = json.loads((ROOT / "benchmarks/results/memory.json").read_text())[size]
    assert figures["total"]["natural_galore"] == figures["total"]["galore"]  # one column of both
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {size} ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == str(figures["rank"])
    shares = [
        f"{figures[of][name] / figures[of]['adamw']:.2f}"
        for name in (
            "galore",
            "galore, random",
            "natural_galore, core",
            "natural_galore, window",
            "natural_galore, window, both",
        )
        for of in ("projected", "total")
    ]
    assert cells[2:] == shares


@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("AdamW", ["adamw", "adamw, 8 bits"]),
        (
            'the same, `fisher="core"`',
            [
                "natural_galore, core",
                *(f"natural_galore, core, 8 bits{x}" for x in ("", ", bases too", ", Fishers too")),
            ],
        ),
        (
            'the same, `fisher="window"`',
            [
                "natural_galore, window",
                *(
                    f"natural_galore, window, 8 bits{x}"
                    for x in ("", ", bases too", ", Fishers too")
                ),
            ],
        ),
        ("GaLore, Natural GaLore", ["galore", "galore, 8 bits", "galore, 8 bits, bases too"]),
        ('GaLore, `basis="random"`', ["galore, random", "galore, random, 8 bits"]),
    ],
)
def test_table_of_smaller_state_is_the_measured_one(label, names):
    figures = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["1b"]["projected"]
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {label} |")]
    cells = [cell.split()[0] for cell in row.strip("|").split("|")[1:] if cell.strip()]
    assert cells == [f"{figures[name] / figures['adamw']:.2f}" for name in names]
