"""Pre-train a Llama on text, byte by byte, with Natural GaLore in place of AdamW.

    python examples/pretrain.py                             about three minutes on a laptop
    python examples/pretrain.py --optimizer adamw           the same with another optimizer
    python examples/pretrain.py --compare galore,adamw      several in turn, in one picture
    python examples/pretrain.py --out runs/mine --resume    go on where it was stopped
    python examples/pretrain.py --help                      everything else

It leaves a log (`log.jsonl`), a checkpoint, a figure (`loss.png`) and a sample of what the model
writes (`sample.txt`) in a folder of `runs/`. Bad input ends it with one line and exit status 2,
before anything is written. Ctrl-C ends it with status 130 after the step in progress and a
checkpoint, from which it goes on as if nothing had been; a second Ctrl-C ends it at once.
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
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import checkpoint
import data
import jax
import llama
import numpy as np
import optax
import report
import sample
import settings
from flax import nnx
from jax.experimental import multihost_utils

import natgalore_jax as natgalore


LOG_EVERY = 10  # steps
VALIDATION_BATCHES = 16
SAMPLE_BYTES = 300


class TrainState(NamedTuple):
    """All that changes from step to step."""

    params: Any
    opt_state: Any


class Functions(NamedTuple):
    """What a run computes, and where.

    Attributes:
        init: key -> TrainState; compiled, as the others are.
        train_step: (TrainState, tokens) -> TrainState and loss.
        validation_loss: (params, tokens) -> loss.
        place: puts a batch of tokens on the devices.
        about: in words, after what is said of the run at its start.
    """

    init: Callable[..., Any]
    train_step: Callable[..., Any]
    validation_loss: Callable[..., Any]
    place: Callable[[np.ndarray], Any] = lambda tokens: tokens
    about: str = ""


def make_functions(
    config: settings.Config, activations: jax.sharding.NamedSharding | None = None
) -> Functions:
    """The three compiled functions of a run: init, train_step and validation_loss."""
    shape = replace(config.model, activations=activations)
    structure = llama.structure(shape)
    tx = config.make_optimizer()

    def loss_fn(params, tokens):
        return llama.next_token_loss(nnx.merge(structure, params), tokens)

    @jax.jit
    def init(key):
        model = llama.Llama(shape, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(params, tx.init(params))

    if config.low_rank_gradients and config.optimizer in settings.PROJECTING:
        gradients = natgalore.value_and_grad(loss_fn, tx, on_fallback="error")
    else:
        whole = jax.value_and_grad(loss_fn)
        gradients = lambda params, opt_state, tokens: (whole(params, tokens), opt_state)

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, tokens):
        (loss, grads), opt_state = gradients(state.params, state.opt_state, tokens)
        updates, opt_state = tx.update(grads, opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    return Functions(init, train_step, jax.jit(loss_fn))


def header(config: settings.Config, corpus: data.Corpus, state: TrainState) -> dict[str, Any]:
    """The first line of the log: what is run, where, on which data, and how large it is."""
    return {
        "config": config.saved(),
        "environment": report.environment(),
        "data": corpus.summary(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": report.nbytes(state.opt_state),
        "adamw_state_bytes": report.nbytes(jax.eval_shape(optax.adamw(1e-3).init, state.params)),
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


def train(
    config: settings.Config, corpus: data.Corpus, functions: Functions, interrupts: Interrupts
) -> TrainState:
    """Trains, from the checkpoint if there is one; shows how it goes, and writes the log.

    Raises:
        FloatingPointError: the loss is not finite any more.
        Interrupted: a signal came.
    """
    init, train_step, validation_loss, place, about = functions
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(init, key)
    first = header(config, corpus, abstract)
    tokens_per_step = config.batch_size * config.seq_len
    length = config.seq_len + 1  # each token but the first is predicted

    def batch(step: int):
        return place(
            data.training_batch(
                corpus.train, config.batch_size, length, seed=config.seed, step=step
            )
        )

    def validate() -> float:
        batches = data.validation_batches(
            corpus.validation, config.batch_size, length, VALIDATION_BATCHES
        )
        return float(np.mean([validation_loss(state.params, place(batch)) for batch in batches]))

    def record(step: int, **measured: float) -> None:
        line = {"step": step, "tokens": step * tokens_per_step}
        line |= measured | {"seconds": round(time.perf_counter() - started, 3)}
        log.write(json.dumps(line) + "\n")
        display.show(line)

    with contextlib.ExitStack() as stack:
        with one_line_errors():
            checkpoints = stack.enter_context(checkpoint.Checkpoints(config, corpus.sha256))
            restored = checkpoints.restore(abstract)
            state, progress = restored or (init(key), checkpoint.Progress())
            log = stack.enter_context(checkpoints.open_log(progress))
        report.say(
            f"Llama {config.size} with {first['parameters']:,} parameters, {config.optimizer} "
            f"at learning rate {config.lr}, {corpus.files} files of text{about}"
            + (f", from step {progress.step} on" if restored else "")
        )
        started = time.perf_counter() - progress.seconds
        if progress.step < config.steps:  # compiled first, so that no step's speed has it in it
            report.say("compiling ...")
            tokens = jax.ShapeDtypeStruct((config.batch_size, length), np.int32)
            train_step = train_step.lower(abstract, tokens).compile()
        display = stack.enter_context(
            report.Display(progress.step, config.steps, first["state_bytes"])
        )
        if not restored:
            log.write(json.dumps(first) + "\n")
            record(0, validation_loss=validate())

        losses, taken, mark = list(progress.losses), 0, time.perf_counter()
        for step in range(progress.step + 1, config.steps + 1):
            state, loss = train_step(state, batch(step))
            losses.append(loss)
            taken += 1
            display.advance(step)
            last = step == config.steps
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
                speed = taken * tokens_per_step / (time.perf_counter() - mark)
                measured = {
                    "train_loss": float(np.mean(losses)),
                    "tokens_per_second": round(speed, 1),
                }
                if validating:
                    measured["validation_loss"] = validate()
                record(step, **measured)
                losses, taken, mark = [], 0, time.perf_counter()
            if saving:
                now = time.perf_counter()
                so_far = checkpoint.Progress(step, losses, now - started, log.tell())
                checkpoints.save(state, so_far)
                mark += time.perf_counter() - now
            if stopping:
                raise Interrupted(f"at step {step} of {config.optimizer}")
    return state


def write_sample(config: settings.Config, params: Any) -> None:
    """Shows what the model writes after the prompt, and keeps it in `sample.txt`."""
    prompt = config.prompt.encode(errors="surrogateescape")
    written = sample.generate(
        config.model, params, prompt, count=SAMPLE_BYTES, length=config.seq_len, seed=config.seed
    )
    text = sample.printable(prompt + written)
    if jax.process_index() == 0:
        (config.out / "sample.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\nwhat it writes after {config.prompt!r}:\n\n{text}\n")


def in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return textwrap.shorten(str(error), 300)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line and exit status 2 where input cannot be used."""
    try:
        yield
    except (ValueError, OSError) as error:
        print("error:", in_one_line(error), file=sys.stderr)
        sys.exit(2)


