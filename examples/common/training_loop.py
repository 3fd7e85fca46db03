"""The training loop of all examples: display, log, checkpoints and a clean stop on Ctrl-C.

An example describes its training as a `Job`. `train` runs one job, from the checkpoint if there is
one; `run` is the main program, for one optimizer or several in turn.
"""

import contextlib
import io
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from examples.common import checkpoint, command_line, run_display, run_log


LOG_EVERY = 10  # steps


class TrainState(NamedTuple):
    """Weights and optimizer state."""

    params: Any
    opt_state: Any


class Job(NamedTuple):
    """One training run as functions.

    Attributes:
        steps: total number of steps.
        tokens_per_step: tokens of a batch, for the log.
        init: key -> TrainState.
        train_step: (TrainState, batch) -> (TrainState, loss); jitted.
        batch: step, counted from 1 -> batch.
        abstract_batch: shapes and dtypes of a batch.
        validate: params -> record with `validation_loss` and other measurements.
        data: description of the data for the log, with its `sha256`.
        about: header of the log -> one line that describes the run.
        position: () -> position of the next batch as JSON, for the checkpoint; not needed if the
            step determines the batch, nor is `seek`.
        seek: position -> None; moves to the position.
        export: params -> weights that the example writes to the folder `model` at the end; None if
            it writes none.
    """

    steps: int
    tokens_per_step: int
    init: Callable[..., Any]
    train_step: Callable[..., Any]
    batch: Callable[[int], Any]
    abstract_batch: Any
    validate: Callable[[Any], dict[str, float]]
    data: dict[str, Any]
    about: Callable[[dict[str, Any]], str]
    position: Callable[[], Any] = lambda: None
    seek: Callable[[Any], None] = lambda position: None
    export: Callable[[Any], Any] | None = None


