"""Fine-tune a BERT or RoBERTa on labelled texts with Natural GaLore, beside AdamW, Muon and LoRA.

    python examples/finetuning/fetch_text.py --out runs/text        a pretrained BERT and real texts
    python examples/finetuning/finetune_text.py --model runs/text/encoder --data runs/text/r8
    python examples/finetuning/finetune_text.py … --compare natural_galore,adamw,lora
    python examples/finetuning/finetune_text.py --out runs/mine --resume    continue a stopped run

--model is a folder with a Hugging Face checkpoint (config.json, model.safetensors, tokenizer.json).
--data is a folder with

    train, test and validation               each a .jsonl, .csv or .tsv file with the columns
                                             --text and --label
    train/LABEL/*.txt, test/LABEL/*.txt, …   or a file for each text

Without `validation`, a tenth of the training records is held out for it.

The output folder has the log (log.jsonl), a checkpoint, the weights with the best validation score
in Hugging Face's format (model/), their metrics and confusions on the test records (test.json), and
a picture of the losses (loss.png). Ctrl-C saves a checkpoint and stops; --resume continues to the
same bits. finetune_glue.py has the eight GLUE tasks as presets of this script.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from examples.common import (
    bert,
    command_line,
    hugging_face,
    pretrained,
    roberta,
    run_display,
    run_log,
    training_loop,
)
from examples.common.command_line import shown_as, unset
from examples.finetuning import classification, records, settings, training
from examples.finetuning.classification import Example, Task


OPTIMIZERS = settings.optimizers(natural_galore=2e-4, galore=2e-4, adamw=1e-4, lora=1e-3, muon=1e-4)
VALIDATION = ("validation", "dev", "valid")
LARGEST_TABLE = 12  # labels; for more, the most frequent confusions are printed

Loaded = tuple[Task, dict[str, records.Records[Example]]]


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of a run on labelled texts."""

    OPTIMIZERS: ClassVar = OPTIMIZERS

    text: str = "text"
    """Column of the text; two columns of a pair are separated by a comma."""
    label: str = "label"
    """Column of the label."""
    optimizer: Annotated[str | None, unset(OPTIMIZERS)] = None
    """Optimizer. Default: natural_galore."""
    lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate, after linear warm-up (6 % of the steps), before linear decay to 0.
    Default: 2e-4 for natural_galore and galore, 1e-4 for adamw and muon, 1e-3 for lora."""
    head_lr: Annotated[float | None, shown_as("FLOAT")] = 5e-3
    """Peak learning rate of the classifier, which AdamW trains beside any optimizer: a new head
    needs a higher rate than pretrained weights. None: --optimizer trains it, at --lr."""
    rank: Annotated[int | None, shown_as("INT")] = 8
    """Rank of the projection, and of LoRA."""
    scale: Annotated[float | None, unset("FLOAT")] = None
    """Factor on the updates of projected weights. Default: 1 with a residual, 4 without."""
    fisher: Literal["core", "window", "none"] = "none"
    """Fisher stage of natural_galore; window is the paper's form."""
    residual: Literal["none", "whitened"] = "whitened"
    """Residual of natural_galore; whitened orthogonalises the rest of each gradient."""
    batch_size: int = 32
    """Records per batch."""
    epochs: int = 3
    """Passes over the training records."""
    max_length: int = 128
    """Maximum tokens per record; longer records are truncated."""
    validate_every: int = 200
    """Steps between two validations."""
    save_every: int = 200
    """Steps between two checkpoints; one more is saved at the end and on Ctrl-C. 0: save none."""

    def check(self) -> None:
        super().check()
        if self.head_lr is not None and not 0 < self.head_lr < float("inf"):
            raise ValueError(f"--head-lr must be above 0 and finite, got {self.head_lr}")

    def make_optimizer(self) -> optax.GradientTransformation:
        tx = super().make_optimizer()
        if self.head_lr is None:
            return tx
        return settings.with_head(tx, settings.adamw(self.schedule(self.head_lr), self))

    def get_model(self) -> str:
        return "python examples/finetuning/fetch_text.py fetches one into runs/text/encoder"

    def get_data(self) -> str:
        return "the folder with the files train and test"

    def load(self) -> Loaded:
        """The task and its records: "train", "test", and validation sets by name ("" for one).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a record is malformed, or there is only one label.
        """
        columns = tuple((name,) for name in self.text.split(","))
        read = lambda *names: read_split(self, columns, *names)
        sets = {"train": read("train"), "": read(*VALIDATION), "test": read("test")}
        for name in ("train", "test"):
            if sets[name] is None:
                raise FileNotFoundError(
                    f"no {name}.jsonl, {name}.csv, {name}.tsv or folder {name} in {self.data}"
                )
        labels = tuple(sorted({example.label for example in sets["train"].records}))
        if len(labels) < 2:
            raise ValueError(f"all training records in {self.data} have the label {labels[0]!r}")
        task = Task(self.data.name, columns, labels, ("accuracy", "macro-F1"), column=(self.label,))
        indexed = {name: with_indices(s, labels, name) for name, s in sets.items() if s}
        if "" not in indexed:
            indexed |= dict(zip(("", "train"), held_out(indexed["train"], self.seed), strict=True))
        return task, indexed