def prepare(config: settings.Config) -> tuple[settings.Config, data.Corpus]:
    """Reads the text and makes the folders; of several processes the first one makes them."""
    corpus = data.load(config.text)
    data.check_length(corpus, config.batch_size, config.seq_len + 1)
    if config.out is None:
        name = f"{config.size}-{'-'.join(config.optimizers)}"
        config = replace(config, out=checkpoint.free_folder(name, overwrite=config.overwrite))
    if not config.resume:
        folders = sorted({config.out, *(run.out for run in config.runs())})
        checkpoint.refuse_used(folders, overwrite=config.overwrite)
        if jax.process_index() == 0:
            checkpoint.clear(folders)
        multihost_utils.sync_global_devices("the folders are empty")
        if config.compare and jax.process_index() == 0:
            # Its log says what it is; the records are in its runs' logs.
            line = {"config": config.saved(), "data": corpus.summary()}
            (config.out / "log.jsonl").write_text(json.dumps(line) + "\n")
    elif not config.compare and not checkpoint.holds_checkpoint(config.out):
        raise ValueError(f"{config.out} holds no checkpoint to resume from: --overwrite it")
    return config, corpus


def run(
    from_command_line: Callable[[], settings.Config],
    make_functions: Callable[[settings.Config], Functions],
) -> None:
    """The whole program, with the settings and functions of this example or of another."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the sample may have letters that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with one_line_errors():
            config, corpus = prepare(from_command_line())
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
                state = train(one, corpus, make_functions(one), interrupts)
                write_sample(one, state.params)
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
        results = [report.read(one.out / "log.jsonl") for one in config.runs()]
        report.plot(results).savefig(folder / "loss.png", dpi=150)
        report.show_table(results)
        print(f"log, checkpoint, figure and sample are in {folder}")


def main() -> None:
    run(settings.from_command_line, make_functions)


if __name__ == "__main__":
    main()
