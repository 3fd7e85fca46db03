"""Pre-training on C4: packing, shards and streams, resuming, invalid input."""

import gzip
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from examples.common import llama, run_display, run_log, training_loop
from examples.finetuning import tiny_assets
from examples.pretraining import c4, generate, packing, pretrain, sharded
from examples.pretraining.packing import Packed
from tests.helpers.cases import slow
from tests.helpers.example_runs import (
    CompiledOnce,
    Killed,
    assert_same_run,
    contents,
    crash,
    interrupt,
    log_without_times,
    refused,
    saved_state,
)


WORDS = "the", "a", "of", "in", "buffer", "socket", "module", "stream", "reads", "naïve"


def sentences(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, size=draw.integers(1, 20))) for _ in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with two training shards, a validation shard and a tokenizer."""
    folder = tmp_path_factory.mktemp("shards") / "c4"
    texts = sentences(54)
    tokenizer = tiny_assets.train_tokenizer(texts * 5, 300)
    tiny_assets.save_c4(folder, tokenizer, texts, held_out=4)
    return folder


def texts_in(folder: Path, split: str) -> list[str]:
    """Texts of all shards, read independently of c4.py."""
    lines = [
        line
        for file in sorted(folder.glob(f"c4-{split}*"))
        for line in gzip.decompress(file.read_bytes()).decode().splitlines()
    ]
    return [json.loads(line)["text"] for line in lines]


def line_of_tokens(folder: Path, split: str) -> list[int]:
    """The concatenated tokens of all texts, each with an end token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    line = []
    for text in texts_in(folder, split):
        line += [*tokenizer.encode(text, add_special_tokens=False).ids, end]
    return line


def cut(line: list[int], batch: int, length: int) -> list[np.ndarray]:
    whole = len(line) // (batch * length)
    return list(np.reshape(line[: whole * batch * length], (whole, batch, length)))


