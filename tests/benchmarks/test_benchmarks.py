"""The benchmarks at a small size: counted bytes, resumption and printed tables."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.learning import bench_finetune
from benchmarks.memory import bench_offload
from benchmarks.speed import (
    bench_matmul,
    bench_orthogonalize,
    bench_step,
    bench_train,
    profile_step,
)


def run(benchmark, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *arguments])
    benchmark.main()


class TestTrain:
    OUT = Path("runs/train.json")

    def run(self, monkeypatch, *arguments):
        settings = "--size tiny --seq-len 16 --batch-per-device 1 --refresh-every 2"
        monkeypatch.setattr(sys, "argv", [bench_train.__file__, *settings.split(), *arguments])
        bench_train.main()
        return json.loads(self.OUT.read_text())

    @pytest.mark.slow
    def test_a_layout_is_measured_once(self, small, monkeypatch, capsys):
        make = bench_train.make_optimizer

        def make_optimizer(method, *settings):
            if method == "galore":
                raise ValueError("not today:\nit is late")
            return make(method, *settings)

        monkeypatch.setattr(bench_train, "make_optimizer", make_optimizer)
        self.OUT.parent.mkdir()
        what = ["--layouts", "fsdp", "--methods", "adamw,galore", "--steps", "3"]
        results = self.run(monkeypatch, *what, "--one")
        assert results["environment"]["device_count"] == 8
        layout = results["layouts"]["fsdp"]
        assert layout["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
        assert layout["methods"]["galore"] == {"does not run": "not today:"}
        adamw = layout["methods"]["adamw"]
        assert adamw["steps"] == 3
        assert 0 < adamw["median_step_seconds"] <= adamw["slowest_step_seconds"]
        assert adamw["tokens_per_second"] == pytest.approx(8 * 16 / adamw["median_step_seconds"])
        assert adamw["loss"] < math.log(256)
        # An eighth of weights and both moments, but for three norms and a count; and 17 tokens.
        norms = 3 * 32
        parts = (3 * adamw["parameters"] - norms) // 8
        assert adamw["argument_bytes"] == 4 * (parts + norms + 1 + 17)
        # Each weight is gathered for the forward pass at least: 7 of 8 parts come from others.
        gathered = adamw["collectives"]["every step"]["all-gather"]["bytes"]
        assert gathered >= 7 / 8 * 4 * (adamw["parameters"] - norms)
        assert "refresh" not in adamw["collectives"]

        monkeypatch.setattr(bench_train.subprocess, "run", None)  # everything is measured
        assert self.run(monkeypatch, *what) == results
        shown = capsys.readouterr().out
        assert "galore does not run: not today:\n" in shown
        assert "1.000" in shown  # adamw to adamw

    @pytest.mark.slow
    def test_all_methods_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        methods = [*bench_train.METHODS, "adamw_unrolled"]
        what = ["--layouts", "fsdp", "--devices", "8", "--steps", "3"]
        rows = self.run(monkeypatch, *what, "--methods", ",".join(methods))
        rows = rows["layouts"]["fsdp"]["methods"]
        assert list(rows) == methods
        assert all(row["steps"] == 3 for row in rows.values())
        moved = {name: row["collectives"].get("refresh", {}) for name, row in rows.items()}
        assert not moved["adamw"]
        assert not moved["adamw_unrolled"]
        # A refresh moves less than the all-reduced gradients.
        of = lambda name: sum(kind["bytes"] for kind in moved[name].values())
        summed = rows["galore"]["collectives"]["every step"]["all-reduce"]["bytes"]
        assert 0 < of("galore") < summed / 4
        assert of("galore") < of("natural_galore_fisher")  # which turns more


class TestStep:
    @pytest.mark.slow
    def test_methods_take_turns(self, small, monkeypatch, capsys):
        what = "--trees tiny --layers both --dtype float32 --methods adamw,galore,contrib_galore"
        what = [*what.split(), "--refresh-every", "8", "--out", "step.json"]
        run(bench_step, monkeypatch, *what)
        results = json.loads(Path("step.json").read_text())
        unrolled, scanned = results["trees"]
        assert list(unrolled["methods"]) == ["adamw", "galore", "contrib_galore"]
        assert list(scanned["methods"]) == ["adamw", "galore"]  # which takes no stacks
        for of in unrolled["methods"].values():
            assert of["steps"] == 9
            assert 0 < of["hot_ms"] <= of["median_ms"] <= of["slowest_ms"]
        # Both moments of AdamW and a count: 1 layer of 4 x 32² + 3 x 32 x 88, 2 x 256 x 32, norms.
        numbers = 4 * 32 * 32 + 3 * 32 * 88 + 2 * 256 * 32 + 3 * 32
        assert unrolled["methods"]["adamw"]["state_bytes"] == 8 * numbers + 4
        shown = capsys.readouterr().out
        assert "tiny, rank 32, unrolled, float32, weight decay 0.1" in shown

        monkeypatch.setattr(bench_step, "measure", None)  # everything is measured
        run(bench_step, monkeypatch, *what)
        assert json.loads(Path("step.json").read_text()) == results

    @pytest.mark.slow
    def test_methods_that_fail_are_listed(self, small, monkeypatch, capsys):
        def refuse(*settings):
            raise ValueError("not today:\nit is late")

        monkeypatch.setitem(bench_step.METHODS, "adafactor", refuse)
        what = "--trees tiny --layers scanned --dtype bfloat16 --methods adafactor,lion"
        run(bench_step, monkeypatch, *what.split(), "--refresh-every", "2")
        assert "adafactor              not today:\n" in capsys.readouterr().out

    def test_an_unknown_method_is_refused(self, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            run(bench_step, monkeypatch, "--methods", "adam")
        assert "no method 'adam': choose from natural_galore, galore" in capsys.readouterr().err

    @pytest.mark.slow
    def test_scaling_resumes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            bench_step, "SCALING", {"width": [(32, 8, 2), (64, 8, 2)], "layers": [(32, 8, 3)]}
        )
        what = ["--scaling", "--refresh-every", "2", "--out", str(tmp_path / "step.json")]
        what += ["--methods", "adamw,galore"]
        run(bench_step, monkeypatch, *what)
        results = json.loads((tmp_path / "step.json").read_text())
        rows = results["scaling"]
        assert [row["width"] for row in rows["width"]] == [32, 64]
        assert [row["layers"] for row in rows["layers"]] == [3]
        state = rows["width"][1]["methods"]["galore"]["state_bytes"]
        # P, both moments; refreshes and skipped steps of each matrix; two counts, a version.
        assert state == 4 * (2 * (64 * 8 + 2 * 8 * 64) + 2 * 2 + 3)

        monkeypatch.setattr(bench_step, "measure", None)  # everything is measured
        run(bench_step, monkeypatch, *what)
        assert json.loads((tmp_path / "step.json").read_text()) == results


class TestFinetune:
    @pytest.mark.slow
    def test_methods_are_measured_once(self, small, monkeypatch, capsys):
        what = "--tasks tiny --steps 2 --methods adamw,lora --length 8 --batch-size 2"
        run(bench_finetune, monkeypatch, *what.split(), "--out", "finetune.json")
        results = json.loads(Path("finetune.json").read_text())
        found = results["tasks"]["tiny"]
        assert (found["rank"], found["batch_size"], found["length"]) == (32, 2, 8)
        adamw, lora = found["methods"]["adamw"], found["methods"]["lora"]
        # One layer of 4 x 32² and 3 x 32 x 88, embedding and head of 256 x 32, three norms.
        numbers = 4 * 32 * 32 + 3 * 32 * 88 + 2 * 256 * 32 + 3 * 32
        assert adamw["trained_parameters"] == numbers
        assert adamw["state_bytes"] == 8 * numbers + 8  # and counts, of Adam and its schedule
        # A and B beside each of the layer's matrices, and the head.
        beside = 32 * (4 * (32 + 32) + 3 * (32 + 88))
        assert lora["trained_parameters"] == beside + 256 * 32
        assert lora["weights_bytes"] == 4 * (numbers + beside)
        for of in (adamw, lora):
            assert of["total_bytes"] >= of["weights_bytes"] + of["state_bytes"] + of["temp_bytes"]
            assert of["tokens_per_second"] == pytest.approx(16 / of["median_step_seconds"])
        assert "tiny: rank 32, 2 x 8 tokens" in capsys.readouterr().out

        monkeypatch.setattr(bench_finetune, "measure", None)  # everything is measured
        run(bench_finetune, monkeypatch, *what.split(), "--out", "finetune.json")
        assert json.loads(Path("finetune.json").read_text()) == results

    def test_an_unknown_method_is_refused(self, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            run(bench_finetune, monkeypatch, "--methods", "adam")
        assert "no method 'adam': choose from adamw, lora" in capsys.readouterr().err


def test_hot_time_is_the_lower_quartile():
    stepper = object.__new__(bench_step.Stepper)
    stepper.times = [9.0, *[0.001, 0.001, 0.003, 0.005] * 5]
    figures = stepper.figures(20)
    assert figures["hot_ms"] == pytest.approx(1)
    assert figures["median_ms"] == pytest.approx(2)
    assert figures["slowest_ms"] == pytest.approx(5)
    assert figures["refreshes_ms"] == pytest.approx(5 * (2 + 4))
    assert figures["first_ms"] == pytest.approx(9000)


@pytest.mark.slow
def test_offloading_moves_all_state_but_small_arrays(small, monkeypatch):
    what = "--size tiny --rank 8 --batch-size 2 --steps 1 --out offload.json --only adamw"
    run(bench_offload, monkeypatch, *what.split())
    variants = json.loads(Path("offload.json").read_text())["variants"]
    here, there = variants["adamw"], variants["adamw, moments on the host"]
    assert here["state_on_host"] == 0
    vectors = 2 * 4 * 32 + 4  # both moments of the last norm, and a count: not worth the way
    assert there["state_on_device"] == vectors
    assert there["state_on_host"] == here["state_on_device"] - vectors


@pytest.mark.slow
def test_profile_lists_the_operations_of_a_step(small, monkeypatch, capsys):
    monkeypatch.setattr(profile_step, "copy_speed", lambda: 1e9)
    what = "--tree tiny --method adamw --steps 2 --top 1000 --out profile.json"
    run(profile_step, monkeypatch, *what.split())
    (row,) = json.loads(Path("profile.json").read_text())["updates"].values()
    taken = [ms for _, ms in row["operations_ms"].values()]
    assert taken == sorted(taken, reverse=True)
    assert 0 < sum(taken) == pytest.approx(row["device_ms"])
    assert sum(row["by_kind_ms"].values()) == pytest.approx(row["device_ms"])
    assert any("fusion" in name for name in row["operations_ms"])
    # Gradients read, weights and two moments and a count read and written: the tree of TestStep.
    numbers = 4 * 32 * 32 + 3 * 32 * 88 + 2 * 256 * 32 + 3 * 32
    assert row["unavoidable_bytes"] == 4 * (7 * numbers + 2)
    assert row["unavoidable_ms"] == pytest.approx(row["unavoidable_bytes"] / 1e6)
    assert f"unavoidable_bytes: {row['unavoidable_bytes']}" in capsys.readouterr().out


@pytest.mark.slow
def test_orthogonalize_measures_each_shape_once(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_orthogonalize, "SECONDS", 0.0)
    out = tmp_path / "out.json"
    what = ["--sizes", "32", "--batches", "1", "--methods", "direct,gram", "--out", str(out)]
    run(bench_orthogonalize, monkeypatch, *what)
    results = json.loads(out.read_text())
    assert [(x["m"], x["n"]) for x in results["cases"]] == [(32, 32), (32, 85), (32, 128)]
    for row in results["cases"]:
        # The polynomials' 15 % of |U Vᵀ| at most; muon has 0.17.
        assert 0 < row["methods"]["direct"]["gaussian"]["error"] < 0.15
        assert row["methods"]["direct"]["ms"] > 0
    monkeypatch.setattr(bench_orthogonalize, "measure", None)  # everything is measured
    run(bench_orthogonalize, monkeypatch, *what)
    assert json.loads(out.read_text()) == results


def test_crossover_of_operations():
    """12 m² n + 6 m³ and 4 m² n + 18 m³ are equal at n = 1.5 m; where Gram is slower, none is."""
    times = lambda x, gram: {"direct": {"ms": 12 * x + 6}, "gram": {"ms": gram(x)}}
    row = lambda m, batch, x, gram: {
        "m": m,
        "batch": batch,
        "n": int(x * m),
        "methods": times(x, gram),
    }
    rows = [row(64, batch, x, lambda x: 4 * x + 18) for batch in (2, 1) for x in (4.0, 1.0, 2.0)]
    rows += [row(32, 1, x, lambda x: 99.0) for x in (1.0, 2.0)]
    assert bench_orthogonalize.crossover(rows) == {"64": 1.5}


@pytest.mark.slow
def test_matmul_errors_match_the_arithmetic(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_matmul, "SIZES", {"small": (32, 48, 8, 2)})
    run(bench_matmul, monkeypatch, "--sizes", "small", "--out", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())
    eps = np.finfo(np.float32).eps
    assert results["small, float32"]["highest"]["down_error"] < 4 * eps
    assert results["small, float32"]["highest"]["up_error"] < 4 * eps
    split = results["small, bfloat16"]["split"]["down_error"]
    assert 0.1 * 2**-17 < split < 2**-15  # two bfloat16 have 16 digits
