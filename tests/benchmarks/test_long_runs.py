"""The queue of long runs: which remain, and what a run that is cut leaves."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.learning import bench_long_runs
from benchmarks.learning.bench_long_runs import Job
from benchmarks.learning.convergence.corpus import Corpus


TEXT = Corpus(np.zeros(9, np.uint16), np.zeros(9, np.uint16), {"dataset": "none"})
JOBS = [Job("adamw", 1e-3, "toy", 40), Job("muon", 1e-2, "toy", 40), Job("muon", 1e-2, "11m", 40)]


@pytest.fixture
def two_records(monkeypatch):
    """Stands for training that is cut after its second validation."""

    def train(*args):
        yield {"step": 1, "validation_loss": 3.0}
        yield {"step": 2, "validation_loss": 2.0}
        raise KeyboardInterrupt

    sizes = SimpleNamespace(state_bytes=8, matrix_state_bytes=4)
    monkeypatch.setattr(bench_long_runs, "compiled", lambda method, setting: sizes)
    monkeypatch.setattr(bench_long_runs, "train", train)


def test_a_cut_run_leaves_its_records(two_records, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bench_long_runs.result(JOBS[0], TEXT, tmp_path / "x.part")
    line = json.loads((tmp_path / "x.part").read_text())
    assert [record["step"] for record in line["records"]] == [1, 2]
    assert line["method"] == "adamw"
    assert line["setting"] == JOBS[0].setting.recorded


def test_remaining_runs(two_records, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_long_runs, "RUNS", JOBS)
    args = argparse.Namespace(out=tmp_path, done=[tmp_path / "x.part"], sizes=["toy"], share=1.0)
    remaining = lambda: bench_long_runs.remaining(args, TEXT)
    assert remaining() == JOBS[:2]
    with pytest.raises(KeyboardInterrupt):
        bench_long_runs.result(JOBS[0], TEXT, tmp_path / "x.part")
    assert remaining() == JOBS[1:2]  # done in the same setting, on the same text
    assert bench_long_runs.remaining(args, TEXT._replace(about={})) == JOBS[:2]
    args.share = 0.5
    assert remaining() == [job._replace(steps=20) for job in JOBS[:2]]
    (tmp_path / f"{remaining()[1].name}.jsonl").touch()
    assert remaining() == [JOBS[0]._replace(steps=20)]
