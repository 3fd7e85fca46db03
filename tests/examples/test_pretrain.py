"""The example pretrain.py: command line, outputs, checkpoints, comparisons."""

import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.common import checkpoint, data, llama, run_display, run_log, training_loop
from examples.pretraining import pretrain, settings
from tests.examples.test_llama import size
from tests.helpers.cases import slow
from tests.helpers.example_runs import (
    TEXT,
    Killed,
    assert_same_run,
    contents,
    crash,
    interrupt,
    log_without_times,
    refused,
    saved_state,
    stop_at,
)


EXAMPLES = Path(pretrain.__file__).parent

make_functions = functools.cache(pretrain.make_functions)


def make_functions_once(config: settings.Config):
    """Compiles once for all runs with the same computation."""
    return make_functions(settings.Config(**config.fixed()))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a small run from the command line in a temporary folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(TEXT)
    tiny = replace(llama.CONFIGS["tiny"], hidden=32, intermediate=88, layers=1)
    monkeypatch.setitem(llama.CONFIGS, "tiny", tiny)
    monkeypatch.setattr(training_loop, "LOG_EVERY", 2)
    monkeypatch.setattr(pretrain, "SAMPLE_TOKENS", 20)
    monkeypatch.setattr(pretrain, "VALIDATION_BATCHES", 2)
    monkeypatch.setattr(pretrain, "make_functions", make_functions_once)
    small = ["--text", "text", "--steps", "2", "--batch-size", "2", "--seq-len", "16"]

    def run(*arguments: str) -> int:
        given = arguments if "--resume" in arguments else (*small, *arguments)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
        try:
            pretrain.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def scalars(file: Path) -> dict[tuple[int, str], float]:
    """The scalars of an event file by step and name. Records have 12 bytes before, 4 after them."""
    from tensorboardX.proto.event_pb2 import Event

    data, found = file.read_bytes(), {}
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12:end])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        data = data[end + 4 :]
    return found


