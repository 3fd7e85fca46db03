"""Fine-tuning on TinyAgent: prompts, loss, records, command line."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from examples.common import data, hugging_face, llama, run_log
from examples.finetuning import finetune_function_calling as calling, tiny_assets, tinyagent
from examples.pretraining import generate
from tests.helpers.cases import slow
from tests.helpers.example_runs import contents, refused


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Folder with a tiny Llama and plans."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_assets.save_plans(folder / "plans")
    texts = list(tiny_assets.docstrings(data.standard_library()[::8]))
    tiny_assets.save_llama(folder / "llama", tiny_assets.train_tokenizer(texts))
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, tiny):
    """Runs the command line on the tiny plans in a temporary folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        given = ["--model", str(tiny / "llama"), "--data", str(tiny / "plans")]
        given += ["--lr", "3e-3", "--rank", "16", "--batch-size", "16", "--judged", "16"]
        monkeypatch.setattr(sys, "argv", ["finetune_function_calling.py", *given, *arguments])
        try:
            calling.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


class TestFunctionCalling:
    @pytest.mark.parametrize("optimizer", ["adamw", *slow("natural_galore")])
    def test_generate_reads_the_exported_model(self, run, capsys, tiny, optimizer):
        arguments = ["--optimizer", optimizer, "--steps", "3", "--judged", "1"]
        assert run(*arguments, "--out", "here") == 0
        first, *_, last = run_log.read(Path("here/log.jsonl")).records
        assert first["metrics"] == {"success": 0, "success without arguments": 0}
        assert last["step"] == 3
        assert last["validation_loss"] < first["validation_loss"]
        assert "success without arguments" in capsys.readouterr().out
        config, saved = hugging_face.read_llama(Path("here/model"))
        _, initial = hugging_face.read_llama(tiny / "llama")
        assert config == hugging_face.llama_config(tiny / "llama")
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), saved, initial)
        assert min(jax.tree.leaves(moved)) > 0
        assert generate.read(Path("here")).config == config

    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", ["natural_galore", "adamw", "lora"])
    def test_plans_are_learned(self, run, tiny, optimizer):
        assert run("--optimizer", optimizer, "--epochs", "60", "--out", "here") == 0
        first, *_, last = run_log.read(Path("here/log.jsonl")).records
        assert first["metrics"]["success"] == 0
        assert last["metrics"]["success"] > 0.8

        # generate.py reads the exported model and generates a plan for a test record.
        writer = generate.read(Path("here"))
        record = json.loads((tiny / "plans/testing_data.json").read_text())
        example = tinyagent.example(next(iter(record.values())))
        tokens = [0, *writer.encode(calling.prompt(example))]
        written = generate.generate(
            writer.config, writer.params, tokens, count=80, temperature=0.0, seed=0, end=writer.end
        )
        assert writer.decode(list(written)).endswith("join()<END_OF_PLAN>")

    def test_loss_covers_plan_tokens_only(self, tiny):
        config, params = hugging_face.read_llama(tiny / "llama")
        tokenizer = hugging_face.read_tokenizer(tiny / "llama", config.vocabulary)
        found = tinyagent.read(tiny / "plans/testing_data.json").records
        split = calling.tokenized(tokenizer, found, 100)
        for row, of_plan, before, example in zip(
            split.tokens, split.of_plan, split.prompts, found, strict=True
        ):
            assert tokenizer.decode(row[of_plan][:-1].tolist()) == example.plan
            assert row[of_plan][-1] == 2
            assert row[: len(before)].tolist() == before
            assert not of_plan[: len(before)].any()
            assert np.all(row[np.flatnonzero(of_plan)[-1] :] == 2)
        model = nnx.merge(llama.structure(config), params)
        tokens, of_plan = split.tokens[:2], split.of_plan[:2]
        logits = np.asarray(jax.jit(lambda t: model(t))(tokens), np.float64)
        expected = [
            np.log(np.exp(logits[b, i - 1]).sum()) - logits[b, i - 1, tokens[b, i]]
            for b, i in np.argwhere(of_plan)
        ]
        loss = jax.jit(lambda *batch: calling.plan_loss(model, *batch))(tokens, of_plan)
        assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)

    def test_prompt_has_the_chat_format(self):
        example = tinyagent.Example((("system", "Plan."), ("user", "Hi")), "")
        assert calling.prompt(example) == (
            "<|system|>\nPlan.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
        )

    def test_long_records_are_dropped(self, tiny):
        tokenizer = hugging_face.read_tokenizer(tiny / "llama", 1000)
        short = tinyagent.Example((("user", "a"),), "1. join()")
        long = tinyagent.Example((("user", "a " * 90),), "1. join()")
        assert calling.tokenized(tokenizer, [short, long], 60).plans == [short.plan]
        with pytest.raises(ValueError, match="all records are longer than --max-length 60"):
            calling.tokenized(tokenizer, [long], 60)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda records: records | {"odd": {"input": "x"}},
                "record odd: no plan in the record",
            ),
            (lambda records: records | {"odd": None}, "record odd: no plan in the record"),
            (lambda records: [records], "is not a JSON object of records by key"),
            (
                lambda records: (
                    records
                    | {"odd": {"output": [{"type": "plan", "raw_input": [], "raw_output": "no"}]}}
                ),
                "record odd: 'no' is not a call (--skip-malformed skips such records)",
            ),
        ],
        ids=range(4),
    )
    def test_error_names_the_key_of_a_malformed_record(self, run, capsys, tiny, change, message):
        shutil.copytree(tiny / "plans", "plans")
        file = Path("plans/training_data.json")
        found = json.loads(file.read_text())
        file.write_text(json.dumps(change(found)))
        before = contents()
        assert run("--data", "plans") == 2
        assert message in refused(capsys)
        assert contents() == before
        if isinstance(change(found), dict):
            read = tinyagent.read(file, skip=True)
            assert len(read.records) == len(found)
            assert len(read.skipped) == 1

    def test_missing_or_truncated_data_is_refused(self, run, capsys, tiny):
        assert run("--data", "nowhere") == 2
        assert "no training_data.json in nowhere; to download it: hf download" in refused(capsys)
        shutil.copytree(tiny / "plans", "plans")
        file = Path("plans/testing_data.json")
        file.write_text(file.read_text()[:-9])
        assert run("--data", "plans") == 2
        assert "plans/testing_data.json is truncated or not JSON" in refused(capsys)
        assert run("--judged", "0") == 2
        assert "--judged must be at least 1" in refused(capsys)

    def test_defaults_are_the_papers_settings(self):
        (config,) = calling.Config().runs()
        assert config.optimizer == "natural_galore"
        assert (config.lr, config.batch_size, config.epochs) == (7e-5, 32, 3)