def read_split(
    config: Config, columns: Sequence[tuple[str, ...]], *names: str
) -> records.Records[Example] | None:
    """The records, with names of labels, in the first file or folder of these names."""

    def checked(texts: tuple[object, ...], label: object) -> Example:
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{text!r} is not a string")
            if not text.strip():
                raise ValueError("the text is empty")
        if label is None or not str(label).strip():
            raise ValueError("the label is empty")
        return Example(tuple(map(str, texts)), str(label))

    def parse(row: records.Row) -> Example:
        texts = tuple(classification.cell(row, names) for names in columns)
        return checked(texts, classification.cell(row, (config.label,)))

    if (file := records.find(config.data, *names)) is not None:
        return records.read(file, parse, skip=config.skip_malformed)
    folder = next((config.data / name for name in names if (config.data / name).is_dir()), None)
    if folder is None:
        return None
    return records.read_folder(
        folder, lambda text, label: checked((text,), label), skip=config.skip_malformed
    )


def with_indices(
    found: records.Records[Example], labels: Sequence[str], split: str
) -> records.Records[Example]:
    """The records with the index of each label.

    Raises:
        ValueError: a label does not occur in the training records.
    """
    index = {label: i for i, label in enumerate(labels)}
    if unknown := sorted({e.label for e in found.records} - index.keys()):
        raise ValueError(
            f"labels of {split or 'validation'} records that no training record has: "
            f"{', '.join(unknown)}"
        )
    return found._replace(records=[e._replace(label=index[e.label]) for e in found.records])