class TestCommandLine:
    @pytest.mark.parametrize(
        "arguments",
        [pytest.param(["natural_galore", "--scan"], marks=pytest.mark.slow), ["contrib_galore"]],
        ids=" ".join,
    )
    def test_run_writes_log_figure_and_sample(self, run, capsys, arguments):
        assert run("--optimizer", *arguments, "--rank", "4", "--out", "here") == 0
        log = [json.loads(line) for line in Path("here/log.jsonl").read_text().splitlines()]
        header, *records = log
        assert header["config"]["optimizer"] == arguments[0]
        assert header["config"]["rank"] == 4
        assert header["parameters"] == size(llama.abstract_params(llama.CONFIGS["tiny"]))
        assert 0 < header["state_bytes"] < header["adamw_state_bytes"]
        assert len(header["data"]["sha256"]) == 64
        assert [record["step"] for record in records] == [0, 1, 2]
        assert [record["tokens"] for record in records] == [0, 32, 64]
        assert records[0]["validation_loss"] == pytest.approx(math.log(256), abs=0.1)
        assert records[-1]["train_loss"] < math.log(256) + 0.1
        assert Path("here/loss.png").read_bytes().startswith(b"\x89PNG")
        out = capsys.readouterr().out
        assert "validation loss" in out
        assert Path("here/sample.txt").read_text().startswith("def ")
        assert Path("here/sample.txt").read_text() in out
        assert all(
            c.isprintable() or c in "\n\t" for c in out
        )  # no control codes without a terminal

    def test_tensorboard_gets_the_numbers_of_the_log(self, run):
        assert run("--optimizer", "adamw", "--out", "here", "--tensorboard") == 0
        _, *records = [json.loads(line) for line in Path("here/log.jsonl").read_text().splitlines()]
        expected = {
            (record["step"], name): value
            for record in records
            for name, value in record.items()
            if name != "step"
        }
        (file,) = Path("here/tensorboard").iterdir()
        assert scalars(file) == pytest.approx(expected, rel=1e-6)  # events are float32

    @pytest.mark.slow
    def test_low_rank_gradients_equal_full_gradients(self, monkeypatch):
        """Across a refresh. Without PROJECTING the same config computes full gradients."""
        config = settings.Config(
            optimizer="galore", lr=1e-2, rank=4, refresh_every=2, steps=4, low_rank_gradients=True
        )
        tokens = jax.random.randint(jax.random.key(0), (4, 17), 0, 256)

        def trained():
            functions = pretrain.make_functions(config)
            state = functions.init(jax.random.key(0))
            for _ in range(4):
                state, loss = functions.train_step(state, tokens)
            return state.params, loss

        cores = trained()
        monkeypatch.setattr(settings, "PROJECTING", ())
        # Rounding of a core relative to its smallest entries, through 4 Adam steps of 1e-2.
        chex.assert_trees_all_close(cores, trained(), atol=2e-4)

    @pytest.mark.slow
    def test_default_residual_of_each_optimizer(self):
        """Ranks of the updates with given and with default residuals."""
        of = lambda name, **rest: settings.Config(optimizer=name, lr=1e-2, rank=4, **rest)
        params = {"mlp": {"up": {"kernel": jnp.eye(8, 16)}}}
        moved = []
        for config in (
            of("galore", residual="isotropic"),
            of("galore"),
            of("natural_galore"),
            of("natural_galore", residual="none"),
            of("natural_galore", low_rank_gradients=True),
        ):
            (one,) = config.runs()
            tx = one.make_optimizer()
            _, state = tx.update(params, tx.init(params), params)  # with learning rate 0
            updates, _ = tx.update(params, state, params)
            moved.append(float(jnp.linalg.matrix_rank(updates["mlp"]["up"]["kernel"])))
        assert moved == [8, 4, 8, 4, 4]

    @pytest.mark.slow
    def test_overwriting_needs_the_flag(self, run, capsys):
        assert run("--optimizer", "adamw", "--out", "here") == 0
        header = run_log.read(Path("here/log.jsonl")).header
        # The difference is the step count of the schedule.
        assert header["state_bytes"] == header["adamw_state_bytes"] + 4
        before = contents()
        capsys.readouterr()
        for arguments in ("--out here", "--out here --overwrite --rank 0", "--compare galore"):
            assert run("--out", "here", *arguments.split()) == 2
            refused(capsys)
        assert contents() == before
        Path("here/checkpoints/9").mkdir()  # a later step than the new run reaches
        assert run("--optimizer", "adamw", "--out", "here", "--overwrite", "--prompt", "if") == 0
        header, *records = log_without_times("here")
        assert header["config"]["prompt"] == "if"
        assert [record["step"] for record in records] == [0, 1, 2]
        assert saved_state("here")[0] == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--optimizer sgd", "--optimizer must be one of natural_galore, galore, adamw"),
            ("--compare adamw,sgd", "each name in --compare must be one of natural_galore, galore"),
            ("--compare adamw,", "adamw, contrib_galore, got ''"),
            ("--compare adamw,adamw", "--compare names an optimizer twice: adamw,adamw"),
            ("--compare galore --optimizer adamw", "--optimizer and --compare cannot be used"),
            ("--compare adamw,contrib_galore --scan", "cannot project stacked layers"),
            ("--optimizer contrib_galore --scan", "cannot project stacked layers"),
            ("--optimizer adamw --low-rank-gradients", "applies only to natural_galore and galore"),
            (
                "--compare adamw,contrib_galore --residual isotropic",
                "applies only to natural_galore and galore",
            ),
            ("--residual isotropic --low-rank-gradients", "--residual needs full gradients"),
            ("--residual fire", "--residual must be one of none, isotropic, whitened"),
            ("--size 3b", "--size must be one of tiny, 60m"),
            ("--rank 0", "--rank must be at least 1 and below 2**31, got 0"),
            ("--steps 0", "--steps must be at least 1 and below 2**31, got 0"),
            ("--save-every -1", "--save-every must be at least 0 and below 2**31, got -1"),
            ("--seq-len -1", "--seq-len must be at least 1 and below 2**31, got -1"),
            ("--seed -1", "--seed must be at least 0 and below 2**31, got -1"),
            ("--refresh-every 1000000000000", "--refresh-every must be at least 1 and below"),
            ("--lr nan", "--lr must be above 0 and finite, got nan"),
            ("--weight-decay -3", "--weight-decay must not be negative, got -3"),
            ("--prompt=", "--prompt must not be empty"),
            ("--text nowhere", "no file or folder at nowhere"),
            ("--text empty", "the text is empty: empty"),
            ("--text short", "the text is too short: 4 bytes for training, but 34 are needed"),
            ("--out text", "error: text is not a folder"),
            ("--out text/below", "error: text/below: Not a directory"),
            ("--compare adamw,galore --out text/below", "text/below: Not a directory"),
            ("--rank wide", "--rank"),
            ("--dtype float16", "'float16'"),
            ("--compare", "'--compare'"),
            ("--optimzer adamw", "--optimzer, adamw; perhaps you meant --optimizer"),
            ("adamw", "adamw"),
            ("--resume", "--resume needs --out"),
            ("--resume --out here --overwrite", "--resume and --overwrite cannot be used together"),
            ("--resume --out here", "here has no run to resume"),
            ("--resume --out text", "text has no run to resume"),
        ],
    )
    def test_invalid_input_gives_one_line(self, run, capsys, arguments, message):
        Path("empty").touch()
        Path("short").write_text("short")
        before = contents()
        assert run(*arguments.split()) == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_run_with_and_without_checkpoint(self, run, monkeypatch, capsys):
        """The notice of large files is printed before training."""
        monkeypatch.setattr(checkpoint, "LARGE", 1)
        arguments = ["--optimizer", "adamw", "--out", "here"]
        assert run(*arguments, "--save-every", "0") == 0
        out = capsys.readouterr().out
        assert "disk space" not in out
        assert "output folder: here (log, figure, sample)" in out
        assert list(Path("here/checkpoints").iterdir()) == []
        assert run("--out", "here", "--resume") == 2
        assert "here has no checkpoint to resume from" in refused(capsys)
        assert run(*arguments, "--overwrite") == 0
        out = capsys.readouterr().out
        assert out.index("disk space: 0.0 GB per checkpoint") < out.index("compiling")
        assert "output folder: here (log, checkpoint, figure, sample)" in out

    @pytest.mark.slow
    def test_interruption_without_checkpoints(self, run, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            stop_at(patch, 1, interrupt)
            assert run("--out", "here", "--save-every", "0") == 130
        err = capsys.readouterr().err
        assert err.endswith("at step 1 of natural_galore; no checkpoint; the log is in here\n")
        assert list(Path("here/checkpoints").iterdir()) == []

    def test_default_output_folder_is_new(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        for expected in ("a", "a-2", "a-3"):
            folder = checkpoint.free_folder("a", overwrite=False)
            assert folder == Path("runs", expected)
            checkpoint.refuse_used([folder], overwrite=False)
            checkpoint.clear([folder])
            (folder / "log.jsonl").touch()
        assert checkpoint.free_folder("a", overwrite=True) == Path("runs", "a")

    def test_nonfinite_loss_ends_the_run_unsaved(self, run, monkeypatch):
        def functions(config):
            state = training_loop.TrainState({"w": jnp.zeros(2)}, ())
            step = jax.jit(lambda state, tokens: (state, jnp.nan))
            return pretrain.Functions(lambda key: state, step, lambda params, tokens: 5.5)

        monkeypatch.setattr(pretrain, "make_functions", functions)
        assert run("--out", "here", "--save-every", "1") == (
            "stopped: the loss is not finite at step 1: try a lower --lr; the log is in here"
        )
        assert len(run_log.read(Path("here/log.jsonl")).records) == 1
        assert list(Path("here/checkpoints").iterdir()) == []

    def test_output_encoding_without_a_character(self, run, monkeypatch):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
        assert run("--optimizer", "adamw", "--out", "here", "--prompt", "é") == 0
        sys.stdout.flush()
        assert b"\\xe9" in written.getvalue()
        assert Path("here/sample.txt").read_text(encoding="utf-8").startswith("é")
        assert Path("here/loss.png").exists()

    def test_ctrl_c_before_training_gives_one_line(self, run, monkeypatch, capsys):
        def load(path):
            raise KeyboardInterrupt

        monkeypatch.setattr(data, "load", load)
        assert run() == 130
        assert capsys.readouterr() == ("", "interrupted before the first step\n")
        assert list(contents()) == [Path("text")]


def shorten(path: str):
    return lambda: [
        os.truncate(file, file.stat().st_size // 2)
        for file in Path("here").glob(path)
        if file.is_file()
    ]


def swap():
    shutil.rmtree("here/checkpoints")
    shutil.copytree("wider/checkpoints", "here/checkpoints")


class TestResume:
    """Two refreshes before and after the stop, and records at even steps."""

    SETTINGS = "--steps 8 --refresh-every 2 --validate-every 4 --save-every 3 --rank 4"

    @pytest.mark.parametrize(
        "arguments",
        [["adamw"], *slow((["natural_galore"],), (["contrib_galore"],))],
        ids=" ".join,
    )
    def test_resumed_run_is_bitwise_equal(self, run, monkeypatch, capsys, arguments):
        arguments = ["--optimizer", *arguments, *self.SETTINGS.split()]
        assert run(*arguments, "--out", "whole") == 0

        with monkeypatch.context() as patch:
            stop_at(patch, 5, interrupt)
            capsys.readouterr()
            assert run(*arguments, "--out", "interrupted") == 130
        assert capsys.readouterr().err == (
            f"interrupted at step 5 of {arguments[1]}; "
            "to continue: python pretrain.py --out interrupted --resume\n"
        )
        assert saved_state("interrupted")[0] == 5
        assert run("--out", "interrupted", "--resume") == 0
        assert_same_run("interrupted", "whole")

        with monkeypatch.context() as patch:
            stop_at(patch, 6, crash)
            with pytest.raises(Killed):
                run(*arguments, "--out", "crashed")
        log = Path("crashed/log.jsonl")
        assert saved_state("crashed")[0] == 3
        assert log_without_times("crashed")[-1]["step"] == 4  # after the checkpoint
        with log.open("a") as file:
            file.write('{"step": 5, "tok')
        assert run("--out", "crashed", "--resume") == 0
        assert_same_run("crashed", "whole")

    @pytest.mark.slow
    def test_run_resumes_after_a_full_disk(self, run, monkeypatch):
        arguments = ["--optimizer", "adamw", *self.SETTINGS.split()]
        assert run(*arguments, "--out", "whole") == 0

        save = ocp.CheckpointManager.save

        def full(manager, step, **kwargs):
            if step == 6:
                raise ValueError("RESOURCE_EXHAUSTED:\nno space left")
            return save(manager, step, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", full)
            assert run(*arguments, "--out", "stopped") == (
                "stopped: the checkpoint of step 6 cannot be written: RESOURCE_EXHAUSTED: no space "
                "left; to continue: python pretrain.py --out stopped --resume"
            )
        assert saved_state("stopped")[0] == 3
        assert run("--out", "stopped", "--resume") == 0
        assert_same_run("stopped", "whole")

    @pytest.mark.slow
    def test_unwritable_log_gives_one_line(self, run, monkeypatch):
        def show(display, record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(run_display.Display, "show", show)
        assert run("--out", "here") == (
            "stopped: No space left on device; no checkpoint; the log is in here"
        )

    def test_resuming_a_finished_run_repeats_table_and_sample(self, finished, run, capsys):
        before = contents()
        assert run("--out", "here", "--resume") == 0
        written = Path("here/sample.txt").read_text()
        assert "validation loss" in capsys.readouterr().out
        assert contents() == before
        assert run("--out", "here", "--resume", "--prompt", "class ") == 0
        assert Path("here/sample.txt").read_text().startswith("class ")
        Path("here/sample.txt").write_text(written)
        assert contents() == before

    @pytest.fixture(scope="class")
    @classmethod
    def template(cls, tmp_path_factory):
        """Folder for the runs of `finished`."""
        return tmp_path_factory.mktemp("template")

    @pytest.fixture
    def finished(self, run, template, capsys):
        """A finished run in the folder `here`, and one with --scan in `wider`."""
        if not (template / "here").exists():
            for arguments in ("--out here", "--out wider --scan"):
                assert run("--optimizer", "adamw", *arguments.split()) == 0
            for name in ("here", "wider"):
                shutil.copytree(name, template / name)
        for name in ("here", "wider"):
            shutil.copytree(template / name, name, dirs_exist_ok=True)
        capsys.readouterr()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--steps 700", "the run in here has --steps 2, not 700: leave the flag out"),
            ("--size 60m", "the run in here has --size tiny, not 60m"),
            ("--optimizer galore", "the run in here has --optimizer adamw, not galore"),
            ("--compare adamw", "the run in here has --compare None, not adamw"),
            ("--lr 1", "the run in here has --lr 0.002, not 1.0"),
            ("--scan", "the run in here has --scan False, not True"),
            ("--text other", "the data differ from the data of the run in here"),
            ("--text nowhere", "no file or folder at nowhere"),
            ("--save-every -1", "--save-every must be at least 0"),
        ],
    )
    def test_resuming_refuses_other_settings(self, finished, run, capsys, arguments, message):
        Path("other").write_text(TEXT + "!")
        before = contents()
        assert run("--out", "here", "--resume", *arguments.split()) == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_resuming_accepts_equal_settings(self, finished, run):
        Path("moved").mkdir()
        Path("text").rename("moved/text")
        again = "--resume --steps 2 --optimizer adamw --lr 0.002 --text moved/text --save-every 7"
        assert run("--out", "here", *again.split()) == 0
        assert run("--out", "wider", "--resume", "--scan", "--text", "moved/text") == 0

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (shorten("checkpoints/2/state/**/*"), "the checkpoint in here is damaged"),
            (shorten("checkpoints/2/notes/**/*"), "the checkpoint in here is damaged"),
            (lambda: shutil.rmtree("here/checkpoints/2/state"), "the checkpoint in here is dam"),
            (lambda: shutil.rmtree("here/checkpoints"), "here has no checkpoint to resume from"),
            (lambda: shutil.rmtree("here/checkpoints/2"), "here has no checkpoint to resume"),
            (swap, "the checkpoint in here belongs to another run: --scan True, not False"),
            (shorten("log.jsonl"), "here/log.jsonl is damaged or from another version"),
            (lambda: Path("here/log.jsonl").write_text("{}\n"), "here/log.jsonl is damaged or"),
            (lambda: Path("here/log.jsonl").unlink(), "here has no run to resume"),
        ],
        ids=range(9),
    )
    def test_damaged_run_is_refused_and_unchanged(self, finished, run, capsys, damage, message):
        damage()
        before = contents()
        assert run("--out", "here", "--resume") == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_truncated_log_is_refused(self, finished, run, capsys):
        log = Path("here/log.jsonl")
        log.write_text(log.read_text()[:-20])
        before = contents()
        assert run("--out", "here", "--resume") == 2
        assert "here/log.jsonl is shorter than when the checkpoint was saved" in refused(capsys)
        assert contents() == before

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("FORMAT", "its notes have format 1, these examples read format 99"),
            ("FORMAT_VERSION", "its optimizer states have format 1, these examples read format 99"),
        ],
    )
    def test_other_format_version_is_refused(
        self, finished, run, capsys, monkeypatch, name, message
    ):
        before = contents()
        monkeypatch.setattr(checkpoint, name, 99)
        assert run("--out", "here", "--resume") == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_first_signal_is_recorded_and_second_kills(self, request):
        # A shell that starts a job in the background has SIGINT ignored in it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
        handler = signal.getsignal(signal.SIGINT)
        with training_loop.Interrupts() as interrupts:
            assert not interrupts.signal
            interrupt()
            assert interrupts.signal == signal.SIGINT
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is handler
        with training_loop.Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
            assert interrupts.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    @pytest.mark.slow
    def test_two_signals_stop_the_compilation(self, tmp_path):
        (tmp_path / "text").write_text(TEXT)
        command = [sys.executable, str(EXAMPLES / "pretrain.py")]
        command += ["--text", "text", "--seq-len", "16"]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            while process.stdout.readline() != "compiling ...\n":
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            while not process.stderr.readline().startswith("stopping after this step"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.communicate() == ("", "")
        assert process.returncode == -signal.SIGINT

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_to_a_process_saves_a_checkpoint(self, tmp_path, number):
        (tmp_path / "text").write_text(TEXT)
        settings = f"--text text {self.SETTINGS} --steps 150 --seq-len 16 --save-every 100".split()

        def command(*arguments: str) -> list[str]:
            return [sys.executable, str(EXAMPLES / "pretrain.py"), *arguments]

        log = tmp_path / "here" / "log.jsonl"
        process = subprocess.Popen(
            command(*settings, "--out", "here"),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert "--out here --resume" in process.communicate()[1]
        assert process.returncode == 128 + number
        assert 4 < saved_state(str(tmp_path / "here"))[0] < 150  # after the third record
        subprocess.run(
            command("--out", "here", "--resume"), cwd=tmp_path, check=True, capture_output=True
        )
        subprocess.run(
            command(*settings, "--out", "whole"), cwd=tmp_path, check=True, capture_output=True
        )
        with contextlib.chdir(tmp_path):
            assert_same_run("here", "whole")


class TestCompare:
    @pytest.mark.slow
    def test_interrupted_comparison_resumes(self, run, monkeypatch, capsys):
        arguments = ["--compare", "adamw,galore", "--rank", "4"]
        assert run(*arguments, "--out", "whole") == 0
        out = capsys.readouterr().out
        assert "adamw at learning rate 0.002" in out
        assert "galore at learning rate 0.0025" in out
        with monkeypatch.context() as patch:
            stop_at(
                patch, 1, lambda: stop_at(patch, 1, interrupt)
            )  # the first step of the second run
            assert run(*arguments, "--out", "parts") == 130
        assert not Path("parts/loss.png").exists()
        first = Path("parts/adamw/log.jsonl").read_bytes()
        capsys.readouterr()
        assert run("--out", "parts", "--resume", "--compare", "adamw,galore") == 0
        assert Path("parts/adamw/log.jsonl").read_bytes() == first
        for name in ("adamw", "galore"):
            (Path("whole", name) / "loss.png").touch()  # the figure of both is compared below
            (Path("parts", name) / "loss.png").touch()
            assert_same_run(f"parts/{name}", f"whole/{name}")
        assert Path("parts/loss.png").read_bytes() == Path("whole/loss.png").read_bytes()
        assert re.search("optimizer .* adamw .* galore ", capsys.readouterr().out)

        # Another comparison in the folder starts from scratch.
        before = contents()
        assert run(*arguments, "--out", "parts") == 2
        assert contents() == before
        with monkeypatch.context() as patch:
            stop_at(patch, 1, crash)
            with pytest.raises(Killed):
                run(*arguments, "--out", "parts", "--overwrite", "--seed", "1")
        assert not checkpoint.holds_run(Path("parts/galore"))
        before = contents()
        Path("parts/log.jsonl").write_text("")
        capsys.readouterr()
        assert run("--out", "parts", "--resume") == 2
        assert "damaged" in refused(capsys)

    def test_learning_rates_of_compared_runs(self):
        config = settings.Config(compare="galore,adamw", out=Path("here"))
        galore, adamw = config.runs()
        assert (galore.lr, adamw.lr) == (0.0025, 0.002)
        assert (galore.out, adamw.out) == (Path("here/galore"), Path("here/adamw"))
        assert {run.lr for run in replace(config, lr=0.1).runs()} == {0.1}


class TestMicroBatches:
    TOKENS = np.random.default_rng(0).integers(256, size=(8, 17)).astype(np.int32)

    def test_micro_batch_has_every_kth_row(self):
        parts = pretrain.split(self.TOKENS, 4)
        assert parts.shape == (4, 2, 17)
        for k in range(4):
            np.testing.assert_array_equal(parts[k], self.TOKENS[k::4])
        assert pretrain.split(self.TOKENS, 1) is self.TOKENS

    def test_mean_over_micro_batches(self):
        def f(tokens):
            return jnp.mean(tokens, dtype=jnp.float32), {"rows": jnp.mean(tokens**2.0, axis=0)}

        mean, of_columns = pretrain.mean(f, jnp.asarray(self.TOKENS), 4)
        assert mean == pytest.approx(self.TOKENS.mean(), rel=1e-6)
        expected = (self.TOKENS**2.0).mean(axis=0)
        np.testing.assert_allclose(of_columns["rows"], expected, rtol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [{"optimizer": "adamw"}, {"optimizer": "galore", "low_rank_gradients": True}],
        ids=["whole", "cores"],
    )
    def test_micro_batches_equal_one_batch(self, small, options):
        def trained(k):
            config = settings.Config(lr=1e-2, rank=4, steps=9, micro_batches=k, **options)
            functions = pretrain.make_functions(config)
            state = functions.init(jax.random.key(0))
            validation = functions.validation_loss(state.params, self.TOKENS)
            for _ in range(3):
                state, loss = functions.train_step(state, self.TOKENS)
            return state.params, (loss, validation)

        (params, losses), (other, others) = trained(1), trained(4)
        # Sums in another order, three steps of Adam on.
        np.testing.assert_allclose(losses, others, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, other)
