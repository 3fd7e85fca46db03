"""The example: its model is a Llama, its data is deterministic, its command line is robust."""

import contextlib
import doctest
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import string
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
from flax import nnx

from examples.common import (
    checkpoint,
    command_line,
    data,
    llama,
    run_display,
    run_log,
    sample,
    training_loop,
)
from examples.pretraining import pretrain, settings
from tests.helpers.cases import slow


SMALL = llama.LlamaConfig(hidden=16, intermediate=44, heads=2, layers=2, vocabulary=50)


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class Net:
    """A Llama's parameters, its logits and its loss, compiled: quicker here than op by op."""

    def __init__(self, config: llama.LlamaConfig):
        self.structure = llama.structure(config)
        self.logits = jax.jit(lambda params, tokens: self.model(params)(tokens))
        self.loss = jax.jit(
            lambda params, tokens: llama.next_token_loss(self.model(params), tokens)
        )
        self.config = config

    def model(self, params) -> llama.Llama:
        return nnx.merge(self.structure, params)

    def init(self):
        @jax.jit
        def params(key):
            model = llama.Llama(self.config, nnx.Rngs(key))
            return nnx.to_pure_dict(nnx.state(model, nnx.Param))

        return params(jax.random.key(0))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(SMALL)


@pytest.fixture(scope="module")
def params(net):
    return net.init()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(50, size=(2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def reference(net, params, tokens):
    """Loss and gradient of the plain, unrolled model."""
    return jax.jit(jax.value_and_grad(net.loss))(params, tokens)


class TestLlama:
    @pytest.mark.parametrize(
        "flags",
        [{"scan": True}, *slow({"remat": True}, {"scan": True, "remat": True})],
        ids=" ".join,
    )
    def test_scan_and_remat_leave_the_function_and_its_gradient_alone(
        self, params, tokens, reference, flags
    ):
        def stack(params):
            layers = [params["layers"][i] for i in range(SMALL.layers)]
            return params | {"layers": jax.tree.map(lambda *ws: jnp.stack(ws), *layers)}

        loss, grads = reference
        if "scan" in flags:
            params, grads = stack(params), stack(grads)
        other = Net(replace(SMALL, **flags))
        assert jax.tree.map(jnp.shape, jax.eval_shape(other.init)) == jax.tree.map(
            jnp.shape, params
        )
        other_loss, other_grads = jax.jit(jax.value_and_grad(other.loss))(params, tokens)
        # The same products in another order: a few units in the last place of float32.
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other_grads, grads)

    @pytest.mark.parametrize(
        ("name", "millions"),
        [("60m", 58), ("130m", 134), *slow(("350m", 368), ("1b", 1339), ("7b", 6738))],
    )
    def test_named_sizes_have_the_parameters_of_the_paper(self, name, millions):
        config = llama.CONFIGS[name]
        unrolled = llama.abstract_params(config)
        scanned = llama.abstract_params(replace(config, scan=True))
        assert round(size(unrolled) / 1e6) == millions
        assert size(scanned) == size(unrolled)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(unrolled))
        h, i, layers = config.hidden, config.intermediate, config.layers
        assert scanned["layers"]["attention"]["query"]["kernel"].shape == (layers, h, h)
        assert scanned["layers"]["mlp"]["down"]["kernel"].shape == (layers, i, h)
        assert unrolled["layers"][layers - 1]["mlp"]["gate"]["kernel"].shape == (h, i)

    @pytest.mark.parametrize("hidden", [32, *slow(256)])
    def test_training_starts_at_the_loss_of_a_uniform_guess(self, hidden):
        config = replace(SMALL, hidden=hidden, layers=1, vocabulary=256)
        tokens = np.random.default_rng(0).integers(256, size=(8, 33)).astype(np.int32)
        net = Net(config)
        loss = net.loss(net.init(), tokens)
        # Logits of variance 1 / hidden add half of that; the rest is the noise of 256 targets.
        assert loss == pytest.approx(math.log(256) + 0.5 / hidden, abs=0.03)

    def test_a_later_token_does_not_change_earlier_logits(self, net, params, tokens):
        changed = tokens.copy()
        changed[:, 5] = (changed[:, 5] + 1) % 50
        before, after = net.logits(params, tokens), net.logits(params, changed)
        np.testing.assert_array_equal(before[:, :5], after[:, :5])
        assert np.all(np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-6)

    def test_rotated_products_depend_on_the_distance_only(self):
        query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
        angles = llama.rotary_angles(12, 8)

        def product(i, j):
            return jnp.vdot(
                llama.rotate(query, angles[i][None]), llama.rotate(key, angles[j][None])
            )

        # Angles up to 11 radians are rounded to 1e-6, the products are of order one.
        np.testing.assert_allclose(product(3, 1), product(11, 9), atol=1e-5)
        assert abs(product(3, 1) - product(3, 2)) > 1e-2

    def test_attention_equals_numpy(self):
        attention = llama.Attention(SMALL, nnx.Rngs(0))
        x = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
        q, k, v = (
            (x.astype(np.float64) @ np.asarray(w.kernel[...], np.float64)).reshape(2, 7, 2, 8)
            for w in (attention.query, attention.key, attention.value)
        )
        # RoPE on complex numbers: a rotation is a product with exp(i · position · frequency).
        turn = np.exp(1j * np.outer(np.arange(7), 10_000.0 ** (-np.arange(4) / 4)))[:, None, :]
        q, k = ((z[..., :4] + 1j * z[..., 4:]) * turn for z in (q, k))
        mixed = np.zeros((2, 7, 2, 8))
        for b, i, h in np.ndindex(2, 7, 2):
            scores = np.real(k[b, : i + 1, h].conj() @ q[b, i, h]) / np.sqrt(8)
            weights = np.exp(scores) / np.exp(scores).sum()
            mixed[b, i, h] = weights @ v[b, : i + 1, h]
        expected = mixed.reshape(2, 7, 16) @ np.asarray(attention.out.kernel[...], np.float64)
        # Float32 against float64 over sums of 16 terms of order one.
        np.testing.assert_allclose(attention(jnp.asarray(x)), expected, atol=1e-5)

    def test_mlp_equals_numpy(self):
        mlp = llama.MLP(SMALL, nnx.Rngs(0))
        x = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
        gate, up, down = (np.asarray(w.kernel[...], float) for w in (mlp.gate, mlp.up, mlp.down))
        expected = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
        np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, atol=1e-5)  # as for attention

    def test_a_layer_adds_to_what_it_reads(self):
        layer = llama.Layer(SMALL, nnx.Rngs(0))
        for kernel in (layer.attention.out.kernel, layer.mlp.down.kernel):
            kernel[...] = jnp.zeros_like(kernel[...])
        x = jax.random.normal(jax.random.key(0), (2, 7, 16))
        np.testing.assert_array_equal(layer(x), x)

    def test_weights_stay_float32_under_bfloat16(self, tokens):
        net = Net(replace(SMALL, dtype=jnp.bfloat16))
        params = jax.eval_shape(net.init)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        assert jax.eval_shape(net.logits, params, tokens).dtype == jnp.bfloat16
        assert jax.eval_shape(net.loss, params, tokens).dtype == jnp.float32

    def test_heads_that_do_not_divide_the_width_are_refused(self):
        with pytest.raises(ValueError, match=r"2 \* heads, got 16 and 3 heads"):
            replace(SMALL, heads=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of 40 bytes, each of one letter, a hidden one, and one in a folder within."""
    for letter in string.ascii_lowercase:
        (tmp_path / f"{letter}.txt").write_text(letter * 40)
    (tmp_path / ".hidden").write_text("?" * 40)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "z.txt").write_text("Z" * 40)
    return tmp_path


class TestData:
    def test_a_folder_is_split_by_file(self, folder):
        corpus = data.load(folder)
        train, validation = set(corpus.train.tobytes()), set(corpus.validation.tobytes())
        assert validation == set(b"at")  # every 20th, from the first on
        assert train == set(string.ascii_lowercase.encode() + b"Z") - validation
        assert corpus.files == 27
        assert len(corpus.train) + len(corpus.validation) == 27 * 40

    def test_a_single_file_is_split_by_position(self, folder):
        (folder / "one").write_bytes(bytes(range(200)))
        corpus = data.load(folder / "one")
        assert corpus.train.tolist() == list(range(190))
        assert corpus.validation.tolist() == list(range(190, 200))

    def test_the_digest_sees_contents_and_names(self, folder):
        digests = {data.load(folder).sha256}
        (folder / "m.txt").write_text("M" * 40)
        digests.add(data.load(folder).sha256)
        (folder / "m.txt").rename(folder / "m2.txt")
        digests.add(data.load(folder).sha256)
        assert len(digests) == 3

    def test_the_default_is_the_standard_library_alone(self):
        files = data.standard_library()
        assert len(files) > 300
        assert {file.suffix for file in files} == {".py"}
        assert {"argparse.py", "decoder.py"} <= {file.name for file in files}
        assert not any("site-packages" in file.parts or "test" in file.parts for file in files)

    def test_a_batch_is_a_function_of_seed_and_step(self):
        tokens = np.arange(100, dtype=np.uint8)

        def batch(seed, step):
            return data.training_batch(tokens, 4, 10, seed=seed, step=step)

        np.testing.assert_array_equal(batch(0, 7), batch(0, 7))
        assert not np.array_equal(batch(0, 7), batch(0, 8))
        assert not np.array_equal(batch(0, 7), batch(1, 7))
        assert batch(0, 7).shape == (4, 10)
        np.testing.assert_array_equal(np.diff(batch(0, 7)), 1)

    def test_batches_reach_the_first_and_the_last_token(self):
        tokens = np.arange(12, dtype=np.uint8)
        seen = data.training_batch(tokens, 100, 10, seed=0, step=0)
        assert (seen.min(), seen.max()) == (0, 11)
        first, last = data.validation_batches(tokens, 2, 10, batches=2)
        assert (first.min(), last.max()) == (0, 11)

    def test_a_text_of_exactly_one_batch_is_long_enough(self):
        corpus = data.Corpus(np.zeros(20, np.uint8), np.zeros(10, np.uint8), 1, "")
        data.check_length(corpus, 2, 10)
        with pytest.raises(ValueError, match="20 bytes for training, but 22"):
            data.check_length(corpus, 2, 11)
        with pytest.raises(ValueError, match="9 bytes for validation, but 10"):
            data.check_length(corpus._replace(validation=np.zeros(9, np.uint8)), 2, 10)


EXAMPLES = Path(pretrain.__file__).parent
TEXT = "To be, or not to be, that is the question.\n" * 50


make_functions = functools.cache(pretrain.make_functions)


def make_functions_once(config: settings.Config):
    """Compiles once for all runs that compute the same."""
    return make_functions(settings.Config(**config.fixed()))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line, small, in a folder of its own, and returns its exit status."""
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


def contents(folder: Path = Path()) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def log_without_times(folder: str) -> list[dict]:
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def saved_state(folder: str) -> tuple[int, list[np.ndarray]]:
    """The step and the arrays of the checkpoint in a folder, as Orbax finds them."""
    with ocp.CheckpointManager(Path(folder, "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        items = ocp.args.Composite(state=ocp.args.StandardRestore())
        return step, [
            np.asarray(x) for x in jax.tree.leaves(manager.restore(step, args=items).state)
        ]


def assert_same_run(folder: str, other: str) -> None:
    """Params, optimizer state, losses, picture and sample, all to the last bit."""
    step, state = saved_state(folder)
    other_step, other_state = saved_state(other)
    assert step == other_step
    assert len(state) == len(other_state)
    for x, y in zip(state, other_state, strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
    assert log_without_times(folder) == log_without_times(other)
    for name in ("sample.txt", "loss.png"):
        assert Path(folder, name).read_bytes() == Path(other, name).read_bytes()


def refused(capsys) -> str:
    """What was said of bad input, after checking that it is one line and nothing else."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


class Killed(BaseException):
    """Ends a run as a crash does: nothing catches it."""


def stop_at(monkeypatch, step: int, how) -> None:
    """Has `how` called when the batch of a step is made, once."""
    batch = data.training_batch
    left = [how]

    def stopping(*args, **kwargs):
        if kwargs["step"] == step and left:
            left.pop()()
        return batch(*args, **kwargs)

    monkeypatch.setattr(data, "training_batch", stopping)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def crash() -> None:
    raise Killed


class TestCommandLine:
    @pytest.mark.parametrize(
        "arguments",
        [pytest.param(["natural_galore", "--scan"], marks=pytest.mark.slow), ["contrib_galore"]],
        ids=" ".join,
    )
    def test_a_run_leaves_a_log_a_figure_and_a_sample(self, run, capsys, arguments):
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
        assert all(c.isprintable() or c in "\n\t" for c in out)  # no terminal, no control codes

    @pytest.mark.slow
    def test_low_rank_gradients_train_to_the_same(self, monkeypatch):
        """Through a refresh; without their flag's effect the same config takes whole gradients."""
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
        # A core's rounding over its smallest entries, by Adam, at 4 steps of 1e-2.
        chex.assert_trees_all_close(cores, trained(), atol=2e-4)

    @pytest.mark.slow
    def test_a_residual_is_asked_for(self):
        """Or is there by default, and is not where gradients are cores."""
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
            _, state = tx.update(params, tx.init(params), params)  # at a rate of zero
            updates, _ = tx.update(params, state, params)
            moved.append(float(jnp.linalg.matrix_rank(updates["mlp"]["up"]["kernel"])))
        assert moved == [8, 4, 8, 4, 4]

    @pytest.mark.slow
    def test_a_run_is_not_overwritten_unasked(self, run, capsys):
        assert run("--optimizer", "adamw", "--out", "here") == 0
        header = run_log.read(Path("here/log.jsonl")).header
        # The difference is the step count of the learning-rate schedule.
        assert header["state_bytes"] == header["adamw_state_bytes"] + 4
        before = contents()
        capsys.readouterr()
        for arguments in ("--out here", "--out here --overwrite --rank 0", "--compare galore"):
            assert run("--out", "here", *arguments.split()) == 2
            refused(capsys)
        assert contents() == before
        Path("here/checkpoints/9").mkdir()  # a later step than the new run will reach
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
            ("--optimizer adamw --low-rank-gradients", "is for natural_galore and galore"),
            ("--compare adamw,contrib_galore --residual fira", "is for natural_galore and galore"),
            ("--residual fira --low-rank-gradients", "--residual needs whole gradients"),
            ("--residual fire", "--residual must be one of none, isotropic, whitened, fira"),
            ("--size 3b", "--size must be one of tiny, 60m"),
            ("--rank 0", "--rank must be at least 1 and below 2**31, got 0"),
            ("--steps 0", "--steps must be at least 1 and below 2**31, got 0"),
            ("--save-every 0", "--save-every must be at least 1 and below 2**31, got 0"),
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
            ("--resume --out here", "here holds no run to resume"),
            ("--resume --out text", "text holds no run to resume"),
        ],
    )
    def test_bad_input_ends_with_one_line(self, run, capsys, arguments, message):
        Path("empty").touch()
        Path("short").write_text("short")
        before = contents()
        assert run(*arguments.split()) == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_the_default_folder_is_a_new_one(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        for expected in ("a", "a-2", "a-3"):
            folder = checkpoint.free_folder("a", overwrite=False)
            assert folder == Path("runs", expected)
            checkpoint.refuse_used([folder], overwrite=False)
            checkpoint.clear([folder])
            (folder / "log.jsonl").touch()
        assert checkpoint.free_folder("a", overwrite=True) == Path("runs", "a")

    def test_a_loss_that_is_not_finite_ends_the_run_unsaved(self, run, monkeypatch):
        def functions(config):
            state = training_loop.TrainState({"w": jnp.zeros(2)}, ())
            step = jax.jit(lambda state, tokens: (state, jnp.nan))
            return pretrain.Functions(lambda key: state, step, lambda params, tokens: 5.5)

        monkeypatch.setattr(pretrain, "make_functions", functions)
        assert run("--out", "here", "--save-every", "1") == (
            "stopped: the loss is not finite at step 1: try a lower --lr; the log so far is in here"
        )
        assert len(run_log.read(Path("here/log.jsonl")).records) == 1
        assert list(Path("here/checkpoints").iterdir()) == []

    def test_letters_that_the_output_lacks_do_not_end_it(self, run, monkeypatch):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
        assert run("--optimizer", "adamw", "--out", "here", "--prompt", "é") == 0
        sys.stdout.flush()
        assert b"\\xe9" in written.getvalue()
        assert Path("here/sample.txt").read_text(encoding="utf-8").startswith("é")
        assert Path("here/loss.png").exists()

    def test_ctrl_c_while_the_text_is_read_ends_with_one_line(self, run, monkeypatch, capsys):
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
    """Long enough for two refreshes on either side of the stop, and for records at even steps."""

    SETTINGS = "--steps 8 --refresh-every 2 --validate-every 4 --save-every 3 --rank 4"

    @pytest.mark.parametrize(
        "arguments",
        [["natural_galore"], pytest.param(["contrib_galore"], marks=pytest.mark.slow)],
        ids=" ".join,
    )
    def test_a_stopped_run_goes_on_to_the_last_bit(self, run, monkeypatch, capsys, arguments):
        arguments = ["--optimizer", *arguments, *self.SETTINGS.split()]
        assert run(*arguments, "--out", "whole") == 0

        with monkeypatch.context() as patch:
            stop_at(patch, 5, interrupt)
            capsys.readouterr()
            assert run(*arguments, "--out", "interrupted") == 130
        assert capsys.readouterr().err == (
            f"interrupted at step 5 of {arguments[1]}; "
            "to go on: python pretrain.py --out interrupted --resume\n"
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
    def test_a_full_disk_stops_it_with_one_line_and_it_goes_on(self, run, monkeypatch):
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
                "left; to go on: python pretrain.py --out stopped --resume"
            )
        assert saved_state("stopped")[0] == 3
        assert run("--out", "stopped", "--resume") == 0
        assert_same_run("stopped", "whole")

    @pytest.mark.slow
    def test_a_log_that_cannot_be_written_stops_it_with_one_line(self, run, monkeypatch):
        def show(display, record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(run_display.Display, "show", show)
        assert run("--out", "here") == (
            "stopped: No space left on device; the log so far is in here"
        )

    def test_a_finished_run_shows_itself_again_with_another_prompt(self, finished, run, capsys):
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
        """Folders of runs that are expensive to make; filled by `finished`."""
        return tmp_path_factory.mktemp("template")

    @pytest.fixture
    def finished(self, run, template, capsys):
        """A finished run in the folder `here` and another of its kind in `wider`."""
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
            ("--steps 700", "the run in here began with --steps 2, not 700: leave the flag out"),
            ("--size 60m", "the run in here began with --size tiny, not 60m"),
            ("--optimizer galore", "the run in here began with --optimizer adamw, not galore"),
            ("--compare adamw", "the run in here began with --compare None, not adamw"),
            ("--lr 1", "the run in here began with --lr 0.002, not 1.0"),
            ("--scan", "the run in here began with --scan False, not True"),
            ("--text other", "the text is not the one that the run in here read"),
            ("--text nowhere", "no file or folder at nowhere"),
            ("--save-every 0", "--save-every must be at least 1"),
        ],
    )
    def test_what_contradicts_the_run_is_refused(self, finished, run, capsys, arguments, message):
        Path("other").write_text(TEXT + "!")
        before = contents()
        assert run("--out", "here", "--resume", *arguments.split()) == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_what_agrees_with_the_run_is_accepted(self, finished, run):
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
            (lambda: shutil.rmtree("here/checkpoints"), "here holds no checkpoint to resume from"),
            (lambda: shutil.rmtree("here/checkpoints/2"), "here holds no checkpoint to resume"),
            (swap, "the checkpoint in here is of another run: --scan True, not False"),
            (shorten("log.jsonl"), "here/log.jsonl is damaged or from another version"),
            (lambda: Path("here/log.jsonl").write_text("{}\n"), "here/log.jsonl is damaged or"),
            (lambda: Path("here/log.jsonl").unlink(), "here holds no run to resume"),
        ],
        ids=range(9),
    )
    def test_a_damaged_run_is_refused_and_left_alone(self, finished, run, capsys, damage, message):
        damage()
        before = contents()
        assert run("--out", "here", "--resume") == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_a_log_that_misses_records_is_refused(self, finished, run, capsys):
        log = Path("here/log.jsonl")
        log.write_text(log.read_text()[:-20])
        before = contents()
        assert run("--out", "here", "--resume") == 2
        assert "here/log.jsonl is shorter than when the checkpoint was saved" in refused(capsys)
        assert contents() == before

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("FORMAT", "its notes have format 1, these examples read 99"),
            ("FORMAT_VERSION", "its optimizer states have format 1, these examples read 99"),
        ],
    )
    def test_another_version_is_refused(self, finished, run, capsys, monkeypatch, name, message):
        before = contents()
        monkeypatch.setattr(checkpoint, name, 99)
        assert run("--out", "here", "--resume") == 2
        assert message in refused(capsys)
        assert contents() == before

    def test_the_first_signal_is_noted_and_the_second_one_kills(self, request):
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
    def test_two_signals_end_it_at_once_while_it_compiles(self, tmp_path):
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
    def test_a_process_that_gets_a_signal_saves_and_goes_on(self, tmp_path, number):
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
        assert 4 < saved_state(str(tmp_path / "here"))[0] < 150  # its record was there
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
    def test_an_interrupted_comparison_goes_on(self, run, monkeypatch, capsys):
        arguments = ["--compare", "adamw,galore", "--rank", "4"]
        assert run(*arguments, "--out", "whole") == 0
        out = capsys.readouterr().out
        assert "adamw at learning rate 0.002" in out
        assert "galore at learning rate 0.0025" in out
        with monkeypatch.context() as patch:
            stop_at(patch, 1, lambda: stop_at(patch, 1, interrupt))  # the second run's first step
            assert run(*arguments, "--out", "parts") == 130
        assert not Path("parts/loss.png").exists()
        first = Path("parts/adamw/log.jsonl").read_bytes()
        capsys.readouterr()
        assert run("--out", "parts", "--resume", "--compare", "adamw,galore") == 0
        assert Path("parts/adamw/log.jsonl").read_bytes() == first
        for name in ("adamw", "galore"):
            (Path("whole", name) / "loss.png").touch()  # the picture is of both, above
            (Path("parts", name) / "loss.png").touch()
            assert_same_run(f"parts/{name}", f"whole/{name}")
        assert Path("parts/loss.png").read_bytes() == Path("whole/loss.png").read_bytes()
        assert re.search("optimizer .* adamw .* galore ", capsys.readouterr().out)

        # Another comparison in the folder begins anew, and does not take up what is left there.
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

    def test_each_gets_its_own_learning_rate_and_all_a_given_one(self):
        config = settings.Config(compare="galore,adamw", out=Path("here"))
        galore, adamw = config.runs()
        assert (galore.lr, adamw.lr) == (0.0025, 0.002)
        assert (galore.out, adamw.out) == (Path("here/galore"), Path("here/adamw"))
        assert {run.lr for run in replace(config, lr=0.1).runs()} == {0.1}

    def test_the_picture_shows_loss_against_tokens(self):
        header = {"parameters": 1e6, "state_bytes": 1_500_000}
        records = [
            {"step": 0, "tokens": 0, "validation_loss": 5.5},
            {"step": 1, "tokens": 2048, "train_loss": 5.0},
            {"step": 2, "tokens": 4096, "train_loss": 4.0, "validation_loss": 4.5},
        ]
        runs = [
            run_log.Run(header | {"config": {"size": "tiny", "optimizer": name}}, records)
            for name in ("galore", "adamw")
        ]
        (axes,) = run_display.plot(runs).axes
        assert axes.get_xlabel() == "tokens (bytes of text)"
        assert axes.get_ylabel() == "loss (nats per byte)"
        train, validation, *other = axes.lines
        np.testing.assert_array_equal(train.get_xydata(), [[2048, 5.0], [4096, 4.0]])
        np.testing.assert_array_equal(validation.get_xydata(), [[0, 5.5], [4096, 4.5]])
        assert len(other) == 2
        assert train.get_color() == validation.get_color() != other[0].get_color()
        assert [label.get_text() for label in axes.get_legend().get_texts()] == [
            "galore: 4.500, state 1.50 MB",
            "adamw: 4.500, state 1.50 MB",
        ]