def held_out(found: records.Records[Example], seed: int) -> list[records.Records[Example]]:
    """A tenth of the records, at least one, and the others."""
    order = np.random.default_rng(seed).permutation(len(found.records))
    parts = np.split(order, [max(1, len(order) // 10)])
    return [found._replace(records=[found.records[i] for i in part], skipped=[]) for part in parts]


class Split(NamedTuple):
    """Tokens and labels of a set of records."""

    tokens: Int[np.ndarray, "records length"]
    labels: np.ndarray


class Inputs(NamedTuple):
    """All inputs of a run.

    Attributes:
        task: labels and metrics.
        shape: shape of the model.
        weights: weights of the model; ShapeDtypeStructs for a new head.
        train: training records.
        validation: validation sets by name.
        test: test records; None without any.
        summary: description of the data for the log.
    """

    task: Task
    shape: roberta.RobertaConfig
    weights: pretrained.Params
    train: Split
    validation: dict[str, Split]
    test: Split | None
    summary: dict[str, Any]


def tokenized(
    tokenizer: Tokenizer,
    shape: roberta.RobertaConfig,
    examples: Sequence[Example],
    longest: int,
) -> Split:
    """Tokens of texts or pairs of texts, with the special tokens of the tokenizer."""
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
    # The tokenizer first: a wrong folder is found before the records are read.
    shape = hugging_face.encoder_config(config.model)
    tokenizer = hugging_face.read_tokenizer(config.model, shape.vocabulary)
    task, sets = config.load()
    shape, weights = hugging_face.read_encoder(config.model, task.outputs)
    shape = replace(shape, dtype=jnp.dtype(config.dtype))
    if isinstance(shape, bert.BertConfig):
        shape = replace(shape, separator=tokenizer.token_to_id("[SEP]"))
    for skipped in (s.skipped for s in sets.values() if s.skipped):
        run_display.say(f"skipped {len(skipped)} records, first: {skipped[0]}")
    split = {
        name: tokenized(tokenizer, shape, s.records, config.max_length) for name, s in sets.items()
    }
    digests = "".join(s.sha256 for s in sets.values())
    summary = {
        "task": task.name,
        "records": {name: len(s.records) for name, s in sets.items()},
        "labels": list(task.labels),
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }
    train, test = split.pop("train"), split.pop("test", None)
    return Inputs(task, shape, weights, train, split, test, summary)


def losses(
    logits: Float[Array, "batch outputs"], labels: Int[Array, " batch"] | Float[Array, " batch"]
) -> Float[Array, " batch"]:
    """Cross-entropy, or for regression the squared error."""
    logits = logits.astype(jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.square(logits[:, 0] - labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def batched(
    predict: Callable[[Any, Array], Array], size: int
) -> Callable[[Any, Int[np.ndarray, "n length"]], Float[np.ndarray, "n outputs"]]:
    """(params, tokens) -> logits of all records, in batches of equal size."""

    def logits(params, tokens):
        n = len(tokens)
        filled = np.resize(tokens, (-(-n // size) * size, tokens.shape[1]))
        parts = [predict(params, part) for part in np.split(filled, len(filled) // size)]
        return np.concatenate([np.asarray(part, np.float32) for part in parts])[:n]

    return logits


def make_job(config: Config, inputs: Inputs) -> training_loop.Job:
    """The job of one optimizer; `validate` writes the best weights so far to the folder model."""
    functions = training.make_functions(
        config,
        inputs.shape.build,
        inputs.weights,
        lambda model, tokens, labels, rngs: losses(model(tokens, rngs), labels).mean(),
        head="classifier",
    )
    predict = jax.jit(lambda params, tokens: functions.model(params)(tokens))
    logits = batched(predict, config.batch_size)
    best = BestModel(config, inputs)

    def validate(params) -> dict[str, Any]:
        found, measured = [], {}
        for name, split in inputs.validation.items():
            guesses = logits(params, split.tokens)
            found.append(np.asarray(losses(guesses, split.labels)))
            measured |= classification.measure(inputs.task, split.labels, guesses, of=name)
        best.offer(next(iter(measured.values())), params)
        return {"validation_loss": float(np.concatenate(found).mean()), "metrics": measured}

    return training.make_job(
        config,
        functions,
        inputs.train,
        validate=validate,
        data=inputs.summary,
        about=f"{inputs.task.name} with {len(inputs.train.labels):,} records",
    )


class BestModel:
    """Writes the weights with the highest score to the folder `model`.

    A resumed run repeats the same validations, so the log has the score of the folder's weights.
    """

    def __init__(self, config: Config, inputs: Inputs):
        self.config, self.inputs = config, inputs
        self.score = -np.inf
        if (config.out / "model").exists():
            found = run_log.read(config.out / "log.jsonl").records
            metrics = [record["metrics"] for record in found if "metrics" in record]
            self.score = max(next(iter(x.values())) for x in metrics)

    def offer(self, score: float, params: Any) -> None:
        """Writes the weights if the score is the highest so far."""
        if score > self.score:
            self.score, folder = score, self.config.out / "model"
            weights = training.exported(params)
            hugging_face.save_encoder(folder, self.inputs.shape, weights, self.inputs.task.labels)
            shutil.copy(self.config.model / "tokenizer.json", folder)


def finish(config: Config, inputs: Inputs, state: training_loop.TrainState) -> None:
    """Measures the best model on the test records, and draws the losses."""
    del state
    figure = run_display.plot([run_log.read(config.out / "log.jsonl")], title=inputs.task.name)
    figure.savefig(config.out / "loss.png", dpi=150)
    if inputs.test is None:
        return
    _, weights = hugging_face.read_encoder(config.out / "model", inputs.task.outputs)
    structure = nnx.split(nnx.eval_shape(lambda: inputs.shape.build(nnx.Rngs(0))))[0]
    predict = jax.jit(lambda params, tokens: nnx.merge(structure, params)(tokens))
    logits = batched(predict, config.batch_size)(weights, inputs.test.tokens)
    metrics = classification.measure(inputs.task, inputs.test.labels, logits)
    guesses = classification.guessed(inputs.task, logits)
    counts = classification.confusion(inputs.test.labels, guesses, len(inputs.task.labels))
    found = {"metrics": metrics, "labels": inputs.task.labels, "confusion": counts.tolist()}
    (config.out / "test.json").write_text(json.dumps(found) + "\n")
    values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    run_display.say(f"{config.optimizer} on {len(guesses):,} test records: {values}")
    Console().print(confusion_table(inputs.task.labels, counts))


def confusion_table(labels: Sequence[str], counts: Int[np.ndarray, "labels labels"]) -> Table:
    """All counts of at most LARGEST_TABLE labels, else the most frequent confusions."""
    if len(labels) <= LARGEST_TABLE:
        table = Table("label \\ guess", *labels)
        for label, row in zip(labels, counts.tolist(), strict=True):
            table.add_row(label, *map(str, row))
        return table
    table = Table("label", "guessed instead", "records", "of")
    wrong = counts * (1 - np.eye(len(labels), dtype=counts.dtype))
    for place in np.argsort(-wrong, axis=None, kind="stable")[:LARGEST_TABLE]:
        i, j = np.unravel_index(place, counts.shape)
        if wrong[i, j]:
            table.add_row(labels[i], labels[j], str(wrong[i, j]), str(counts[i].sum()))
    return table


EXAMPLE = training.Example(
    read, lambda config: config.data.name, make_job, finish, ("model", "test.json", "loss.png")
)


def main() -> None:
    training.main(lambda: command_line.from_command_line(Config, __doc__), EXAMPLE)


if __name__ == "__main__":
    main()
