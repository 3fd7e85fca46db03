"""Training in several processes equals training in one, with checkpoints in both directions."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.process_worker import Job, run
from tests.sharding.test_state_shardings import OPTIMIZERS


pytestmark = pytest.mark.slow  # interpreters of their own

ROOT = Path(__file__).parents[2]
TIMEOUT = (
    120  # seconds after which a process ends itself; 15 on two cores beside nine other programs
)
ATTEMPTS = 3  # another program may take a port that was free


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def launch(folder, jobs, processes=2):
    """Runs the jobs in several processes; their final weights, by name of the job."""
    (folder / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    for _ in range(ATTEMPTS):
        failure = attempt(folder, processes)
        connected = all((folder / f"connected.{i}").exists() for i in range(processes))
        if connected or failure is None:
            break
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    return {job.name: dict(np.load(folder / f"{job.name}.npz")) for job in jobs}


def attempt(folder, processes):
    """None if all processes succeed, else their logs."""
    port, logs = free_port(), [folder / f"log.{i}" for i in range(processes)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        workers = []
        for i, log in enumerate(logs):
            arguments = map(str, (folder, processes, i, port, TIMEOUT))
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.process_worker", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(end, worker)
            workers.append(worker)
        deadline = time.monotonic() + TIMEOUT + 30
        # If one fails, the others wait for it.
        while time.monotonic() < deadline and not any(x.poll() for x in workers):
            if all(x.poll() == 0 for x in workers):
                return None
            time.sleep(0.05)
    return "\n".join(f"process {i}:\n{log.read_text()}" for i, log in enumerate(logs))


def end(worker):
    """Ends it and all that it started, if it still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weights in expected.items():
        # The same program up to the order of sums over devices: float32's 6e-8, through a refresh
        # and an inverse root. Measured: 1e-7.
        np.testing.assert_allclose(actual[name], weights, rtol=1e-4, atol=1e-6)


def checkpoints(folder):
    return str(folder / "one"), str(folder / "two")


def test_two_processes_train_like_one_and_share_checkpoints(tmp_path):
    one, two = checkpoints(tmp_path)
    here = run(Job("here", save=one))
    there = launch(tmp_path, [Job("trained", save=two), Job("resumed", start=one)])
    assert_close(there["trained"], here)
    assert_close(there["resumed"], here)
    assert_close(run(Job("back", mesh=(2, 2), start=two)), here)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("core", "Explicit"), ("default", "Auto"), ("window", "Explicit"), ("random", "Auto")],
)
def test_every_kind_of_state_moves_between_meshes(name, kind, tmp_path):
    """Layers of a stack are on different processes too."""
    job = functools.partial(
        Job, kind=kind, settings=OPTIMIZERS[name], leaves=("layers", "up", "norm")
    )
    one, two = checkpoints(tmp_path)
    here = run(job("here", save=one))
    jobs = [job("trained", mesh=(2, 2), save=two), job("resumed", mesh=(1, 4), start=one)]
    for weights in launch(tmp_path, jobs).values():
        assert_close(weights, here)
    assert_close(run(job("back", mesh=(4, 1), start=two)), here)


class TestLaunch:
    def test_failure_shows_the_logs_of_all_processes(self, tmp_path):
        with pytest.raises(
            pytest.fail.Exception, match=r"(?s)process 0:.*process 1:.*`side` must be one"
        ):
            launch(tmp_path, [Job("wrong", settings={"side": "wrong"})])

    def test_taken_port_is_replaced(self, tmp_path, monkeypatch):
        with socket.socket() as taken:
            taken.bind(("localhost", 0))
            taken.listen()
            ports = iter([taken.getsockname()[1], free_port()])
            monkeypatch.setattr(sys.modules[__name__], "free_port", lambda: next(ports))
            launch(tmp_path, [])

    def test_timeout_shows_the_stack(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys.modules[__name__], "TIMEOUT", 1)
        with pytest.raises(pytest.fail.Exception, match=r"(?s)process 0:.*Timeout.*main"):
            launch(tmp_path, [Job("long")])
