"""The study of function calling: rounds, settings of the methods, runs on a small model."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.learning import bench_function_calling as study
from examples.common import data, hugging_face
from examples.finetuning import finetune_function_calling as calling, plans, records, tiny_assets


def line(rate: float, seed: int, validation: float, loss: float = 1.0) -> dict[str, float]:
    return {"rate": rate, "seed": seed, "validation": validation, "validation_loss": loss}


def test_rounds_of_a_method():
    rates = study.METHODS["adamw"].rates
    found = []
    for rate, success in zip(rates, (0.1, 0.4, 0.4, 0.3, 0.0), strict=True):
        assert study.next_run("adamw", found) == (rate, 0)
        found.append(line(rate, 0, success, loss=rate))
    assert study.best_rate(found) == rates[1]  # as much success as the third, less loss
    assert study.next_run("adamw", found) == (rates[1], 1)
    found.append(line(rates[1], 1, 0.0))  # other seeds do not choose
    assert study.next_run("adamw", found) == (rates[1], 2)
    assert study.next_run("adamw", [*found, line(rates[1], 2, 0.0)]) is None
    diverged = [line(rates[0], 0, 0.0, loss=float("nan")), line(rates[1], 0, 0.0, loss=9.0)]
    assert study.best_rate(diverged) == rates[1]
    assert study.next_run("untuned", []) == (0.0, 0)
    assert study.next_run("untuned", [line(0.0, 0, 0.0)]) is None


def test_methods_are_settings_of_the_example():
    for name, method in study.METHODS.items():
        if name == study.UNTUNED:
            continue
        config = study.config_of(name, batch_size=4, dtype="float32")
        assert (config.batch_size, config.dtype) == (4, "float32")
        assert list(method.rates) == sorted(set(method.rates))
        assert len(method.rates) == 5
        assert f"-{config.rank}" in name or name in ("adamw", "muon")
        assert config.freeze_embeddings == (config.optimizer in ("galore", "natural_galore"))
        assert config.scale is None  # that of the optimizer
    kinds = {
        name: (c.fisher, c.residual)
        for name in ("core-8", "natural_galore-8")
        for c in [study.config_of(name)]
    }
    assert kinds == {"core-8": ("core", "none"), "natural_galore-8": ("none", "whitened")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model with records of ten functions."""
    folder = tmp_path_factory.mktemp("calls")
    texts = list(tiny_assets.docstrings(data.standard_library()[::64]))
    tiny_assets.save_llama(folder / "model", tiny_assets.train_tokenizer(texts))
    for split, names in (("train", range(10)), ("test", range(10, 13))):
        rows = [
            {
                "messages": [{"role": "user", "content": f"Do f{name} with {value}"}],
                "plan": plans.text_of([(f"f{name}", {"x": value})]),
                "accepted": [{"x": [value]}],
            }
            for name in names
            for value in range(6)
        ]
        records.write(folder / "records" / f"{split}.jsonl", rows)
    return folder


def test_validation_calls_other_functions(folder):
    loaded = study.load(folder, length=64, dtype="float32")
    parts = (loaded.inputs.train, loaded.validation, loaded.inputs.test)
    assert [len(part.examples) for part in parts] == [54, 6, 18]
    names = [{c.name for e in part.examples for c in plans.parse(e.plan)} for part in parts]
    assert len(set.union(*names)) == sum(map(len, names)) == 13
    config, weights = hugging_face.read_llama(folder / "model")
    assert loaded.inputs.shape.layers == config.layers
    stacked = hugging_face.stacked(weights)
    jax.tree.map(np.testing.assert_array_equal, loaded.inputs.weights, stacked)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adamw", "lora-8", "natural_galore-8", "core-8", "muon"])
def test_rate_in_the_state_is_the_rate_of_the_example(folder, method):
    """Three steps of the study and of the example's own optimizer and schedule."""
    loaded, rate, steps = study.load(folder, 64, "float32").inputs, 1e-3, 3
    config = study.config_of(method, batch_size=8, dtype="float32")
    program = study.compiled(config, loaded)
    example = calling.Config(
        **study.METHODS[method].settings,
        lr=rate,
        batch_size=8,
        refresh_every=50,
        scale=None,
        steps=steps,
    )
    inputs = loaded._replace(summary={"sha256": ""})
    job = calling.make_job(example.runs()[0], inputs)
    state = study.with_rate(program.functions.init(jax.random.key(0)), rate, steps)
    other = job.init(jax.random.key(0))
    for step in range(1, steps + 1):
        state, loss = program.step(state, study.batch_of(loaded.train, 8, 0, step))
        other, expected = job.train_step(other, job.batch(step))
        # The same products; rounding of lr times an update of up to 1e-3.
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, other.params
    )


@pytest.mark.slow
def test_study_continues_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    given = f"--data {folder} --out {out} --steps 2 --batch-size 8 --length 64 --judged 4"

    def call(arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["bench", *given.split(), *arguments.split()])
        study.main()
        return capsys.readouterr().out

    call("--methods untuned --dtype float32")
    printed = call("--methods untuned,galore-8 --dtype float32")
    assert printed.count("galore-8 rate") == 7
    assert "untuned" not in printed
    found = study.read(out)
    assert [run["method"] for run in found] == ["untuned"] + ["galore-8"] * 7
    assert [run["seed"] for run in found[1:]] == [0] * 5 + [1, 2]
    assert len({run["rate"] for run in found[6:]}) == 1
    for run in found[1:]:
        assert run["train_steps"] == 2
        assert 0 < run["state_bytes"] < run["weights_bytes"] < run["peak_bytes"]
        assert 0 <= run["test"] <= run["test_without_arguments"] <= 1
        assert run["environment"]["jax"]
    # The same batches at another rate: the first step begins at rate 0 and changes nothing.
    assert len({run["validation_loss"] for run in found[1:6]}) == 5
    assert len({run["losses"][0] for run in found[6:]}) == 2
    assert call("--methods untuned,galore-8 --dtype float32") == ""
    assert call("--methods untuned,galore-8 --dtype float32 --list") == ""
    assert "adamw: next is rate 2e-05, seed 0" in call("--dtype float32 --list")
    assert "galore-8: next is rate 5e-05" in call("--list")  # other settings are other runs
    printed = call("--dtype float32 --show")
    assert "untuned" in printed
    assert "galore-8" in printed
    with pytest.raises(SystemExit):
        call("--methods sgd")
    assert "no method 'sgd': choose from untuned, adamw" in capsys.readouterr().err


@pytest.mark.slow
def test_no_command_line_package_is_needed(tmp_path):
    """The GPU machines of the study have JAX, Flax and Hugging Face's readers alone."""
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('tyro', 'matplotlib')); "
        "import examples.finetuning.fetch_calls; "
        "runpy.run_module('benchmarks.learning.bench_function_calling', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "--list", "--out", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"untuned: next is rate 0, seed 0" in done.stdout
