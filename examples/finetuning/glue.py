"""The eight tasks of GLUE (arXiv 1804.07461) that RoBERTa is measured by, and how each is judged.

A task's records are in a folder, `train` and `dev` (or `validation`), as GLUE's own .tsv or as
.jsonl with the names that Hugging Face's data set has; MNLI has two sets to validate on.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from examples.finetuning import records


def accuracy(labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"]) -> float:
    return float(np.mean(labels == guesses))


def f1(labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and recall of the label 1; 0 where neither has a 1."""
    both = np.sum((labels == 1) & (guesses == 1))
    either = np.sum(labels == 1) + np.sum(guesses == 1)
    return float(2 * both / either) if either else 0.0


def matthews(labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"]) -> float:
    """Correlation of two-valued labels and guesses; 0 where one of them is constant."""
    return pearson(labels.astype(np.float64), guesses.astype(np.float64))


def pearson(labels: Float[np.ndarray, " n"], guesses: Float[np.ndarray, " n"]) -> float:
    """Correlation; 0 where labels or guesses are constant."""
    if np.ptp(labels) == 0 or np.ptp(guesses) == 0:
        return 0.0
    return float(scipy.stats.pearsonr(labels, guesses).statistic)


def spearman(labels: Float[np.ndarray, " n"], guesses: Float[np.ndarray, " n"]) -> float:
    """Correlation of ranks; 0 where labels or guesses are constant."""
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
        name: its folder in GLUE's own archive.
        texts: columns of the one or two sentences, each by all its names.
        labels: names of the classes in their order; none: labels are numbers from 0 to 5.
        metrics: the paper's, the first one is what the task is reported by.
        column: of the label, by all its names.
        header: names of the columns of a .tsv file that has none.
        validation: names of the sets to validate on, by what their metrics are called.
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
    """A record: its sentences, and the number of its class or its score."""

    texts: tuple[str, ...]
    label: int | float


def cell(row: records.Row, names: Sequence[str]) -> object:
    """The cell of a row in the column of one of these names."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"no {' or '.join(names)} among {', '.join(row)}")


def parse(task: Task, row: records.Row) -> Example:
    """An example from a row of a file.

    Raises:
        ValueError: a column is not there, a sentence is no text, or the label is out of range.
    """
    texts = [cell(row, names) for names in task.texts]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is no text")
    return Example(tuple(map(str, texts)), label(task, cell(row, task.column)))


def label(task: Task, said: object) -> int | float:
    """The number of a class, of its name or of its number as text; or a score.

    Raises:
        ValueError: it is out of range.
    """
    if not task.labels:
        try:
            score = float(str(said))
        except ValueError:
            score = np.nan
        if not 0 <= score <= 5:
            raise ValueError(f"label {said!r} is no number from 0 to 5")
        return score
    numbers = [str(i) for i in range(len(task.labels))]
    for names in (task.labels, numbers):
        if str(said) in names:
            return names.index(str(said))
    raise ValueError(f"label {said!r} is none of {', '.join((*numbers, *task.labels))}")


class Data(NamedTuple):
    """A task's records.

    Attributes:
        train: to train on.
        validation: the sets to validate on, by their names.
    """

    train: records.Records[Example]
    validation: dict[str, records.Records[Example]]


def load(task: str, folder: Path, *, skip: bool = False) -> Data:
    """Reads a task's records.

    Raises:
        FileNotFoundError: a file is not there; says how to get it.
        ValueError: a record cannot be read, and is not to be skipped.
    """
    about = TASKS[task]
    files = {None: ("train",), **about.validation}

    def one(names: tuple[str, ...]) -> records.Records[Example]:
        file = records.find(folder, *names)
        if file is None:
            raise FileNotFoundError(
                f"no {names[0]}.tsv or {names[-1]}.jsonl in {folder}; to get {about.name}: python "
                f"-c \"import datasets as d; [s.to_json(f'{folder}/{{n}}.jsonl') for n, s in "
                f"d.load_dataset('nyu-mll/glue', '{task}').items()]\""
            )
        return records.read(file, lambda row: parse(about, row), columns=about.header, skip=skip)

    found = {name: one(names) for name, names in files.items()}
    return Data(found.pop(None), found)


def measure(
    task: str, labels: np.ndarray, logits: Float[np.ndarray, "n outputs"], of: str = ""
) -> dict[str, float]:
    """The task's metrics of a set; `of` says which, where there are several."""
    about = TASKS[task]
    guesses = logits.argmax(axis=1) if about.labels else logits[:, 0].astype(np.float64)
    suffix = f" {of}" if of else ""
    return {name + suffix: METRICS[name](labels, guesses) for name in about.metrics}
