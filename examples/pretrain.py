"""Pre-train a Llama on text, byte by byte, with Natural GaLore in place of AdamW.

    python examples/pretrain.py                             about five minutes on a laptop
    python examples/pretrain.py --optimizer adamw           the same with another optimizer
    python examples/pretrain.py --compare galore,adamw      several in turn, in one picture
    python examples/pretrain.py --out runs/mine --resume    go on where it was stopped
    python examples/pretrain.py --help                      everything else

It leaves a log (`log.jsonl`), a checkpoint, a figure (`loss.png`) and a sample of what the model
writes (`sample.txt`) in a folder of `runs/`. Bad input ends it with one line and exit status 2,
before anything is written. Ctrl-C ends it with status 130 after the step in progress and a
checkpoint, from which it goes on as if nothing had been; a second Ctrl-C ends it at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import command_line
import data
import jax
import llama
import loop
import numpy as np
import optax
import report
import sample
import settings
from flax import nnx
from loop import TrainState

import natgalore_jax as natgalore


VALIDATION_BATCHES = 16
SAMPLE_BYTES = 300


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


def make_job(config: settings.Config, corpus: data.Corpus, functions: Functions) -> loop.Job:
    """A run of these functions on random windows of the corpus."""
    length = config.seq_len + 1  # each token but the first is predicted

    def batch(step: int):
        tokens = data.training_batch(
            corpus.train, config.batch_size, length, seed=config.seed, step=step
        )
        return functions.place(tokens)

    def validate(params) -> dict[str, float]:
        batches = data.validation_batches(
            corpus.validation, config.batch_size, length, VALIDATION_BATCHES
        )
        losses = [functions.validation_loss(params, functions.place(batch)) for batch in batches]
        return {"validation_loss": float(np.mean(losses))}

    return loop.Job(
        steps=config.steps,
        tokens_per_step=config.batch_size * config.seq_len,
        init=functions.init,
        train_step=functions.train_step,
        batch=batch,
        like=jax.ShapeDtypeStruct((config.batch_size, length), np.int32),
        validate=validate,
        data=corpus.summary(),
        about=lambda header: (
            f"Llama {config.size} with {header['parameters']:,} parameters, {config.optimizer} "
            f"at learning rate {config.lr}, {corpus.files} files of text{functions.about}"
        ),
    )


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


def run(
    from_command_line: Callable[[], settings.Config],
    make_functions: Callable[[settings.Config], Functions],
) -> None:
    """The whole program, with the settings and functions of this example or of another."""

    def prepare():
        config = from_command_line()
        corpus = data.load(config.text)
        data.check_length(corpus, config.batch_size, config.seq_len + 1)
        name = f"{config.size}-{'-'.join(config.optimizers)}"
        config = loop.claim(config, name, corpus.summary())

        def train_one(one: settings.Config, interrupts: loop.Interrupts) -> None:
            job = make_job(one, corpus, make_functions(one))
            write_sample(one, loop.train(one, job, interrupts).params)

        return config, train_one

    def conclude(config: settings.Config, results: Sequence[report.Run]) -> None:
        report.plot(results).savefig(config.out / "loss.png", dpi=150)
        report.show_table(results)
        print(f"log, checkpoint, figure and sample are in {config.out}")

    loop.run(prepare, conclude)


def main() -> None:
    run(lambda: command_line.from_command_line(settings.Config), make_functions)


if __name__ == "__main__":
    main()
