"""Helpers for tests that run the examples: outputs of a run, interruptions, comparisons."""

import functools
import json
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from examples.common import data


TEXT = "To be, or not to be, that is the question.\n" * 50


def contents(folder: Path = Path()) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def log_without_times(folder: str) -> list[dict]:
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def saved_state(folder: str) -> tuple[int, list[np.ndarray]]:
    """Step and arrays of the checkpoint in a folder."""
    with ocp.CheckpointManager(Path(folder, "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        items = ocp.args.Composite(state=ocp.args.StandardRestore())
        return step, [
            np.asarray(x) for x in jax.tree.leaves(manager.restore(step, args=items).state)
        ]


def assert_same_run(folder: str, other: str) -> None:
    """Checks that params, optimizer state, log, figure and sample are bitwise equal."""
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
    """The error message; checks that the output is this one line."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


class Killed(BaseException):
    """Simulates a crash: no handler catches it."""


def stop_at(monkeypatch, step: int, how) -> None:
    """Calls `how` once, when the batch of a step is requested."""
    batch = data.training_batch
    pending = [how]

    def stopping(*args, **kwargs):
        if kwargs["step"] == step and pending:
            pending.pop()()
        return batch(*args, **kwargs)

    monkeypatch.setattr(data, "training_batch", stopping)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def crash() -> None:
    raise Killed


class CompiledOnce:
    """A jitted function with one compilation shared by all runs."""

    def __init__(self, f):
        self.f = f
        self.compile = functools.cache(lambda: self.lowered.compile())

    def lower(self, *args):
        self.lowered = self.f.lower(*args)
        return self