class TestSample:
    @pytest.mark.slow
    @pytest.mark.parametrize("given", [3, 8, 11], ids="{} bytes".format)
    def test_it_is_what_the_model_says_of_the_last_bytes(self, net, params, given):
        prompt = bytes(range(given))
        # So cold that the likeliest token is drawn each time.
        written = sample.generate(
            SMALL, params, prompt, count=9, length=8, seed=0, temperature=1e-6
        )
        text = prompt
        for _ in range(9):
            seen = np.frombuffer(text[-8:], np.uint8).astype(np.int32)
            text += bytes([int(net.logits(params, seen[None])[0, -1].argmax())])
        assert bytes(written) == text[given:]

    def test_it_is_a_function_of_the_seed(self, params):
        def written(seed):
            return sample.generate(SMALL, params, b"!", count=30, length=8, seed=seed)

        assert written(0) == written(0) != written(1)
        assert len(set(written(0))) > 5

    def test_nothing_in_it_steers_the_terminal(self):
        assert doctest.testmod(sample).failed == 0
        assert doctest.testmod(run_display).failed == 0
        escaped = sample.printable(b"a\tb\nc\r\x00\xe2\x80\xae\xc2\x9b")
        assert escaped == "a\tb\nc\\r\\x00\\u202e\\x9b"
        assert sample.printable("naïve 日本".encode()) == "naïve 日本"


