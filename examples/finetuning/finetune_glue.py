"""Fine-tune RoBERTa on a task of GLUE with Natural GaLore, and compare it with AdamW and LoRA.

    python examples/finetuning/finetune_glue.py --task mrpc --model roberta-base --data MRPC
    python examples/finetuning/finetune_glue.py … --compare natural_galore,galore,adamw,lora
    python examples/finetuning/finetune_glue.py --out runs/mine --resume
    python examples/finetuning/finetune_glue.py --help

`--model` is a folder with a checkpoint of Hugging Face (config.json, model.safetensors and
tokenizer.json), `--data` one with the task's records (train and dev, .tsv or .jsonl); what is
missing is said with the line that gets it. The defaults are those that GaLore was published with:
rank 4 (or `--rank 8`), scale 4, 30 epochs of batches of 16 at 3e-5, bases for 500 steps.

A run leaves a log, a checkpoint, and in `model` the tuned weights as Hugging Face has them. Ctrl-C
saves and ends it; `--resume` goes on to the same bits.

To tune your own model: load its weights by a table of names (`hugging_face.py`), hand the model and
its loss to `training.make_functions`, and `natgalore.natural_galore` stands where AdamW stood.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from examples.common import (
    command_line,
    hugging_face,
    pretrained,
    roberta,
    run_display,
    run_log,
    training_loop,
)
from examples.common.command_line import one_of
from examples.finetuning import glue, settings, training


OPTIMIZERS = settings.optimizers(natural_galore=3e-5, galore=3e-5, adamw=2e-5, lora=4e-4)


@dataclass(frozen=True)
class Config(settings.Config):
    """Fine-tune RoBERTa on a task of GLUE."""

    OPTIMIZERS: ClassVar = OPTIMIZERS

    task: Annotated[str, one_of(glue.TASKS)] = "mrpc"
    """Which task."""
    optimizer: Annotated[str | None, one_of(OPTIMIZERS)] = None
    """Which optimizer. Default: natural_galore."""
    refresh_every: int = 500
    """Steps between two refreshes of the projections."""
    validate_every: int = 500
    """Steps between two validations."""
    save_every: int = 500
    """Steps between two checkpoints; there is one at the end and at an interruption too."""

    def check(self) -> None:
        if self.task not in glue.TASKS:
            raise ValueError(f"--task must be one of {', '.join(glue.TASKS)}, got {self.task!r}")
        super().check()

    def get_model(self) -> str:
        return "hf download FacebookAI/roberta-base --local-dir roberta-base"

    def get_data(self) -> str:
        return f"a folder with train and dev of {glue.TASKS[self.task].name}, .tsv or .jsonl"


class Split(NamedTuple):
    """Records as the model takes them."""

    tokens: Int[np.ndarray, "records length"]
    labels: np.ndarray


class Inputs(NamedTuple):
    """All that is read before anything is written.

    Attributes:
        shape: of the model.
        weights: of the model; a new head's are shapes alone.
        train: to train on.
        validation: to validate on, by name.
        summary: of the data, for the log.
    """

    shape: roberta.RobertaConfig
    weights: pretrained.Params
    train: Split
    validation: dict[str, Split]
    summary: dict[str, Any]


def tokenized(
    tokenizer: Tokenizer,
    shape: roberta.RobertaConfig,
    examples: Sequence[glue.Example],
    longest: int,
) -> Split:
    """Tokens of the sentences, or pairs of them, as the tokenizer frames them."""
    tokenizer.enable_truncation(min(longest, shape.longest))
    texts = [e.texts[0] if len(e.texts) == 1 else e.texts for e in examples]
    rows = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
    length = -(-max(map(len, rows)) // 8) * 8
    labels = np.array([e.label for e in examples])
    tokens = training.padded(rows, shape.padding, min(length, shape.longest))
    return Split(tokens, labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32))


def read(config: Config) -> Inputs:
    """Reads and checks the model, its tokenizer and the records.

    Raises:
        ValueError, OSError: something is not there or makes no sense.
    """
    shape, weights = hugging_face.read_roberta(config.model, glue.TASKS[config.task].outputs)
    shape = replace(shape, dtype=jnp.dtype(config.dtype))
    tokenizer = hugging_face.read_tokenizer(config.model, shape.vocabulary)
    found = glue.load(config.task, config.data, skip=config.skip_malformed)
    sets = {"train": found.train, **found.validation}
    for skipped in (s.skipped for s in sets.values() if s.skipped):
        run_display.say(f"skipped {len(skipped)} records, the first one: {skipped[0]}")
    split = {
        name: tokenized(tokenizer, shape, s.records, config.max_length) for name, s in sets.items()
    }
    digests = "".join(s.sha256 for s in sets.values())
    summary = {
        "task": config.task,
        "records": {name: len(s.records) for name, s in sets.items()},
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }
    return Inputs(shape, weights, split.pop("train"), split, summary)


def losses(logits: Float[Array, "n outputs"], labels: Array) -> Float[Array, " n"]:
    """Cross-entropy of classes, squared error of a score."""
    logits = logits.astype(jnp.float32)
    if logits.shape[1] == 1:
        return jnp.square(logits[:, 0] - labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_job(config: Config, inputs: Inputs) -> training_loop.Job:
    """A run on these inputs."""
    functions = training.make_functions(
        config,
        partial(roberta.Roberta, inputs.shape),
        inputs.weights,
        lambda model, tokens, labels, rngs: losses(model(tokens, rngs), labels).mean(),
        head="classifier",
    )
    predict = jax.jit(lambda params, tokens: functions.model(params)(tokens))

    def batch(step: int):
        train = inputs.train
        rows = training.epoch_rows(len(train.labels), config.batch_size, config.seed, step)
        return np.int32(step), train.tokens[rows], train.labels[rows]

    def logits(params, tokens: Int[np.ndarray, "n length"]) -> Float[np.ndarray, "n outputs"]:
        """Of all, in batches of one size: the last one is filled up."""
        size, n = config.batch_size, len(tokens)
        filled = np.resize(tokens, (-(-n // size) * size, tokens.shape[1]))
        parts = [predict(params, part) for part in np.split(filled, len(filled) // size)]
        return np.concatenate([np.asarray(part, np.float32) for part in parts])[:n]

    def validate(params) -> dict[str, Any]:
        found, measured = [], {}
        for name, split in inputs.validation.items():
            guesses = logits(params, split.tokens)
            found.append(np.asarray(losses(guesses, split.labels)))
            measured |= glue.measure(config.task, split.labels, guesses, of=name)
        return {"validation_loss": float(np.concatenate(found).mean()), "metrics": measured}

    return training_loop.Job(
        steps=config.steps,
        tokens_per_step=config.batch_size * inputs.train.tokens.shape[1],
        init=functions.init,
        train_step=functions.train_step,
        batch=batch,
        like=jax.eval_shape(lambda: batch(1)),
        validate=validate,
        data=inputs.summary,
        about=lambda header: (
            f"{glue.TASKS[config.task].name} with {len(inputs.train.labels):,} records, "
            f"{config.optimizer} at learning rate {config.lr}, rank {config.rank}"
        ),
    )


def prepare(config: Config):
    """Reads everything and makes the folders; returns the config and what trains."""
    inputs = read(config)
    config = replace(config, steps=training.steps_of(config, len(inputs.train.labels)))
    name = f"{config.task}-{'-'.join(config.optimizers)}"
    config = training_loop.claim(config, name, inputs.summary)
    if lost := pretrained.missing(inputs.weights):
        run_display.say(f"not in {config.model}, so they begin at random: {', '.join(lost)}")

    def train_one(one: Config, interrupts: training_loop.Interrupts) -> None:
        state = training_loop.train(one, make_job(one, inputs), interrupts)
        weights = jax.tree.map(np.asarray, training.plain_params(state.params))
        hugging_face.save_roberta(one.out / "model", inputs.shape, weights)
        shutil.copy(one.model / "tokenizer.json", one.out / "model")

    return config, train_one


def conclude(config: Config, results: Sequence[run_log.Run]) -> None:
    run_display.show_table(results)
    print(f"log, checkpoint and model are in {config.out}")


def main() -> None:
    training_loop.run(lambda: prepare(command_line.from_command_line(Config)), conclude)


if __name__ == "__main__":
    main()