@pytest.fixture
def hub(shards, monkeypatch) -> None:
    """Makes `datasets` stream the local shards instead of the Hub."""
    datasets = pytest.importorskip("datasets")
    load_dataset = datasets.load_dataset

    def load(path, name, *, split, streaming):
        assert (path, name, streaming) == ("allenai/c4", "en", True)
        files = [str(file) for file in c4.find(shards, split).files]
        return load_dataset("json", data_files={split: files}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture(params=["shards", *slow("hub")])
def read(request, shards):
    """Reader of the training texts."""
    if request.param == "shards":
        return c4.find(shards, "train").read
    request.getfixturevalue("hub")
    return c4.find(None, "train").read


class TestPacking:
    SHAPE = (2, 7)

    @pytest.fixture
    def packed(self, shards, read, monkeypatch):
        monkeypatch.setattr(packing, "CHUNK", 3)
        tokenizer = c4.read_tokenizer(shards)
        return lambda: Packed(read, lambda texts: c4.encode(tokenizer, texts), *self.SHAPE)

    @pytest.mark.slow
    def test_batches_equal_the_concatenated_tokens(self, packed, shards, monkeypatch):
        expected = cut(line_of_tokens(shards, "train"), *self.SHAPE)
        assert len(expected) > 20
        for chunk in (3, 1000):
            monkeypatch.setattr(packing, "CHUNK", chunk)
            batches = list(packed())
            np.testing.assert_array_equal(batches, expected)
            assert batches[0].dtype == np.int32

    def test_every_position_can_be_restored(self, packed, shards):
        """Positions as JSON, also across the end of the texts."""
        one = packed()
        expected, positions = [], []
        for step in range(60):
            positions.append(json.dumps(one.position()))
            expected.append(one.batch(step))
        assert max(map(len, positions)) < 1000
        whole = cut(line_of_tokens(shards, "train"), *self.SHAPE)
        epochs = len(expected) // len(whole)
        np.testing.assert_array_equal(expected, (whole * (epochs + 1))[:60])
        assert one.epoch == 60 // len(whole) > 0
        for begin in (0, 1, 7, len(whole) - 1, len(whole), 50):
            other = packed()
            for step in range(begin, min(begin + 3, 60)):
                other.seek(json.loads(positions[step]))
                assert json.dumps(other.position()) == positions[step]
                np.testing.assert_array_equal(other.batch(step), expected[step])

    def test_position_beyond_the_texts_is_refused(self, packed):
        with pytest.raises(ValueError, match="shorter than when the checkpoint was saved"):
            packed().seek({"epoch": 0, "texts": None, "used": 10**6})


class TestSource:
    def test_validation_uses_its_own_split(self, shards):
        expected = cut(line_of_tokens(shards, "validation"), 2, 7)
        for most in (2, 1000):
            source = c4.load(shards, shards, 2, 7, most)
            for _ in range(2):  # equal at each call
                np.testing.assert_array_equal(list(source.validation()), expected[:most])
        training = source.training()
        first = training.batch(1)
        np.testing.assert_array_equal(first, cut(line_of_tokens(shards, "train"), 2, 7)[0])
        np.testing.assert_array_equal(
            source.training().batch(1), first
        )  # each run starts at the beginning

    def test_shards_in_subfolder_en_are_found(self, shards, tmp_path):
        (tmp_path / "all").mkdir()
        shutil.copytree(shards, tmp_path / "all" / "en")
        shutil.copytree(shards, tmp_path / "all" / "en.noclean")
        sources = [c4.load(x, shards, 2, 7, 2) for x in (shards, tmp_path / "all")]
        assert sources[0].summary == sources[1].summary

    def test_digest_depends_on_shards_and_tokenizer(self, shards, tmp_path):
        def digest():
            return c4.load(tmp_path / "c4", tmp_path / "c4", 2, 7, 2).summary["sha256"]

        shutil.copytree(shards, tmp_path / "c4")
        digests = [digest(), digest()]
        shard = tmp_path / "c4" / "c4-train.00001-of-00002.json.gz"
        shard.write_bytes(gzip.compress(gzip.decompress(shard.read_bytes()).replace(b"a", b"b")))
        digests.append(digest())
        shutil.copy(shard, tmp_path / "c4" / "c4-train.00002-of-00003.json.gz")
        digests.append(digest())
        tokenizer = tiny_assets.train_tokenizer(sentences(9), 290)
        tokenizer.save(str(tmp_path / "c4" / "tokenizer.json"))
        digests.append(digest())
        assert digests[0] == digests[1]
        assert len(set(digests)) == 4

    def test_coding_round_trip(self, shards):
        coding = c4.coding(c4.read_tokenizer(shards))
        tokens = coding.encode("the naïve buffer")
        assert coding.decode(tokens).decode() == "the naïve buffer"
        assert (
            coding.decode([*tokens, 383]).decode() == "the naïve buffer"
        )  # a padding index of the vocabulary
        assert coding.size == 300
        assert coding.encode("the \udcff")  # an invalid UTF-8 byte of the command line


SETTINGS = """--dataset c4 --data c4 --tokenizer c4/tokenizer.json --steps 14 --refresh-every 2
    --validate-every 7 --save-every 5 --rank 4 --batch-size 4 --seq-len 16 --prompt the"""

ADAMW = ("--optimizer", "adamw", "--lr", "0.02", "--micro-batches", "2")


class Functions:
    """Compiles once for all runs with the same computation."""

    NO_MATTER = ("out", "resume", "overwrite", "save_every", "data", "tokenizer", "prompt")

    def __init__(self, make):
        self.make = make
        self.compiled = {}

    def __call__(self, config, **options):
        if options:  # sharded.py compiles its own functions
            return self.make(config, **options)
        config = replace(config, **dict.fromkeys(self.NO_MATTER))
        if config not in self.compiled:
            functions = self.make(config)
            step = CompiledOnce(functions.train_step)
            self.compiled[config] = functions._replace(train_step=step)
        return self.compiled[config]


make_once = Functions(pretrain.make_functions)


@pytest.fixture
def run(monkeypatch, small, shards):
    """Runs the command line of an example on small shards, and returns its exit status."""
    shutil.copytree(shards, "c4")
    monkeypatch.setattr(training_loop, "LOG_EVERY", 2)
    monkeypatch.setattr(packing, "CHUNK", 3)
    monkeypatch.setattr(pretrain, "SAMPLE_TOKENS", 9)
    monkeypatch.setattr(pretrain, "VALIDATION_BATCHES", 2)
    monkeypatch.setattr(pretrain, "make_functions", make_once)

    def run(*arguments: str, example=pretrain) -> int:
        given = arguments if "--resume" in arguments else (*SETTINGS.split(), *arguments)
        monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *given])
        try:
            example.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def stop_at(monkeypatch, step: int, how) -> None:
    """Has `how` called when the batch of a step is shards, once."""
    batch = Packed.batch
    pending = [how]

    def stopping(self, now):
        if now == step and pending:
            pending.pop()()
        return batch(self, now)

    monkeypatch.setattr(Packed, "batch", stopping)