def header(config: command_line.Run, data: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """The first line of the log: config, environment, data, parameters and bytes of state."""
    return {
        "config": config.saved(),
        "environment": run_log.environment(),
        "data": data,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": run_log.nbytes(state.opt_state),
        "adamw_state_bytes": run_log.nbytes(jax.eval_shape(optax.adamw(1e-3).init, state.params)),
    }


class Interrupted(Exception):
    """The run stopped on a signal, after saving its checkpoint."""


class Interrupts:
    """Records Ctrl-C or SIGTERM, so that the loop stops after its step; a second one kills.

    The second signal has its default effect: an exception inside JAX's compiler crashes the
    process.

    Attributes:
        signal: number of the received signal, or 0.
    """

    def __enter__(self):
        self.signal = 0
        self.before = {n: signal.signal(n, self.record) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def received(self, step: int) -> int:
        """The received signal or 0, the same in all processes after the same step.

        Several processes exchange it every `LOG_EVERY` steps only, since each must wait for its
        devices.
        """
        if jax.process_count() == 1:
            return self.signal
        if step % LOG_EVERY:
            return 0
        agreed = int(np.max(multihost_utils.process_allgather(np.int32(self.signal))))
        self.signal = agreed or self.signal
        return agreed

    def record(self, number: int, frame: object) -> None:
        self.signal = number
        for n in self.before:
            signal.signal(n, signal.SIG_DFL)
        # os.write, since print is not reentrant; and show the cursor, which the bar has hidden.
        cursor = "\x1b[?25h" if os.isatty(2) else ""
        os.write(
            2, f"{cursor}\nstopping after this step; press Ctrl-C again to stop at once\n".encode()
        )


def train(config: command_line.Run, job: Job, interrupts: Interrupts) -> TrainState:
    """Trains, from the checkpoint if there is one; shows progress and writes the log.

    Raises:
        FloatingPointError: the loss is not finite.
        Interrupted: a signal was received.
    """
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(job.init, key)
    first = header(config, job.data, abstract)

    def record(step: int, **measured: Any) -> None:
        line = {"step": step, "tokens": step * job.tokens_per_step}
        line |= measured | {"seconds": round(time.perf_counter() - started, 3)}
        log.write(json.dumps(line) + "\n")
        write_event(line)
        display.show(line)

    with contextlib.ExitStack() as stack:
        with command_line.one_line_errors():
            checkpoints = stack.enter_context(checkpoint.Checkpoints(config, job.data["sha256"]))
            restored = checkpoints.restore(abstract)
            state, progress = restored or (job.init(key), checkpoint.Progress())
            if restored:
                job.seek(progress.position)
            log = stack.enter_context(checkpoints.open_log(progress))
            write_event = lambda record: None
            if config.tensorboard and jax.process_index() == 0:
                events = run_log.tensorboard(config.out / "tensorboard", progress.step)
                write_event = stack.enter_context(events)
        run_display.say(job.about(first) + (f", from step {progress.step}" if restored else ""))
        exported = job.export and jax.eval_shape(job.export, abstract.params)
        if notice := checkpoint.disk_notice(config, abstract, exported):
            run_display.say(notice)
        started = time.perf_counter() - progress.seconds
        train_step = job.train_step
        if progress.step < job.steps:  # ahead of time: no step's speed includes compilation
            run_display.say("compiling ...")
            train_step = train_step.lower(abstract, job.abstract_batch).compile()
        display = stack.enter_context(
            run_display.Display(progress.step, job.steps, first["state_bytes"])
        )
        if not restored:
            log.write(json.dumps(first) + "\n")
            record(0, **job.validate(state.params))

        losses, taken, mark = list(progress.losses), 0, time.perf_counter()
        for step in range(progress.step + 1, job.steps + 1):
            state, loss = train_step(state, job.batch(step))
            losses.append(loss)
            taken += 1
            display.advance(step)
            last = step == job.steps
            validating = last or step % config.validate_every == 0
            logging = validating or step == 1 or step % LOG_EVERY == 0
            stopping = interrupts.received(step)
            saving = config.save_every and (last or stopping or step % config.save_every == 0)
            if not (logging or saving or stopping):
                continue

            losses = [float(loss) for loss in losses]
            if not np.all(np.isfinite(losses)):
                raise FloatingPointError(f"the loss is not finite at step {step}: try a lower --lr")
            if logging:
                speed = taken * job.tokens_per_step / (time.perf_counter() - mark)
                measured = {
                    "train_loss": float(np.mean(losses)),
                    "tokens_per_second": round(speed, 1),
                    **run_log.peak_bytes(),
                }
                if validating:
                    measured |= job.validate(state.params)
                record(step, **measured)
                losses, taken, mark = [], 0, time.perf_counter()
            if saving:
                now = time.perf_counter()
                progress = checkpoint.Progress(
                    step, losses, now - started, log.tell(), job.position()
                )
                checkpoints.save(state, progress)
                mark += time.perf_counter() - now
            if stopping:
                raise Interrupted(f"at step {step} of {config.optimizer}")
    return state


Kind = TypeVar("Kind", bound=command_line.Run)


def contents(config: command_line.Run, *others: str) -> str:
    """The contents of the output folder, for the last line of a run."""
    return ", ".join(["log", *(["checkpoint"] if config.save_every else []), *others])


def claim(config: Kind, name: str, data: dict[str, Any]) -> Kind:
    """Creates the output folders of a run, by default runs/`name`; only process 0 writes.

    Raises:
        OSError: a folder already has a run.
        ValueError: the folder of a resumed run has no checkpoint.
    """
    if config.out is None:
        config = replace(config, out=checkpoint.free_folder(name, overwrite=config.overwrite))
    if not config.resume:
        folders = sorted({config.out, *(run.out for run in config.runs())})
        checkpoint.refuse_used(folders, overwrite=config.overwrite)
        if jax.process_index() == 0:
            checkpoint.clear(folders)
        multihost_utils.sync_global_devices("the folders are empty")
        if config.compare and jax.process_index() == 0:
            # The log of a comparison is a header; the records are in the logs of its runs.
            line = {"config": config.saved(), "data": data}
            (config.out / "log.jsonl").write_text(json.dumps(line) + "\n")
    elif not config.compare and not checkpoint.holds_checkpoint(config.out):
        raise ValueError(f"{config.out} has no checkpoint to resume from: --overwrite it")
    return config


def run(
    prepare: Callable[[], tuple[Kind, Callable[[Kind, Interrupts], None]]],
    conclude: Callable[[Kind, Sequence[run_log.Run]], None],
) -> None:
    """The main program.

    Args:
        prepare: reads and checks all inputs, creates the folders, and returns the config and a
            function that trains with one optimizer.
        conclude: shows the results; gets one log per optimizer.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters of a sample
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with command_line.one_line_errors():
            config, train_one = prepare()
    except KeyboardInterrupt:
        print("interrupted before the first step", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    folder = config.out
    words = ["python", sys.argv[0], "--out", str(folder), "--resume"]
    words += ["--distributed"] if jax.process_count() > 1 else []

    def hint() -> str:
        if checkpoint.holds_checkpoint(folder) or (config.compare and config.save_every):
            return f"to continue: {shlex.join(words)}"
        return f"no checkpoint; the log is in {folder}"

    try:
        with Interrupts() as interrupts:
            for one in config.runs():
                if interrupts.received(0):
                    raise Interrupted(f"before {one.optimizer}")
                train_one(one, interrupts)
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}; the log is in {folder}")
    except OSError as error:
        sys.exit(f"stopped: {command_line.in_one_line(error)}; {hint()}")
    except Interrupted as error:
        print(f"interrupted {error}; {hint()}", file=sys.stderr)
        sys.exit(128 + interrupts.signal)

    if jax.process_index() == 0:
        conclude(config, [run_log.read(one.out / "log.jsonl") for one in config.runs()])