RECORD = {
    "step": 50,
    "tokens": 100,
    "train_loss": 2.5,
    "validation_loss": 2.75,
    "tokens_per_second": 12345.6,
    "seconds": 61.0,
}


class TestReport:
    def test_speed_is_tokens_over_time_without_the_first_step(self):
        records = [
            {"step": 0, "tokens": 0},
            {"step": 1, "tokens": 10, "train_loss": 5.0, "tokens_per_second": 1.0},
            {"step": 11, "tokens": 110, "train_loss": 4.0, "tokens_per_second": 100.0},
            {"step": 14, "tokens": 140, "train_loss": 3.0, "tokens_per_second": 10.0},
        ]
        # 100 tokens took 1 s and 30 took 3 s.
        assert run_log.Run({}, records).tokens_per_second() == pytest.approx(130 / 4)
        assert run_log.Run({}, records[:2]).tokens_per_second() == 1.0

    PARTS = ("loss 2.500", "validation 2.750", "12,346 tokens/s", "optimizer state 1.50 MB")

    @pytest.mark.parametrize(("columns", "lines"), [(30, 3), (40, 2)])
    def test_the_display_fits_a_narrow_terminal(self, monkeypatch, capsys, columns, lines):
        terminal = {"COLUMNS": str(columns), "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}
        for name, value in terminal.items():
            monkeypatch.setenv(name, value)
        with run_display.Display(0, 100, 1_500_000) as display:
            display.advance(50)
            display.show(RECORD)
            display.live.refresh()
        out = capsys.readouterr().out
        assert "50/100" in out
        for part in self.PARTS:
            assert part in out  # in one piece

        filled = run_display.fill(self.PARTS, columns).splitlines()
        assert max(map(len, filled)) <= columns
        assert len(filled) == lines

    def test_the_time_left_counts_steps_alone(self, monkeypatch, capsys):
        clock = iter([0.0, 30.0, 35.0, 50.0])
        monkeypatch.setattr(run_display.time, "perf_counter", lambda: next(clock))
        before_any = {k: v for k, v in RECORD.items() if k != "train_loss"}
        with run_display.Display(0, 100, 1_500_000) as display:
            display.show(before_any | {"step": 0})
            display.show(RECORD | {"step": 1})
            display.show(RECORD | {"step": 10})
        first, warm, tenth = capsys.readouterr().out.splitlines()
        assert "left" not in first + warm
        assert tenth.endswith("3:00 left")  # 20 s for 10 steps

    def test_tyros_box_becomes_a_line(self):
        assert doctest.testmod(command_line).failed == 0

    def test_no_terminal_gets_plain_lines(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "40")
        with run_display.Display(0, 100, 1_500_000) as display:
            display.advance(50)
            display.show(RECORD)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.isprintable()
        assert line.startswith("step  50/100  " + "  ".join(self.PARTS))

    @pytest.mark.parametrize(("columns", "tables"), [(100, 1), (50, 2), (40, 4)])
    def test_the_table_fits_the_terminal(self, monkeypatch, capsys, columns, tables):
        monkeypatch.setenv("COLUMNS", str(columns))
        header = {"state_bytes": 1_500_000, "adamw_state_bytes": 2_000_000}
        names = ("natural_galore", "galore", "adamw", "contrib_galore")
        run_display.show_table(
            [run_log.Run(header | {"config": {"optimizer": name}}, [RECORD]) for name in names]
        )
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= columns
        assert out.count("validation loss") == tables
        assert all(name in out for name in names)
