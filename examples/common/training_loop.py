"""A run from its first step to its last: shown, logged, saved, and stopped in good order.

An example says what there is to train, as a `Job`; `train` does it, from the checkpoint if there is
one, and `run` is the whole program around that, for one optimizer or several in turn.
"""

import contextlib
import io
import json
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from examples.common import checkpoint, command_line, run_display, run_log


LOG_EVERY = 10  # steps


class TrainState(NamedTuple):
    """All that changes from step to step."""

    params: Any
    opt_state: Any


class Job(NamedTuple):
    """What there is to train.

    Attributes:
        steps: in all.
        tokens_per_step: of them, for the log.
        init: key -> TrainState.
        train_step: (TrainState, batch) -> TrainState and loss; jitted.
        batch: step, counted from 1 -> what a step is given.
        like: shapes of a batch.
        validate: params -> what is measured, `validation_loss` and others.
        data: what the log says of the data, its `sha256` with it.
        about: in words, what is trained.
        position: () -> where the next batch begins, as JSON, for the checkpoint.
        seek: position -> nothing; the next batch begins there. Neither is needed where a batch is
            a function of its step.
    """

    steps: int
    tokens_per_step: int
    init: Callable[..., Any]
    train_step: Callable[..., Any]
    batch: Callable[[int], Any]
    like: Any
    validate: Callable[[Any], dict[str, float]]
    data: dict[str, Any]
    about: Callable[[dict[str, Any]], str]
    position: Callable[[], Any] = lambda: None
    seek: Callable[[Any], None] = lambda position: None


def header(config: command_line.Run, data: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """The first line of the log: what is run, where, on which data, and how large it is."""
    return {
        "config": config.saved(),
        "environment": run_log.environment(),
        "data": data,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": run_log.nbytes(state.opt_state),
        "adamw_state_bytes": run_log.nbytes(jax.eval_shape(optax.adamw(1e-3).init, state.params)),
    }


class Interrupted(Exception):
    """A signal asked for the end, and everything is saved."""


class Interrupts:
    """Notes Ctrl-C and SIGTERM, for the training loop to end in good order; the second one kills.

    It kills by the signal itself: an exception in the midst of JAX's compiler crashes the process.

    Attributes:
        signal: the number of the signal that came, or 0.
    """

    def __enter__(self):
        self.signal = 0
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> int:
        """The signal that came, or 0: the same for all processes after the same step.

        Several agree at every tenth step only, since it makes each wait for its devices.
        """
        if jax.process_count() == 1:
            return self.signal
        if step % LOG_EVERY:
            return 0
        agreed = int(np.max(multihost_utils.process_allgather(np.int32(self.signal))))
        self.signal = agreed or self.signal
        return agreed

    def note(self, number: int, frame: object) -> None:
        self.signal = number
        for n in self.before:
            signal.signal(n, signal.SIG_DFL)
        # Not by print, which may be at work just now; with the cursor, which the bar has hidden.
        cursor = "\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{cursor}\nstopping after this step; once more stops at once\n".encode())


def train(config: command_line.Run, job: Job, interrupts: Interrupts) -> TrainState:
    """Trains, from the checkpoint if there is one; shows how it goes, and writes the log.

    Raises:
        FloatingPointError: the loss is not finite any more.
        Interrupted: a signal came.
    """
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(job.init, key)
    first = header(config, job.data, abstract)

    def record(step: int, **measured: Any) -> None:
        line = {"step": step, "tokens": step * job.tokens_per_step}
        line |= measured | {"seconds": round(time.perf_counter() - started, 3)}
        log.write(json.dumps(line) + "\n")
        display.show(line)

    with contextlib.ExitStack() as stack:
        with one_line_errors():
            checkpoints = stack.enter_context(checkpoint.Checkpoints(config, job.data["sha256"]))
            restored = checkpoints.restore(abstract)
            state, progress = restored or (job.init(key), checkpoint.Progress())
            if restored:
                job.seek(progress.position)
            log = stack.enter_context(checkpoints.open_log(progress))
        run_display.say(job.about(first) + (f", from step {progress.step} on" if restored else ""))
        started = time.perf_counter() - progress.seconds
        train_step = job.train_step
        if progress.step < job.steps:  # compiled first, so that no step's speed has it in it
            run_display.say("compiling ...")
            train_step = train_step.lower(abstract, job.like).compile()
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
            stopping = interrupts.asked(step)
            saving = last or step % config.save_every == 0 or stopping
            if not (logging or saving):
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
                so_far = checkpoint.Progress(
                    step, losses, now - started, log.tell(), job.position()
                )
                checkpoints.save(state, so_far)
                mark += time.perf_counter() - now
            if stopping:
                raise Interrupted(f"at step {step} of {config.optimizer}")
    return state


def in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return textwrap.shorten(str(error), 1000)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line and exit status 2 where input cannot be used."""
    try:
        yield
    except (ValueError, OSError) as error:
        print("error:", in_one_line(error), file=sys.stderr)
        sys.exit(2)


Kind = TypeVar("Kind", bound=command_line.Run)


def claim(config: Kind, name: str, data: dict[str, Any]) -> Kind:
    """Makes the folders of a run, `name` in runs/ by default; of several processes the first does.

    Raises:
        ValueError, OSError: they hold a run already, or to resume they hold none.
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
            # Its log says what it is; the records are in its runs' logs.
            line = {"config": config.saved(), "data": data}
            (config.out / "log.jsonl").write_text(json.dumps(line) + "\n")
    elif not config.compare and not checkpoint.holds_checkpoint(config.out):
        raise ValueError(f"{config.out} holds no checkpoint to resume from: --overwrite it")
    return config


def run(
    prepare: Callable[[], tuple[Kind, Callable[[Kind, Interrupts], None]]],
    conclude: Callable[[Kind, Sequence[run_log.Run]], None],
) -> None:
    """The whole program.

    Args:
        prepare: reads and checks everything, makes the folders, and returns the config and what
            trains with one optimizer.
        conclude: shows the results, one log for each optimizer.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # what is shown may have letters that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with one_line_errors():
            config, train_one = prepare()
    except KeyboardInterrupt:
        print("interrupted before the first step", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    folder = config.out
    words = ["python", sys.argv[0], "--out", str(folder), "--resume"]
    words += ["--distributed"] if jax.process_count() > 1 else []
    again = "to go on: " + shlex.join(words)
    try:
        with Interrupts() as interrupts:
            for one in config.runs():
                if interrupts.asked(0):
                    raise Interrupted(f"before {one.optimizer}")
                train_one(one, interrupts)
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}; the log so far is in {folder}")
    except OSError as error:
        resumable = config.compare or checkpoint.holds_checkpoint(folder)
        rest = again if resumable else f"the log so far is in {folder}"
        sys.exit(f"stopped: {in_one_line(error)}; {rest}")
    except Interrupted as error:
        print(f"interrupted {error}; {again}", file=sys.stderr)
        sys.exit(128 + interrupts.signal)

    if jax.process_index() == 0:
        conclude(config, [run_log.read(one.out / "log.jsonl") for one in config.runs()])
