"""Fine-tuning on plans of function calls: loss, records, command line."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from examples.common import chat_format, data, hugging_face, llama, run_log
from examples.finetuning import (
    finetune_function_calling as calling,
    plans,
    records,
    tiny_assets,
    tinyagent,
)
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
        tokens = [0, *writer.encode(chat_format.ZEPHYR.prompt(example.messages))]
        written = generate.generate(
            writer.config, writer.params, tokens, count=80, temperature=0.0, seed=0, end=writer.end
        )
        assert writer.decode(list(written)).endswith("join()<END_OF_PLAN>")

    def test_loss_covers_plan_tokens_only(self, tiny):
        config, params = hugging_face.read_llama(tiny / "llama")
        tokenizer = hugging_face.read_tokenizer(tiny / "llama", config.vocabulary)
        found = tinyagent.read(tiny / "plans/testing_data.json").records
        split = calling.tokenized(tokenizer, chat_format.ZEPHYR, found, 100)
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

    def test_tokens_in_the_format_of_the_tokenizer(self, tiny):
        example = plans.Example((("system", "Plan."), ("user", "Hi")), "1. f()\n2. join()")
        tokenizer = hugging_face.read_tokenizer(tiny / "llama", 1000)
        text = lambda split: tokenizer.decode(split.tokens[0].tolist(), skip_special_tokens=False)
        split = calling.tokenized(tokenizer, chat_format.ZEPHYR, [example], 100)
        begun = "<s><|system|>\nPlan.</s>\n<|user|>\nHi</s>\n<|assistant|>\n" + example.plan
        assert text(split).rstrip("</s>") == begun
        assert split.longest_plan == len(tokenizer.encode(example.plan).ids) - 2 + 1
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        split = calling.tokenized(tokenizer, calling.chat_of(tokenizer), [example], 100)
        assert text(split).startswith("<|im_start|>system\nPlan.<|im_end|>\n<|im_start|>user\nHi")
        assert split.tokens[0, -1] == tokenizer.token_to_id("<|im_end|>")

    def test_unknown_chat_format_is_refused(self, run, capsys, tiny):
        shutil.copytree(tiny / "llama", "other")
        file = Path("other/tokenizer.json")
        file.write_text(file.read_text().replace('"</s>"', '"</t>"'))
        assert run("--model", "other") == 2
        assert "the tokenizer has neither <|im_end|> nor <s> and </s>" in refused(capsys)

    def test_records_with_accepted_arguments(self, run, capsys, tiny):
        """In lines of .jsonl; a generated plan is compared with the accepted ones."""
        messages = [{"role": "user", "content": "Add"}]
        line = {"messages": messages, "plan": "1. add(x=1)\n2. join()", "accepted": [{"x": [1, 2]}]}
        records.write(Path("data/train.jsonl"), [line] * 16)
        records.write(Path("data/test.jsonl"), [line, {"messages": messages, "plan": line["plan"]}])
        found = calling.read_records(Path("data"))
        assert {name: len(s.records) for name, s in found.items()} == {"training": 16, "testing": 2}
        assert found["testing"].records[0].accepted == ({"x": [1, 2]},)

        config = calling.Config(model=tiny / "llama", data=Path("data"))
        inputs = calling.read(config)
        tokenizer = inputs.tokenizer
        writes = lambda text: lambda *_, **__: [tokenizer.encode(text).ids[1:-1]] * 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calling.generate, "generate_batches", writes("1. add(x=2)\n2. join()"))
            scores = calling.success(inputs, inputs.weights, inputs.test, range(2), 32)
        assert scores == {"success": 0.5, "success without arguments": 1}

        records.write(Path("data/test.jsonl"), [line, line | {"accepted": [{"x": [2]}]}])
        assert run("--data", "data") == 2
        message = refused(capsys)
        assert "data/test.jsonl, line 2: call 1 of the plan is not among the accepted" in message

    def test_long_records_are_dropped(self, tiny):
        tokenizer = hugging_face.read_tokenizer(tiny / "llama", 1000)
        short = plans.Example((("user", "a"),), "1. join()")
        long = plans.Example((("user", "a " * 90),), "1. join()")
        tokenized = partial(calling.tokenized, tokenizer, chat_format.ZEPHYR)
        assert tokenized([short, long], 60).examples == [short]
        with pytest.raises(ValueError, match="all records are longer than --max-length 60"):
            tokenized([long], 60)

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
