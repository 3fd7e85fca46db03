"""Terminal output, table and figure of runs."""

import numpy as np
import pytest

from examples.common import run_display, run_log


RECORD = {
    "step": 50,
    "tokens": 100,
    "train_loss": 2.5,
    "validation_loss": 2.75,
    "tokens_per_second": 12345.6,
    "seconds": 61.0,
}


class TestReport:
    def test_mean_speed_excludes_the_first_step(self):
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
    def test_display_fits_a_narrow_terminal(self, monkeypatch, capsys, columns, lines):
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

    def test_remaining_time_excludes_compilation(self, monkeypatch, capsys):
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

    def test_plain_lines_without_a_terminal(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "40")
        with run_display.Display(0, 100, 1_500_000) as display:
            display.advance(50)
            display.show(RECORD)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.isprintable()
        assert line.startswith("step  50/100  " + "  ".join(self.PARTS))

    def test_a_line_has_no_earlier_validation(self, capsys):
        later = {k: v for k, v in RECORD.items() if k != "validation_loss"} | {"step": 60}
        with run_display.Display(0, 100, 1_500_000) as display:
            display.show(RECORD)
            display.show(later)
        first, second = capsys.readouterr().out.splitlines()
        assert "validation 2.750" in first
        assert "validation" not in second
        assert "loss 2.500" in second

    @pytest.mark.parametrize(("columns", "tables"), [(100, 1), (50, 2), (40, 4)])
    def test_table_fits_the_terminal(self, monkeypatch, capsys, columns, tables):
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

    def test_figure_shows_loss_against_tokens(self):
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
        tuning = [run._replace(header=header | {"config": {"optimizer": "adamw"}}) for run in runs]
        (tuned,) = run_display.plot(tuning, "r8").axes
        assert (tuned.get_xlabel(), tuned.get_ylabel()) == ("tokens", "loss (nats)")
        train, validation, *other = axes.lines
        np.testing.assert_array_equal(train.get_xydata(), [[2048, 5.0], [4096, 4.0]])
        np.testing.assert_array_equal(validation.get_xydata(), [[0, 5.5], [4096, 4.5]])
        assert len(other) == 2
        assert train.get_color() == validation.get_color() != other[0].get_color()
        assert [label.get_text() for label in axes.get_legend().get_texts()] == [
            "galore: 4.500, state 1.50 MB",
            "adamw: 4.500, state 1.50 MB",
        ]
