"""The paper's hyper-parameters as --preset."""

import sys
from pathlib import Path

import pytest

from examples.common import command_line
from examples.pretraining import paper_presets, settings


def parsed(monkeypatch, arguments: str, kind=settings.Config):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments.split()])
    return command_line.from_command_line(kind)


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "rank", "steps"),
        [("60m", 128, 10_000), ("130m", 256, 20_000), ("350m", 256, 60_000), ("1b", 512, 100_000)],
    )
    def test_presets_are_the_papers_table(self, monkeypatch, name, rank, steps):
        config = parsed(monkeypatch, f"--preset {name}")
        (run,) = config.runs()
        assert (run.size, run.rank, run.steps) == (name, rank, steps)
        assert (run.lr, run.scale, run.refresh_every) == (0.01, 0.25, 200)
        assert (run.batch_size, run.seq_len, run.weight_decay) == (512, 256, 0.0)
        assert (run.fisher, run.residual, run.b2) == ("window", "none", 0.999)
        assert (run.model.dtype, run.model.scan) == ("bfloat16", True)
        assert run.batch_size % run.micro_batches == 0

    def test_docs_table_equals_the_presets(self):
        text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
        for name, numbers in paper_presets.PRESETS.items():
            row = [f"{numbers[key]:,}" for key in ("rank", "steps", "micro_batches")]
            assert f"| {' | '.join([name, *row])} |\n" in text

    def test_preset_learning_rate_schedule(self, monkeypatch):
        (run,) = parsed(monkeypatch, "--preset 60m").runs()
        seen = []
        monkeypatch.setitem(
            settings.OPTIMIZERS,
            "natural_galore",
            settings.Recipe(1.0, lambda schedule, config: seen.append(schedule)),
        )
        run.make_optimizer()
        rates = [float(seen[0](step)) for step in (0, 500, 1000, 5500, 10_000)]
        assert rates == pytest.approx([0.0, 0.005, 0.01, (0.01 + 0.001) / 2, 0.001], rel=1e-5)

    def test_flags_take_precedence_over_the_preset(self, monkeypatch):
        flags = {
            "size": "tiny",
            "rank": 4,
            "steps": 3,
            "lr": 0.5,
            "scale": 2.0,
            "refresh_every": 7,
            "batch_size": 6,
            "seq_len": 9,
            "weight_decay": 0.1,
            "fisher": "none",
            "residual": "whitened",
            "b2": 0.5,
            "dtype": "float32",
            "micro_batches": 3,
            "validate_every": 5,
            "save_every": 4,
        }
        words = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in flags.items())
        (run,) = parsed(monkeypatch, f"{words} --no-scan --preset 350m").runs()
        assert {name: getattr(run, name) for name in flags} == flags
        assert not run.scan
        assert {*paper_presets.PRESETS["350m"], *paper_presets.OPTIMIZERS["natural_galore"]} == {
            *flags,
            "scan",
        }
        (run,) = parsed(monkeypatch, "--preset 350m --lr 0.0025").runs()  # as it is by default
        assert run.lr == 0.0025
        (run,) = parsed(monkeypatch, "--preset 350m --steps 700 --dtype float32").runs()
        assert (run.steps, run.dtype, run.rank) == (700, "float32", 256)

    def test_preset_leaves_other_optimizers_unchanged(self, monkeypatch):
        config = parsed(monkeypatch, "--preset 60m --compare natural_galore,galore,adamw")
        natural, galore, adamw = config.runs()
        assert (natural.lr, galore.lr, adamw.lr) == (0.01, 0.01, 0.002)
        assert (galore.scale, galore.fisher, galore.residual) == (0.25, None, "none")
        assert (adamw.scale, adamw.fisher, adamw.residual, adamw.b2) == (None, None, None, None)
        parsed(monkeypatch, "--preset 60m --optimizer adamw")
        parsed(monkeypatch, "--preset 60m --low-rank-gradients")
        (plain,) = parsed(monkeypatch, "").runs()
        assert (plain.lr, plain.scale, plain.fisher, plain.b2) == (0.005, None, None, None)

    def test_preset_settings_reach_the_optimizer(self, monkeypatch):
        options_used = {}
        recipe = lambda schedule, **options: options_used.update(options)
        monkeypatch.setattr(settings.natgalore, "natural_galore", recipe)
        (run,) = parsed(monkeypatch, "--preset 60m --seed 3").runs()
        settings.low_rank(recipe)(None, run)
        assert options_used == {
            "rank": 128,
            "refresh_every": 200,
            "scale": 0.25,
            "fisher": "window",
            "residual": None,
            "b2": 0.999,
            "weight_decay": 0.0,
            "seed": 3,
        }
