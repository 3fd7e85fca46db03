"""Fine-tune RoBERTa on a GLUE task with Natural GaLore, and compare it with AdamW and LoRA.

    python examples/finetuning/finetune_glue.py --task mrpc --model roberta-base --data MRPC
    python examples/finetuning/finetune_glue.py … --compare natural_galore,galore,adamw,lora
    python examples/finetuning/finetune_glue.py --out runs/mine --resume    continue a stopped run

--model is a folder with a Hugging Face checkpoint (config.json, model.safetensors, tokenizer.json),
--data a folder with the records of the task (train and dev, .tsv or .jsonl). If a file is missing,
the error gives the command that downloads it. examples/finetuning/tiny_assets.py makes a small
model and records without a download. The defaults are GaLore's published settings: rank 4 (or 8),
scale 4, 30 epochs of batches of 16 at learning rate 3e-5, bases kept for 500 steps.

The output folder has the log (log.jsonl), a checkpoint, and the tuned weights in Hugging Face's
format (model/). Ctrl-C saves a checkpoint and stops; --resume continues to the same bits.

To tune another model, load its weights with a table of names (examples/common/hugging_face.py) and
pass the model and its loss to make_functions (examples/finetuning/training.py).
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
from examples.common.command_line import one_of, unset
from examples.finetuning import glue, settings, training


OPTIMIZERS = settings.optimizers(natural_galore=3e-5, galore=3e-5, adamw=2e-5, lora=4e-4, muon=2e-5)


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of a run on GLUE."""

    OPTIMIZERS: ClassVar = OPTIMIZERS

    task: Annotated[str, one_of(glue.TASKS)] = "mrpc"
    """GLUE task."""
    optimizer: Annotated[str | None, unset(OPTIMIZERS)] = None
    """Optimizer. Default: natural_galore."""
    lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate, after linear warm-up (6 % of the steps), before linear decay to 0.
    Default: 3e-5 for natural_galore and galore, 2e-5 for adamw, 4e-4 for lora."""
    batch_size: int = 16
    """Records per batch."""
    refresh_every: int = 500
    """Steps between two refreshes of a basis."""
    validate_every: int = 500
    """Steps between two validations."""
    save_every: int = 500
    """Steps between two checkpoints; one more is saved at the end and on Ctrl-C. 0: save none."""

    def check(self) -> None:
        if self.task not in glue.TASKS:
            raise ValueError(f"--task must be one of {', '.join(glue.TASKS)}, got {self.task!r}")
        super().check()

    def get_model(self) -> str:
        return "hf download FacebookAI/roberta-base --local-dir roberta-base"

    def get_data(self) -> str:
        return f"the folder with train and dev of {glue.TASKS[self.task].name}, .tsv or .jsonl"


class Split(NamedTuple):
    """Tokens and labels of a set of records."""

    tokens: Int[np.ndarray, "records length"]
    labels: np.ndarray


class Inputs(NamedTuple):
    """All inputs of a run.

    Attributes:
        shape: shape of the model.
        weights: weights of the model; ShapeDtypeStructs for a new head.
        train: training records.
        validation: validation sets by name.
        summary: description of the data for the log.
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
    """Tokens of sentences or sentence pairs, with the special tokens of the tokenizer."""
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
        OSError: a file is missing.
        ValueError: a file is damaged, or a record is malformed.
    """
    shape, weights = hugging_face.read_encoder(config.model, glue.TASKS[config.task].outputs)
    shape = replace(shape, dtype=jnp.dtype(config.dtype))
    tokenizer = hugging_face.read_tokenizer(config.model, shape.vocabulary)
    found = glue.load(config.task, config.data, skip=config.skip_malformed)
    sets = {"train": found.train, **found.validation}
    for skipped in (s.skipped for s in sets.values() if s.skipped):
        run_display.say(f"skipped {len(skipped)} records, first: {skipped[0]}")
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
    """Cross-entropy for classes, squared error for scores."""
    logits = logits.astype(jnp.float32)
    if logits.shape[1] == 1:
        return jnp.square(logits[:, 0] - labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_job(config: Config, inputs: Inputs) -> training_loop.Job:
    """The job of one optimizer."""
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
        """Logits of all records, in batches of equal size; the last batch is filled up."""
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
        abstract_batch=jax.eval_shape(lambda: batch(1)),
        validate=validate,
        data=inputs.summary,
        export=training.plain_params,
        about=lambda header: (
            f"{glue.TASKS[config.task].name} with {len(inputs.train.labels):,} records, "
            f"{config.optimizer} at learning rate {config.lr}, rank {config.rank}"
        ),
    )


def prepare(config: Config):
    """Reads all inputs and creates the folders; returns the config and the training function."""
    inputs = read(config)
    config = replace(config, steps=training.steps_of(config, len(inputs.train.labels)))
    name = f"{config.task}-{'-'.join(config.optimizers)}"
    config = training_loop.claim(config, name, inputs.summary)
    if lost := pretrained.missing(inputs.weights):
        run_display.say(f"randomly initialised, not in {config.model}: {', '.join(lost)}")

    def train_one(one: Config, interrupts: training_loop.Interrupts) -> None:
        state = training_loop.train(one, make_job(one, inputs), interrupts)
        weights = jax.tree.map(np.asarray, training.plain_params(state.params))
        hugging_face.save_encoder(one.out / "model", inputs.shape, weights)
        shutil.copy(one.model / "tokenizer.json", one.out / "model")

    return config, train_one


def conclude(config: Config, results: Sequence[run_log.Run]) -> None:
    """Prints the results."""
    run_display.show_table(results)
    print(f"output folder: {config.out} ({training_loop.contents(config, 'model')})")


def main() -> None:
    training_loop.run(lambda: prepare(command_line.from_command_line(Config, __doc__)), conclude)


if __name__ == "__main__":
    main()