class TestRun:
    @pytest.mark.slow
    def test_run_on_c4_trains_and_generates(self, run, capsys, monkeypatch):
        assert run(*ADAMW, "--out", "here") == 0
        out = capsys.readouterr().out
        header, *records = log_without_times("here")
        assert header["config"]["vocabulary"] == 384  # 300 and room up to a multiple of 128
        shape = replace(llama.CONFIGS["tiny"], vocabulary=384)
        sizes = [math.prod(x.shape) for x in jax.tree.leaves(llama.abstract_params(shape))]
        assert header["parameters"] == sum(sizes)
        assert records[0]["validation_loss"] == pytest.approx(math.log(384), abs=0.1)
        assert records[-1]["train_loss"] < records[0]["validation_loss"] - 0.5
        for record in records:
            if "validation_loss" in record:
                perplexity = math.exp(record["validation_loss"])
                assert record["metrics"]["perplexity"] == pytest.approx(perplexity)
        assert "perplexity" in out
        assert "C4 in c4" in out
        text = Path("here/sample.txt").read_text()
        assert text.startswith("the")
        assert text in out
        (axes,) = run_display.plot([run_log.read(Path("here/log.jsonl"))]).axes
        assert axes.get_xlabel() == "tokens"
        assert axes.get_ylabel() == "loss (nats per token)"

        monkeypatch.setattr(
            sys, "argv", ["generate.py", "here", "--prompt", "the", "--tokens", "5"]
        )
        generate.main()
        assert capsys.readouterr().out.startswith("the")
        Path("c4/tokenizer.json").unlink()
        with pytest.raises(SystemExit):
            generate.main()
        assert "no tokenizer at c4/tokenizer.json; to download it: hf download" in refused(capsys)

    @pytest.mark.slow
    def test_resumed_run_is_bitwise_equal(self, run, monkeypatch):
        """Stopped inside a shard and a chunk; the run reads all texts more than once."""
        assert run(*ADAMW, "--out", "whole") == 0
        assert len(cut(line_of_tokens(Path("c4"), "train"), 4, 17)) == 6  # of 14 steps

        for step in (3, 13):
            with monkeypatch.context() as patch:
                stop_at(patch, step, interrupt)
                assert run(*ADAMW, "--out", f"stopped{step}") == 130
            assert saved_state(f"stopped{step}")[0] == step
            Path("c4").rename("moved")
            where = ["--data", "moved", "--tokenizer", "moved/tokenizer.json"]
            assert run("--out", f"stopped{step}", "--resume", *where) == 0
            Path("moved").rename("c4")
            assert_same_run(f"stopped{step}", "whole")

        with monkeypatch.context() as patch:
            stop_at(patch, 7, crash)
            with pytest.raises(Killed):
                run(*ADAMW, "--out", "crashed")
        assert saved_state("crashed")[0] == 5
        assert run("--out", "crashed", "--resume") == 0
        assert_same_run("crashed", "whole")

    @pytest.mark.slow
    def test_hub_stream_equals_shards(self, hub, run, monkeypatch):
        assert run(*ADAMW, "--out", "whole") == 0
        begun = SETTINGS.replace("--data c4", "").split()
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *begun, *ADAMW, "--out", "streamed"])
        with monkeypatch.context() as patch:
            stop_at(patch, 9, interrupt)
            with pytest.raises(SystemExit, match="130"):
                pretrain.main()
        assert run("--out", "streamed", "--resume") == 0
        jax.tree.map(np.testing.assert_array_equal, saved_state("streamed"), saved_state("whole"))
        assert log_without_times("streamed")[1:] == log_without_times("whole")[1:]

    @pytest.mark.slow
    def test_damaged_shard_gives_one_line(self, run):
        """Damage after the first batch, which is read before the run starts."""
        file = Path("c4/c4-train.00000-of-00002.json.gz")
        whole = file.read_bytes()
        lines = gzip.decompress(whole).splitlines(keepends=True)
        lines[9] = b'{"txt": "?"}\n'
        file.write_bytes(gzip.compress(b"".join(lines)))
        assert run(*ADAMW, "--out", "here") == (
            f'stopped: {file}, line 10: not a record with a "text"; '
            "no checkpoint; the log is in here"
        )
        file.write_bytes(whole[:-60])
        message = run(*ADAMW, "--out", "here", "--overwrite", "--save-every", "1")
        assert message.startswith(f"stopped: {file} is truncated or damaged: download it again; to")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                "--tokenizer nowhere",
                "no tokenizer at nowhere; to download it: hf download",
            ),
            ("--tokenizer empty", "no tokenizer at empty/tokenizer.json; to download it: hf"),
            ("--tokenizer damaged", "damaged is damaged: "),
            ("--tokenizer endless", "endless has no end token </s>; to download T5's: hf"),
            ("--data empty", "no c4-train.*.json.gz in empty; to download it: hf download"),
            ("--data nowhere", "no c4-train.*.json.gz in nowhere; to download it: hf download"),
            ("--data train", "no c4-validation.*.json.gz in train; to download it: hf download"),
            ("--data textless", 'c4-train.0.json.gz, line 2: not a record with a "text"'),
            ("--data cut", "c4-train.0.json.gz is truncated or damaged: download it again"),
            ("--data plain", "c4-train.0.json.gz is truncated or damaged"),
            ("--batch-size 400", "C4's train split has "),
            ("--batch-size 20", "C4's validation split has "),
            ("--vocabulary 299", "--vocabulary must be at least 300, the size of the tokenizer"),
            ("--text c4", "--text applies only to --dataset text"),
            ("--dataset text", "--data applies only to --dataset c4"),
            ("--dataset c5", "'c5'"),
            ("--preset 3b", "--preset must be one of 60m, 130m, 350m, 1b, got '3b'"),
            ("--fisher full", "--fisher must be one of none, core, window, got 'full'"),
            ("--optimizer galore --fisher core", "--fisher applies only to natural_galore"),
            ("--optimizer adamw --scale 2", "--scale applies only to natural_galore and galore"),
            (
                "--optimizer contrib_galore --b2 0.9",
                "--b2 applies only to natural_galore and galore",
            ),
            ("--scale 0", "--scale must be above 0 and finite, got 0.0"),
            ("--b2 1", "--b2 must be at least 0 and below 1, got 1.0"),
            ("--micro-batches 3", "--batch-size must be a multiple of --micro-batches, 3, got 4"),
            ("--micro-batches 0", "--micro-batches must be at least 1"),
        ],
    )
    def test_invalid_input_gives_one_line(self, run, capsys, arguments, message):
        for name in ("empty", "train", "textless", "cut", "plain"):
            Path(name).mkdir()
        Path("damaged").write_text("{}")
        tokenizer = json.loads(Path("c4/tokenizer.json").read_text().replace("</s>", "<end>"))
        Path("endless").write_text(json.dumps(tokenizer))
        shard = Path("c4/c4-train.00000-of-00002.json.gz").read_bytes()
        Path("train/c4-train.0.json.gz").write_bytes(shard)
        Path("textless/c4-train.0.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n[1]\n'))
        Path("cut/c4-train.0.json.gz").write_bytes(shard[:40])
        Path("plain/c4-train.0.json.gz").write_bytes(gzip.decompress(shard))
        for name in ("textless", "cut", "plain"):
            shutil.copy("c4/c4-validation.00000-of-00001.json.gz", name)
        before = contents()
        assert run(*arguments.split()) == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_errors_give_the_download_command(self, run, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        for arguments, message in (
            ([], "error: --tokenizer is required; to download it: hf download google-t5/t5-base"),
            (
                ["--tokenizer", "c4"],
                "error: streaming C4 needs the package datasets: pip install 'natgalore_jax[c4]'; "
                "to download shards for --data: hf download --repo-type dataset allenai/c4",
            ),
        ):
            monkeypatch.setattr(sys, "argv", ["pretrain.py", "--dataset", "c4", *arguments])
            with pytest.raises(SystemExit):
                pretrain.main()
            assert refused(capsys).startswith(message)

    def test_unreachable_hub_gives_one_line(self, run, capsys, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def load(*args, **kwargs):
            raise ConnectionError("no route\nto huggingface.co")

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--dataset", "c4", "--tokenizer", "c4"])
        with pytest.raises(SystemExit):
            pretrain.main()
        assert "C4 cannot be streamed (no route to huggingface.co)" in refused(capsys)


class TestGenerate:
    def test_tokenizer_with_another_digest_is_refused(self, shards, tmp_path):
        c4.read_tokenizer(shards, c4.digest_of(shards))
        with pytest.raises(ValueError, match="differs from the tokenizer of the run"):
            c4.read_tokenizer(shards, "0" * 64)


@pytest.mark.slow
def test_c4_on_a_mesh_equals_one_device(run, monkeypatch):
    losses = lambda folder: [
        x["train_loss"] for x in log_without_times(folder) if "train_loss" in x
    ]
    eight = ["--batch-size", "8", "--optimizer", "adamw"]
    assert run(*eight, "--out", "one") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5, interrupt)
        assert run(*eight, "--out", "many", "--mesh", "2,2,2", example=sharded) == 130
    mesh = ["--mesh", "4,1,2", "--micro-batches", "2"]
    assert run("--out", "many", "--resume", *mesh, example=sharded) == 0
    np.testing.assert_allclose(losses("many"), losses("one"), rtol=2e-6)


def test_micro_batch_must_be_divisible_by_the_mesh(run, capsys):
    assert run("--micro-batches", "2", "--mesh", "4,1,2", example=sharded) == 2
    assert "a micro-batch must be a multiple of data x fsdp, 4, got 2" in refused(capsys)
