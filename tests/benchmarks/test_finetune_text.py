"""The study of fine-tuning on texts: schedule, rounds, runs together, results."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.learning import bench_finetune_text as study
from examples.common import bert, roberta
from examples.finetuning import finetune_text, training
from tests.helpers.cases import slow


SHAPE = bert.BertConfig(
    hidden=16,
    intermediate=24,
    heads=2,
    layers=1,
    vocabulary=20,
    positions=8,
    labels=study.OUTPUTS,
    dropout=0.1,
)


def data() -> study.Data:
    random = np.random.default_rng(0)
    tokens = random.integers(4, 20, size=(60, 6)).astype(np.uint16)
    split = lambda rows: study.Split(tokens[rows], tokens[rows, 1].astype(np.int32) % 3)
    return study.Data(split(slice(0, 40)), split(slice(40, 50)), split(slice(50, 60)), 3)


def test_rates_follow_the_schedule_of_the_examples():
    config = finetune_text.Config(lr=3e-3, steps=50)
    tx = study.at_rate(head=2e-2)
    updates = {"layers": {"w": jnp.ones(())}, "classifier": {"w": jnp.ones(())}}
    state = training.TrainState(updates, (None, tx.init(updates)))
    state = study.with_rates(state, [3e-3], 50).opt_state[-1]
    state = jax.tree.map(lambda x: x[0], state)
    for step in range(50):
        found, state = tx.update(updates, state)
        for name, peak in (("layers", 3e-3), ("classifier", 2e-2)):
            # Two orders of the same float32 operations; relative to the peak.
            expected = config.schedule(peak)(step)
            np.testing.assert_allclose(found[name]["w"], expected, atol=1e-6 * peak)


def test_rounds_of_a_search():
    rates = (1.0, 2.0, 3.0, 4.0, 5.0)
    assert study.rounds(rates) == [(rate, 0) for rate in rates]
    first = [
        {"rate": rate, "seed": 0, "validation": [1 - value, value]}
        for rate, value in zip(rates, (0.1, 0.7, 0.9, 0.8, 0.2), strict=True)
    ]
    assert study.rounds(rates, first) == [(3.0, 1), (3.0, 2)]
    equal = [run | {"validation": [0.5]} for run in reversed(first)]
    assert study.rounds(rates, equal) == [(1.0, 1), (1.0, 2)]


def test_methods_are_settings_of_the_example():
    for name, method in study.METHODS.items():
        config = study.config_of(name)
        assert len(method.rates) == 5
        assert list(method.rates) == sorted(method.rates)
        rank = next((int(word) for word in name.split("-") if word.isdigit()), config.rank)
        assert config.rank == rank
        low_rank = config.optimizer in ("galore", "natural_galore")
        frozen = name == "adamw-frozen" or (low_rank and not name.endswith("all"))
        assert config.freeze_embeddings == frozen
    assert study.config_of("window-4").fisher == "window"
    config = study.config_of("natural_galore-8")  # the library's defaults
    assert (config.fisher, config.residual, config.scale) == ("none", "whitened", None)


def test_finished_searches_are_not_left(tmp_path):
    out = tmp_path / "results.jsonl"
    args = lambda **options: type(
        "Args",
        (),
        {
            "out": out,
            "tasks": list(study.TASKS),
            "methods": list(study.METHODS),
            "batches": [16, 32, 128],
            "starts": ["pretrained", "random"],
            "shard": "0/1",
            **options,
        },
    )
    assert study.left(args()) == study.searches()
    # Methods at batch 32, the main ones also at 16, at 128 and from random weights.
    runs = len(study.METHODS) + 3 * len(study.MAIN)
    assert len(set(study.searches())) == len(study.searches()) == len(study.TASKS) * runs
    search = study.searches()[0]
    runs = [
        {"rate": rate, "seed": seed, "validation": [0.5], "accuracy": accuracy, "macro_f1": 0.5}
        for rate, accuracies in ((1.0, (0.1,)), (2.0, (0.7, 0.8, 0.9)), (3.0, (0.5,)))
        for seed, accuracy in enumerate(accuracies)
    ]
    study.append(out, search._asdict() | {"runs": runs})
    assert study.left(args()) == study.searches()[1:]
    shards = [study.left(args(shard=f"{i}/4")) for i in range(4)]
    assert sorted(x for shard in shards for x in shard) == sorted(study.left(args()))
    programs = [{study.program_key(x) for x in shard} for shard in shards]
    assert sum(map(len, programs)) == len(set.union(*programs))  # each is compiled once
    assert {x.batch_size for x in study.left(args(batches=[16]))} == {16}
    assert {x.task for x in study.left(args(tasks=["r52"]))} == {"r52"}
    summary = study.summary(study.read(out), search)
    assert (summary.rate, summary.at_edge) == (2.0, False)
    assert summary.accuracy == pytest.approx(80)
    assert summary.deviation == pytest.approx(10)
    assert study.summary(study.read(out), search._replace(task="sections")) is None


@pytest.mark.parametrize(("script", "argument"), [("_text", "--list"), *slow(("", "--help"))])
def test_no_command_line_package_is_needed(script, argument):
    """The GPU machines of the study have JAX, Flax and Hugging Face's readers alone."""
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('tyro', 'matplotlib')); "
        "name = sys.argv.pop(1); runpy.run_module(name, run_name='__main__')"
    )
    module = f"benchmarks.learning.bench_finetune{script}"
    done = subprocess.run([sys.executable, "-c", code, module, argument], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"searches left" in done.stdout or b"usage" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "natural_galore-4", "window-4", "lora-4", "muon"])
