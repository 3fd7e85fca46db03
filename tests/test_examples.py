"""The example: its model is a Llama, its data is deterministic, its command line is robust."""

import json
import math
import string
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


sys.path.append(str(Path(__file__).parents[1] / "examples"))

import data
import llama
import pretrain
import report


SMALL = llama.LlamaConfig(hidden=16, intermediate=44, heads=2, layers=2, vocabulary=50)


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class Net:
    """A Llama's parameters, its logits and its loss, compiled: quicker here than op by op."""

    def __init__(self, config: llama.LlamaConfig):
        self.structure = nnx.split(nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0))))[0]
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
        [{"scan": True}, {"remat": True}, {"scan": True, "remat": True}],
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
        [("60m", 58), ("130m", 134), ("350m", 368), ("1b", 1339), ("7b", 6738)],
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

    @pytest.mark.parametrize("hidden", [32, 256])
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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text("To be, or not to be, that is the question.\n" * 50)
    return tmp_path / "text"


@pytest.fixture
def run(monkeypatch, tmp_path, text):
    """Runs the command line, small, in a folder of its own, and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    tiny = replace(llama.CONFIGS["tiny"], hidden=32, intermediate=88, layers=1)
    monkeypatch.setitem(llama.CONFIGS, "tiny", tiny)
    small = ["--text", str(text), "--steps", "2", "--batch-size", "2", "--seq-len", "16"]

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *small, *arguments])
        try:
            pretrain.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


class TestCommandLine:
    @pytest.mark.parametrize(
        "arguments",
        [["natural_galore", "--scan"], ["contrib_galore"]],
        ids=" ".join,
    )
    def test_a_run_leaves_a_log_and_a_figure(self, run, capsys, arguments):
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
        assert "validation loss" in capsys.readouterr().out

    def test_a_run_is_not_overwritten_unasked(self, run, capsys):
        assert run("--optimizer", "adamw", "--out", "here") == 0
        log = Path("here/log.jsonl")
        written = log.read_bytes()
        header = report.read(log).header
        # The difference is the step count of the learning-rate schedule.
        assert header["state_bytes"] == header["adamw_state_bytes"] + 4
        capsys.readouterr()
        assert run("--out", "here") == 2
        assert capsys.readouterr().err.startswith("error: here holds a run")
        assert run("--out", "here", "--overwrite", "--rank", "0") == 2
        assert log.read_bytes() == written
        report.open_log("name", Path("here"), overwrite=True).close()
        assert log.read_bytes() == b""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--optimizer sgd", "--optimizer must be one of natural_galore, galore, adamw"),
            ("--size 3b", "--size must be one of tiny, 60m"),
            ("--rank 0", "--rank must be at least 1 and below 2**31, got 0"),
            ("--steps 0", "--steps must be at least 1 and below 2**31, got 0"),
            ("--seq-len -1", "--seq-len must be at least 1 and below 2**31, got -1"),
            ("--seed -1", "--seed must be at least 0 and below 2**31, got -1"),
            ("--refresh-every 1000000000000", "--refresh-every must be at least 1 and below"),
            ("--lr nan", "--lr must be above 0 and finite, got nan"),
            ("--weight-decay -3", "--weight-decay must not be negative, got -3"),
            ("--text nowhere", "no file or folder at nowhere"),
            ("--text empty", "the text is empty: empty"),
            ("--text short", "the text is too short: 4 bytes for training, but 34 are needed"),
            ("--out text", "text"),
            ("--out text/below", "text"),
            ("--optimizer contrib_galore --scan", "cannot project stacked layers"),
        ],
    )
    def test_bad_input_ends_with_one_line(self, run, capsys, arguments, message):
        Path("empty").touch()
        Path("short").write_text("short")
        before = sorted(Path().rglob("*"))
        assert run(*arguments.split()) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
        assert sorted(Path().rglob("*")) == before

    def test_the_default_folder_is_a_new_one(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        for expected in ("a", "a-2", "a-3"):
            with report.open_log("a", None, overwrite=False) as log:
                assert Path(log.name) == Path("runs", expected, "log.jsonl")
        with report.open_log("a", None, overwrite=True) as log:
            assert Path(log.name) == Path("runs", "a", "log.jsonl")

    def test_a_loss_that_is_not_finite_ends_the_run(self, run, monkeypatch):
        def functions(config, tx):
            state = pretrain.TrainState({"w": jnp.zeros(2)}, ())
            return lambda key: state, lambda state, _: (state, jnp.nan), lambda params, _: 5.5

        monkeypatch.setattr(pretrain, "make_functions", functions)
        assert run("--out", "here") == (
            "stopped: the loss is not finite at step 1: try a lower --lr; the log so far is in here"
        )
        assert len(report.read(Path("here/log.jsonl")).records) == 1


class TestReport:
    def test_speed_is_tokens_over_time_without_the_first_step(self):
        records = [
            {"step": 0, "tokens": 0},
            {"step": 1, "tokens": 10, "train_loss": 5.0, "tokens_per_second": 1.0},
            {"step": 11, "tokens": 110, "train_loss": 4.0, "tokens_per_second": 100.0},
            {"step": 14, "tokens": 140, "train_loss": 3.0, "tokens_per_second": 10.0},
        ]
        # 100 tokens took 1 s and 30 took 3 s.
        assert report.Run({}, records).tokens_per_second() == pytest.approx(130 / 4)
        assert report.Run({}, records[:2]).tokens_per_second() == 1.0

    def test_the_display_fits_a_narrow_terminal(self, monkeypatch, capsys):
        for name, value in {"COLUMNS": "30", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}.items():
            monkeypatch.setenv(name, value)
        record = {"step": 50, "train_loss": 2.5, "tokens_per_second": 12345.6}
        with report.Display(100, 1_500_000) as display:
            display.advance(50)
            display.show(record | {"validation_loss": 2.75})
            display.live.refresh()
        out = capsys.readouterr().out
        assert "50/100" in out
        for part in ("loss 2.500", "validation 2.750", "12,346 tokens/s", "1.50 MB"):
            assert part in out
