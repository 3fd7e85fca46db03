"""docs/experiments.md: what fine-tuning costs is what was measured."""

import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/experiments.md").read_text()
TASKS = json.loads((ROOT / "benchmarks/results/finetune.json").read_text())["tasks"]
NAMES = {"roberta-base": "RoBERTa-base", "tinyllama": "TinyLlama 1.1B"}


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("method", ["adamw", "lora", "natural_galore"])
def test_a_step_of_fine_tuning(task, method):
    methods = TASKS[task]["methods"]
    of, adamw = methods[method], methods["adamw"]
    ratio = lambda kind: f"{of[kind] / adamw[kind]:.2f}"
    held = [
        f"{of[f'{kind}_bytes'] / 1e6:,.0f} MB" for kind in ("weights", "state", "temp", "total")
    ]
    cells = [NAMES[task], f"`{method}`", f"{of['tokens_per_second']:,.0f}"]
    cells += [ratio("tokens_per_second"), *held, ratio("total_bytes")]
    assert f"\n| {' | '.join(cells)} |\n" in PAGE


def test_what_is_said_of_lora():
    bytes_of = lambda task, method: TASKS[task]["methods"][method]["total_bytes"]
    more = [bytes_of(task, "natural_galore") / bytes_of(task, "lora") - 1 for task in NAMES]
    assert f"needs {100 * more[0]:.0f} and {100 * more[1]:.0f} % more" in PAGE
    shares = []
    for task in NAMES:
        methods = TASKS[task]["methods"]
        shares.append(
            methods["lora"]["trained_parameters"] / methods["adamw"]["trained_parameters"]
        )
    assert f"a state for {100 * shares[0]:.1f} and {100 * shares[1]:.0f} % of them" in PAGE
    assert [(of["rank"], of["batch_size"], of["length"]) for of in TASKS.values()] == [
        (8, 16, 128),
        (32, 32, 512),
    ]