def test_runs_together_equal_runs_alone(name):
    config = study.config_of(name, batch_size=8)
    config = study.replace(config, dtype="float32", refresh_every=4)
    weights = nnx.to_pure_dict(nnx.state(SHAPE.build(nnx.Rngs(0)), nnx.Param))
    weights["classifier"]["head"] = roberta.abstract_params(SHAPE)["classifier"]["head"]
    program = study.programs(config, SHAPE, weights)
    runs = [(1e-3, 0), (1e-2, 0), (1e-2, 1)]
    together = study.train(program, data(), runs, batch_size=8, epochs=2)
    for run, found in zip(runs, together, strict=True):
        (alone,) = study.train(program, data(), [run], batch_size=8, epochs=2)
        assert (found["rate"], found["seed"]) == run
        # Sums in another order, over ten steps; losses are 4.2.
        np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-4)
    assert len({json.dumps(x["losses"]) for x in together}) == 3


@pytest.mark.slow
def test_search_of_prepared_texts(tmp_path, monkeypatch, capsys):
    from examples.finetuning import fetch_text
    from tests.examples.test_finetune_text import pairs, save_encoder

    save_encoder(tmp_path / "texts/encoder")
    for split, count in (("train", 160), ("test", 40)):
        fetch_text.write(tmp_path / "texts/r52" / f"{split}.jsonl", pairs(count, seed=count))
    study.prepare(tmp_path / "texts", tmp_path / "study", length=10)
    loaded = study.load(tmp_path / "study", "r52")
    assert loaded.train.tokens.shape == (144, 10)
    assert (len(loaded.validation.labels), len(loaded.test.labels)) == (16, 40)
    arguments = ["--tasks", "r52", "--methods", "adamw", "--batches", "32"]
    arguments += ["--starts", "pretrained", "--epochs", "2"]
    arguments += ["--data", str(tmp_path / "study"), "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    study.main()
    (found,) = study.read(Path(tmp_path / "out.jsonl"))
    assert len(found["runs"]) == 5 + 2
    assert "adamw r52 accuracy" in capsys.readouterr().out
    monkeypatch.setattr(study, "run", None)  # everything is done
    study.main()
