"""Pre-train a Llama with Natural GaLore or another optimizer, on bytes of text or on C4.

    python examples/pretraining/pretrain.py                         about five minutes on a laptop
    python examples/pretraining/pretrain.py --optimizer adamw       with another optimizer
    python examples/pretraining/pretrain.py --compare galore,adamw  two runs in one figure
    python examples/pretraining/pretrain.py --out runs/mine --resume    continue a stopped run
    python examples/pretraining/pretrain.py --dataset c4 --preset 60m --tokenizer t5-base
                                                                    a run of the paper

The default text is the source code of Python's standard library, one token per byte. The output
folder, by default a new one in runs/, has the log (log.jsonl), a checkpoint, a figure of the
losses (loss.png) and generated text (sample.txt). Invalid input ends the run with one line and
exit status 2, before any output is written. Ctrl-C ends the run after the current step, with a
checkpoint and status 130; --resume continues to the same bits. A second Ctrl-C stops at once.
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
    """Functions of a run.

    Attributes:
        init: key -> TrainState; jitted.
        train_step: (TrainState, tokens) -> (TrainState, loss); jitted.
        validation_loss: (params, tokens) -> loss; jitted.
        place: transfers a batch of tokens to the devices.
        about: text appended to the description of the run.
    """

    init: Callable[..., Any]
    train_step: Callable[..., Any]
    validation_loss: Callable[..., Any]
    place: Callable[[np.ndarray], Any] = lambda tokens: tokens
    about: str = ""


def make_functions(
    config: settings.Config, activations: jax.sharding.NamedSharding | None = None
) -> Functions:
    """The functions of a run on one device, or with `activations` sharded."""
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
        low_rank = natgalore.value_and_grad(loss_fn, tx, on_fallback="error", micro_batches=k)
        gradients = lambda params, opt_state, tokens: low_rank(params, opt_state, split(tokens, k))
    else:
        full = jax.value_and_grad(loss_fn)
        gradients = lambda params, opt_state, tokens: (
            mean(lambda part: full(params, part), tokens, k),
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
    """Splits the batch into k micro-batches on a leading axis; k = 1 returns the batch itself.

    A micro-batch has every k-th row, so that no row of a sharded batch changes its device.
    """
    return tokens if k == 1 else tokens.reshape(-1, k, tokens.shape[1]).swapaxes(0, 1)


def mean(f: Callable[[Array], Any], tokens: Int[Array, "batch length"], k: int) -> Any:
    """Mean of f, a tree of arrays, over k micro-batches, computed one after the other."""
    if k == 1:
        return f(tokens)
    parts = split(tokens, k)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, parts[0]))
    add = lambda total, part: (jax.tree.map(jnp.add, total, f(part)), None)
    return jax.tree.map(lambda x: x / k, jax.lax.scan(add, zeros, parts)[0])


def open_source(config: settings.Config) -> data.Source:
    """Opens and checks the data of the config.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the data are too short, or the vocabulary or the prompt is invalid.
    """
    length = config.seq_len + 1  # each token but the first is predicted
    shape = (config.batch_size, length, VALIDATION_BATCHES)
    if config.dataset == "c4":
        source = c4.load(config.data, config.tokenizer, *shape)
    else:
        source = data.source(config.text, *shape, seed=config.seed)
    size = source.coding.size
    if config.vocabulary is not None and config.vocabulary < size:
        raise ValueError(f"--vocabulary must be at least {size:,}, the size of the tokenizer")
    (prompt,) = {run.prompt for run in config.runs()}
    if not source.coding.encode(prompt):
        raise ValueError("--prompt has no tokens")
    return source


def make_job(
    config: settings.Config, source: data.Source, functions: Functions
) -> training_loop.Job:
    """The job of one optimizer."""
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
        abstract_batch=jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), np.int32),
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
    """Generates text after the prompt, prints it and writes it to sample.txt."""
    prompt = coding.encode(config.prompt)
    written = sample.generate(
        config.model, params, prompt, count=SAMPLE_TOKENS, length=config.seq_len, seed=config.seed
    )
    text = sample.printable(coding.decode([*prompt, *written]))
    if jax.process_index() == 0:
        (config.out / "sample.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\ngenerated text after the prompt {config.prompt!r}:\n\n{text}\n")


def run(
    from_command_line: Callable[[], settings.Config],
    make_functions: Callable[[settings.Config], Functions],
) -> None:
    """The main program of this example and of sharded.py and seven_billion.py."""

    def prepare():
        config = from_command_line()
        source = open_source(config)
        vocabulary = config.vocabulary or -(-source.coding.size // 128) * 128
        config = replace(config, vocabulary=vocabulary)
        name = f"{config.size}-{'-'.join(config.optimizers)}"
        config = training_loop.claim(config, name, source.summary)

        def train_one(one: settings.Config, interrupts: training_loop.Interrupts) -> None:
            job = make_job(one, source, make_functions(one))
            write_sample(one, source.coding, training_loop.train(one, job, interrupts).params)

        return config, train_one

    def conclude(config: settings.Config, results: Sequence[run_log.Run]) -> None:
        run_display.plot(results).savefig(config.out / "loss.png", dpi=150)
        run_display.show_table(results)
        files = training_loop.contents(config, "figure", "sample")
        print(f"output folder: {config.out} ({files})")

    training_loop.run(prepare, conclude)


def main() -> None:
    run(lambda: command_line.from_command_line(settings.Config, __doc__), make_functions)


if __name__ == "__main__":
    main()
