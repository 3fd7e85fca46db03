"""The eight GLUE tasks (arXiv 1804.07461) of the RoBERTa paper: records and metrics.

The folder of a task has the files `train` and `dev` (or `validation`), as GLUE's own .tsv or as
.jsonl with the column names of Hugging Face's data set. MNLI has two validation sets.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from examples.finetuning import records


def accuracy(labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"]) -> float:
    """Share of correct guesses."""
    return float(np.mean(labels == guesses))


def f1(labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and recall of label 1; 0 if neither array contains a 1."""
    both = np.sum((labels == 1) & (guesses == 1))
    either = np.sum(labels == 1) + np.sum(guesses == 1)
    return float(2 * both / either) if either else 0.0


def matthews(labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"]) -> float:
    """Matthews correlation of binary labels and guesses; 0 if one of them is constant."""
    return pearson(labels.astype(np.float64), guesses.astype(np.float64))


def pearson(labels: Float[np.ndarray, " n"], guesses: Float[np.ndarray, " n"]) -> float:
    """Pearson correlation; 0 if labels or guesses are constant."""
    if np.ptp(labels) == 0 or np.ptp(guesses) == 0:
        return 0.0
    return float(scipy.stats.pearsonr(labels, guesses).statistic)


def spearman(labels: Float[np.ndarray, " n"], guesses: Float[np.ndarray, " n"]) -> float:
    """Spearman (rank) correlation; 0 if labels or guesses are constant."""
    return pearson(scipy.stats.rankdata(labels), scipy.stats.rankdata(guesses))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}


class Task(NamedTuple):
    """One task.

    Attributes:
        name: folder of the task in GLUE's own archive.
        texts: possible column names of each of the one or two sentences.
        labels: class names in order; empty for regression with scores from 0 to 5.
        metrics: the paper's metrics; the first one is the headline.
        column: possible column names of the label.
        header: column names of a .tsv file without a header.
        validation: possible file names of each validation set, by the suffix of its metrics.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    column: tuple[str, ...] = ("label",)
    header: tuple[str, ...] = ()
    validation: Mapping[str, tuple[str, ...]] = {"": ("dev", "validation")}

    @property
    def outputs(self) -> int:
        """Width of the model's head."""
        return len(self.labels) or 1


PAIR = (("sentence1",), ("sentence2",))
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(
        "CoLA",
        (("sentence",),),
        ("unacceptable", "acceptable"),
        ("Matthews",),
        header=("source", "label", "author's", "sentence"),
    ),
    "sst2": Task("SST-2", (("sentence",),), ("negative", "positive")),
    "mrpc": Task(
        "MRPC",
        (("sentence1", "#1 String"), ("sentence2", "#2 String")),
        ("not_equivalent", "equivalent"),
        ("accuracy", "F1"),
        column=("label", "Quality"),
    ),
    "stsb": Task("STS-B", PAIR, (), ("Pearson", "Spearman"), column=("label", "score")),
    "qqp": Task(
        "QQP",
        (("question1",), ("question2",)),
        ("not_duplicate", "duplicate"),
        ("accuracy", "F1"),
        column=("label", "is_duplicate"),
    ),
    "mnli": Task(
        "MNLI",
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        ("entailment", "neutral", "contradiction"),
        column=("gold_label", "label"),
        validation={
            "matched": ("dev_matched", "validation_matched"),
            "mismatched": ("dev_mismatched", "validation_mismatched"),
        },
    ),
    "qnli": Task("QNLI", (("question",), ("sentence",)), ENTAILMENT),
    "rte": Task("RTE", PAIR, ENTAILMENT),
}


class Example(NamedTuple):
    """A record: sentences, and class index or score."""

    texts: tuple[str, ...]
    label: int | float


def cell(row: records.Row, names: Sequence[str]) -> object:
    """The value in the first column of these names that the row has."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"no column {' or '.join(names)} among {', '.join(row)}")


def parse(task: Task, row: records.Row) -> Example:
    """Converts a row of a file to an example.

    Raises:
        ValueError: a column is missing, a sentence is not a string, or the label is invalid.
    """
    texts = [cell(row, names) for names in task.texts]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not a string")
    return Example(tuple(map(str, texts)), label(task, cell(row, task.column)))


def label(task: Task, value: object) -> int | float:
    """Class index from the name or index of a class; for regression the score.

    Raises:
        ValueError: the label is invalid.
    """
    if not task.labels:
        try:
            score = float(str(value))
        except ValueError:
            score = np.nan
        if not 0 <= score <= 5:
            raise ValueError(f"label {value!r} is not a number from 0 to 5")
        return score
    numbers = [str(i) for i in range(len(task.labels))]
    for names in (task.labels, numbers):
        if str(value) in names:
            return names.index(str(value))
    raise ValueError(f"label {value!r} is not one of {', '.join((*numbers, *task.labels))}")


class Data(NamedTuple):
    """Records of a task.

    Attributes:
        train: training records.
        validation: validation sets by name.
    """

    train: records.Records[Example]
    validation: dict[str, records.Records[Example]]


def load(task: str, folder: Path, *, skip: bool = False) -> Data:
    """Reads the records of a task.

    Raises:
        FileNotFoundError: a file is missing; the message has the command that downloads it.
        ValueError: a record is malformed and `skip` is false.
    """
    about = TASKS[task]
    files = {None: ("train",), **about.validation}

    def one(names: tuple[str, ...]) -> records.Records[Example]:
        file = records.find(folder, *names)
        if file is None:
            raise FileNotFoundError(
                f"no {names[0]}.tsv or {names[-1]}.jsonl in {folder}; to download {about.name}: "
                f"python -c \"import datasets as d; [s.to_json(f'{folder}/{{n}}.jsonl') for n, s "
                f"in d.load_dataset('nyu-mll/glue', '{task}').items()]\""
            )
        return records.read(file, lambda row: parse(about, row), columns=about.header, skip=skip)

    found = {name: one(names) for name, names in files.items()}
    return Data(found.pop(None), found)


def measure(
    task: str, labels: np.ndarray, logits: Float[np.ndarray, "n outputs"], of: str = ""
) -> dict[str, float]:
    """Metrics of the task on one validation set; `of` is the name of the set, appended to each."""
    about = TASKS[task]
    guesses = logits.argmax(axis=1) if about.labels else logits[:, 0].astype(np.float64)
    suffix = f" {of}" if of else ""
    return {name + suffix: METRICS[name](labels, guesses) for name in about.metrics}
