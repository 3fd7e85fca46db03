"""Pre-train a Llama on text with Natural GaLore in place of AdamW, byte by byte or on C4.

    python examples/pretraining/pretrain.py                           about five minutes on a laptop
    python examples/pretraining/pretrain.py --optimizer adamw        the same with another optimizer
    python examples/pretraining/pretrain.py --compare galore,adamw  several in turn, one picture
    python examples/pretraining/pretrain.py --out runs/mine --resume    go on where it was stopped
    python examples/pretraining/pretrain.py --dataset c4 --preset 60m --tokenizer t5-base
                                                               the paper's run (paper_presets.py)
    python examples/pretraining/pretrain.py --help                      everything else

It leaves a log (`log.jsonl`), a checkpoint, a figure (`loss.png`) and a sample of what the model
writes (`sample.txt`) in a folder of `runs/`. Bad input ends it with one line and exit status 2,
before anything is written. Ctrl-C ends it with status 130 after the step in progress and a
checkpoint, from which it goes on as if nothing had been; a second Ctrl-C ends it at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int

import natgalore_jax as natgalore
from examples.common import command_line, data, llama, run_display, run_log, sample, training_loop
from examples.common.training_loop import TrainState
from examples.pretraining import c4, settings


VALIDATION_BATCHES = 16
SAMPLE_TOKENS = 300


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
    k = config.micro_batches

    def loss_fn(params, tokens):
        return llama.next_token_loss(nnx.merge(structure, params), tokens)

    @jax.jit
    def init(key):
        model = llama.Llama(shape, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(params, tx.init(params))

    if config.low_rank_gradients and config.optimizer in settings.PROJECTING:
        of_cores = natgalore.value_and_grad(loss_fn, tx, on_fallback="error", micro_batches=k)
        gradients = lambda params, opt_state, tokens: of_cores(params, opt_state, split(tokens, k))
    else:
        whole = jax.value_and_grad(loss_fn)
        gradients = lambda params, opt_state, tokens: (
            mean(lambda part: whole(params, part), tokens, k),
            opt_state,
        )

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, tokens):
        (loss, grads), opt_state = gradients(state.params, state.opt_state, tokens)
        updates, opt_state = tx.update(grads, opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    @jax.jit
    def validation_loss(params, tokens):
        return mean(lambda part: loss_fn(params, part), tokens, k)

    return Functions(init, train_step, validation_loss)


def split(tokens: Int[Array, "batch length"], k: int) -> Int[Array, "..."]:
    """The batch as k micro-batches on a leading axis, or as it is if k is 1.

    Every k-th row is in the same one: each device keeps its rows, as it has of a sharded batch.
    """
    return tokens if k == 1 else tokens.reshape(-1, k, tokens.shape[1]).swapaxes(0, 1)


def mean(f: Callable[[Array], Any], tokens: Int[Array, "batch length"], k: int) -> Any:
    """The mean of f, a tree of arrays, over k micro-batches: one at a time is in memory."""
    if k == 1:
        return f(tokens)
    parts = split(tokens, k)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, parts[0]))
    add = lambda total, part: (jax.tree.map(jnp.add, total, f(part)), None)
    return jax.tree.map(lambda x: x / k, jax.lax.scan(add, zeros, parts)[0])


def open_source(config: settings.Config) -> data.Source:
    """What the config reads, after checking it.

    Raises:
        ValueError, OSError: it is not there, damaged, or too short.
    """
    length = config.seq_len + 1  # each token but the first is predicted
    shape = (config.batch_size, length, VALIDATION_BATCHES)
    if config.dataset == "c4":
        source = c4.load(config.data, config.tokenizer, *shape)
    else:
        source = data.source(config.text, *shape, seed=config.seed)
    size = source.coding.size
    if config.vocabulary is not None and config.vocabulary < size:
        raise ValueError(f"--vocabulary must be at least {size:,}, the tokens that there are")
    (prompt,) = {run.prompt for run in config.runs()}
    if not source.coding.encode(prompt):
        raise ValueError("--prompt has no token")
    return source


def make_job(
    config: settings.Config, source: data.Source, functions: Functions
) -> training_loop.Job:
    """A run of these functions on what the source has."""
    batches = source.training()

    def validate(params) -> dict[str, Any]:
        losses = [
            functions.validation_loss(params, functions.place(batch))
            for batch in source.validation()
        ]
        loss = float(np.mean(losses))
        perplexity = {"metrics": {"perplexity": math.exp(loss)}}
        return {"validation_loss": loss} | (perplexity if config.dataset == "c4" else {})

    return training_loop.Job(
        steps=config.steps,
        tokens_per_step=config.batch_size * config.seq_len,
        init=functions.init,
        train_step=functions.train_step,
        batch=lambda step: functions.place(batches.batch(step)),
        like=jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), np.int32),
        validate=validate,
        data=source.summary,
        about=lambda header: (
            f"Llama {config.size} with {header['parameters']:,} parameters, {config.optimizer} "
            f"at learning rate {config.lr}, {source.about}{functions.about}"
        ),
        position=batches.position,
        seek=batches.seek,
    )


def write_sample(config: settings.Config, coding: data.Coding, params: Any) -> None:
    """Shows what the model writes after the prompt, and keeps it in `sample.txt`."""
    prompt = coding.encode(config.prompt)
    written = sample.generate(
        config.model, params, prompt, count=SAMPLE_TOKENS, length=config.seq_len, seed=config.seed
    )
    text = sample.printable(coding.decode([*prompt, *written]))
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
        source = open_source(config)
        room = config.vocabulary or -(-source.coding.size // 128) * 128
        config = replace(config, vocabulary=room)
        name = f"{config.size}-{'-'.join(config.optimizers)}"
        config = training_loop.claim(config, name, source.summary)

        def train_one(one: settings.Config, interrupts: training_loop.Interrupts) -> None:
            job = make_job(one, source, make_functions(one))
            write_sample(one, source.coding, training_loop.train(one, job, interrupts).params)

        return config, train_one

    def conclude(config: settings.Config, results: Sequence[run_log.Run]) -> None:
        run_display.plot(results).savefig(config.out / "loss.png", dpi=150)
        run_display.show_table(results)
        print(f"log, checkpoint, figure and sample are in {config.out}")

    training_loop.run(prepare, conclude)


def main() -> None:
    run(lambda: command_line.from_command_line(settings.Config), make_functions)


if __name__ == "__main__":
    main()
