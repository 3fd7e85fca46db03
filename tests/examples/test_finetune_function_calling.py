"""Plans of function calls: equal as graphs or not, learned from the plan's tokens alone."""

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
from tests.examples.test_pretrain import contents, refused


END = "\n9. join()<END_OF_PLAN>"
MAIL = '1. find("Sid")\n2. find("Lu")\n3. mail(["$1", "$2"], "Lunch", 12)'


def equal(one: str, other: str, with_arguments: bool = True) -> bool:
    pair = tinyagent.parse(one + END), tinyagent.parse(other + END)
    answers = {tinyagent.same_graph(*p, with_arguments=with_arguments) for p in (pair, pair[::-1])}
    (answer,) = answers  # whichever comes first
    return answer


class TestPlans:
    def test_a_plan_is_its_calls(self):
        assert tinyagent.parse(MAIL + END) == [
            (1, "find", ["Sid"]),
            (2, "find", ["Lu"]),
            (3, "mail", [["$1", "$2"], "Lunch", 12]),
        ]
        assert tinyagent.parse("1. now()\n2. say(${1}, x)\n3. join()\n4. no call") == [
            (1, "now", []),
            (2, "say", "${1}, x"),  # no Python: as it is written
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1. find()", "does not end with join"),
            ("Let me see.\n1. join()", "'Let me see.' is no call"),
            ('1. mail("$2")\n2. find()\n3. join()', "uses $2, which is not before it"),
            ('1. mail("$1")\n2. join()', "uses $1, which is not before it"),
        ],
    )
    def test_what_is_no_plan_is_refused(self, text, message):
        with pytest.raises(ValueError, match=r".") as error:
            tinyagent.parse(text)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("other", "whole", "bare"),
        [
            (MAIL, True, True),
            ('1. find("Lu")\n2. find("Sid")\n3. mail(["$2", "$1"], "Lunch", 12)', True, True),
            ('3. find("Lu")\n5. find("Sid")\n7. mail(["${5}", "$3"], "Lunch", 12)', True, True),
            ('1. find("Sid")\n2. find("Lu")\n3. mail(["$2", "$1"], "Lunch", 12)', False, True),
            ('1. find("Sid")\n2. find("Lu")\n3. mail(["$1", "$2"], "lunch", 12)', False, True),
            ('1. find("Sid")\n2. find("Lu")\n3. mail(["$1"], "Lunch", 12)', False, False),
            ('1. find("Sid")\n2. find("Lu")\n3. send(["$1", "$2"], "Lunch", 12)', False, False),
            ('1. find("Sid")\n2. mail(["$1", "$1"], "Lunch", 12)', False, False),
            (MAIL + '\n4. find("Sid")', False, False),
        ],
        ids=range(9),
    )
    def test_plans_are_equal_as_graphs(self, other, whole, bare):
        assert equal(MAIL, other) == whole
        assert equal(MAIL, other, with_arguments=False) == bare

    def test_a_choice_that_fails_later_is_taken_back(self):
        one = '1. f("x")\n2. f("x")\n3. g("$1")\n4. h("$2")'
        other = '1. f("x")\n2. f("x")\n3. g("$2")\n4. h("$1")'
        shared = '1. f("x")\n2. f("x")\n3. g("$1")\n4. h("$1")'
        for with_arguments in (True, False):
            assert equal(one, other, with_arguments)
            assert not equal(one, shared, with_arguments)

    def test_what_is_written_is_judged(self):
        wrong = MAIL.replace("Lunch", "Dinner") + END
        assert tinyagent.judge(MAIL + END, MAIL + END) == {
            "success": 1,
            "success without arguments": 1,
        }
        assert tinyagent.judge(wrong, MAIL + END) == {"success": 0, "success without arguments": 1}
        assert tinyagent.judge("1. find(", MAIL + END) == {
            "success": 0,
            "success without arguments": 0,
        }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny Llama and plans."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_assets.save_plans(folder / "plans")
    texts = list(tiny_assets.docstrings(data.standard_library()[::8]))
    tiny_assets.save_llama(folder / "llama", tiny_assets.train_tokenizer(texts))
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, tiny):
    """Runs the command line on the tiny plans, in a folder of its own; returns its exit status."""
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
    @pytest.mark.slow
    def test_a_few_steps_leave_a_model_that_generate_reads(self, run, capsys, tiny):
        assert run("--steps", "3", "--judged", "2", "--out", "here") == 0
        first, *_, last = run_log.read(Path("here/log.jsonl")).records
        assert first["metrics"] == {"success": 0, "success without arguments": 0}
        assert last["step"] == 3
        assert last["validation_loss"] < first["validation_loss"]
        assert "success without arguments" in capsys.readouterr().out
        config, saved = hugging_face.read_llama(Path("here/model"))
        _, begun = hugging_face.read_llama(tiny / "llama")
        assert config == hugging_face.llama_config(tiny / "llama")
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), saved, begun)
        assert min(jax.tree.leaves(moved)) > 0
        assert generate.read(Path("here")).config == config

    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", ["natural_galore", "adamw", "lora"])
    def test_plans_are_learned(self, run, tiny, optimizer):
        assert run("--optimizer", optimizer, "--epochs", "60", "--out", "here") == 0
        first, *_, last = run_log.read(Path("here/log.jsonl")).records
        assert first["metrics"]["success"] == 0
        assert last["metrics"]["success"] > 0.8

        # generate.py goes on from what is left, and plans what it was not taught.
        writer = generate.read(Path("here"))
        record = json.loads((tiny / "plans/testing_data.json").read_text())
        told = tinyagent.example(next(iter(record.values())))
        tokens = [0, *writer.encode(calling.prompt(told))]
        written = generate.generate(
            writer.config, writer.params, tokens, count=80, temperature=0.0, seed=0, end=writer.end
        )
        assert writer.decode(list(written)).endswith("join()<END_OF_PLAN>")

    def test_the_loss_is_on_the_plan_and_its_end_alone(self, tiny):
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
        loss = calling.plan_loss(model, tokens, of_plan)
        assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)

    def test_instructions_are_told_as_in_a_chat(self):
        example = tinyagent.Example((("system", "Plan."), ("user", "Hi")), "")
        assert calling.prompt(example) == (
            "<|system|>\nPlan.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
        )

    def test_records_that_are_too_long_are_left_out(self, tiny):
        tokenizer = hugging_face.read_tokenizer(tiny / "llama", 1000)
        short = tinyagent.Example((("user", "a"),), "1. join()")
        long = tinyagent.Example((("user", "a " * 90),), "1. join()")
        assert calling.tokenized(tokenizer, [short, long], 60).plans == [short.plan]
        with pytest.raises(ValueError, match="all records are longer than --max-length 60"):
            calling.tokenized(tokenizer, [long], 60)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda records: records | {"odd": {"input": "x"}}, "record odd: no plan in it"),
            (lambda records: records | {"odd": None}, "record odd: no plan in it"),
            (lambda records: [records], "holds no records by their keys"),
            (
                lambda records: (
                    records
                    | {"odd": {"output": [{"type": "plan", "raw_input": [], "raw_output": "no"}]}}
                ),
                "record odd: 'no' is no call (--skip-malformed leaves such out)",
            ),
        ],
        ids=range(4),
    )
    def test_malformed_records_are_refused_by_their_keys(self, run, capsys, tiny, change, message):
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

    def test_what_is_missing_or_cut_short_is_said(self, run, capsys, tiny):
        assert run("--data", "nowhere") == 2
        assert "no training_data.json in nowhere; to get it: hf download" in refused(capsys)
        shutil.copytree(tiny / "plans", "plans")
        file = Path("plans/testing_data.json")
        file.write_text(file.read_text()[:-9])
        assert run("--data", "plans") == 2
        assert "plans/testing_data.json is cut short or no JSON" in refused(capsys)
        assert run("--judged", "0") == 2
        assert "--judged must be at least 1" in refused(capsys)

    def test_the_papers_settings_are_the_defaults(self):
        (config,) = calling.Config().runs()
        assert config.optimizer == "natural_galore"
        assert (config.lr, config.batch_size, config.epochs) == (7e-5, 32, 3)
