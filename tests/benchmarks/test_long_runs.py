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

    def train(program, setting, text, starts):
        for step in (1, 2):
            yield [{"step": step, "validation_loss": step + start.seed} for start in starts]
        raise KeyboardInterrupt

    sizes = SimpleNamespace(state_bytes=8, matrix_state_bytes=4)
    monkeypatch.setattr(bench_long_runs, "compiled", lambda method, setting, together: sizes)
    monkeypatch.setattr(bench_long_runs, "train", train)


def test_a_cut_run_leaves_its_records(two_records, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bench_long_runs.result(JOBS[:1], TEXT, tmp_path)
    line = json.loads((tmp_path / f"{JOBS[0].name}.part").read_text())
    assert [record["step"] for record in line["records"]] == [1, 2]
    assert line["method"] == "adamw"
    assert line["setting"] == JOBS[0].setting.recorded
    assert "together" not in line


def test_runs_of_one_program_have_their_own_lines(two_records, tmp_path):
    jobs = [JOBS[1], JOBS[1]._replace(seed=3, rate=2e-2)]
    with pytest.raises(KeyboardInterrupt):
        bench_long_runs.result(jobs, TEXT, tmp_path)
    lines = [json.loads((tmp_path / f"{job.name}.part").read_text()) for job in jobs]
    assert [line["together"] for line in lines] == [2, 2]
    assert [(line["rate"], line["seed"]) for line in lines] == [(1e-2, 0), (2e-2, 3)]
    assert [[x["validation_loss"] for x in line["records"]] for line in lines] == [[1, 2], [4, 5]]


def test_remaining_runs(two_records, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_long_runs, "RUNS", JOBS)
    part = tmp_path / f"{JOBS[0].name}.part"
    args = argparse.Namespace(out=tmp_path, done=[part], sizes=["toy"], share=1.0)
    remaining = lambda: bench_long_runs.remaining(args, TEXT)
    assert remaining() == JOBS[:2]
    with pytest.raises(KeyboardInterrupt):
        bench_long_runs.result(JOBS[:1], TEXT, tmp_path)
    assert remaining() == JOBS[1:2]  # done in the same setting, on the same text
    assert bench_long_runs.remaining(args, TEXT._replace(about={})) == JOBS[:2]
    args.share = 0.5
    assert remaining() == [job._replace(steps=20) for job in JOBS[:2]]
    (tmp_path / f"{remaining()[1].name}.jsonl").touch()
    assert remaining() == [JOBS[0]._replace(steps=20)]


def test_workers_claim_a_job_once(tmp_path):
    assert [bench_long_runs.claimed(job, tmp_path) for job in (*JOBS[:2], JOBS[0])] == [1, 1, 0]


def test_runs_of_one_program_differ_in_rate_and_seed_alone():
    a, b = JOBS[1], JOBS[1]._replace(rate=1.0, seed=1)
    assert a.program == b.program
    for other in ({"method": "adamw"}, {"size": "6m"}, {"steps": 8}, {"settings": (("rank", 2),)}):
        assert a._replace(**other).program != a.program
