"""Labelled texts: tasks, records, metrics."""

from collections.abc import Callable, Mapping, Sequence
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


def macro_f1(labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"]) -> float:
    """Mean over the labels that occur of the harmonic mean of precision and recall."""
    found = np.unique(labels)
    both = np.array([np.sum((labels == k) & (guesses == k)) for k in found])
    either = np.array([np.sum(labels == k) + np.sum(guesses == k) for k in found])
    return float(np.mean(2 * both / either))


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
    "macro-F1": macro_f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}


class Task(NamedTuple):
    """One task.

    Attributes:
        name: title of the task.
        texts: possible column names of each of the one or two sentences.
        labels: class names in order; empty for regression with scores from 0 to 5.
        metrics: names in METRICS; the first one is the headline.
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
        ValueError: a column is missing, a text is not a string, or the label is invalid.
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


def guessed(task: Task, logits: Float[np.ndarray, "n outputs"]) -> np.ndarray:
    """Guessed labels; for regression the scores."""
    return logits.argmax(axis=1) if task.labels else logits[:, 0].astype(np.float64)


def measure(
    task: Task, labels: np.ndarray, logits: Float[np.ndarray, "n outputs"], of: str = ""
) -> dict[str, float]:
    """Metrics of the task on one validation set; `of` is the name of the set, appended to each."""
    suffix = f" {of}" if of else ""
    guesses = guessed(task, logits)
    return {name + suffix: METRICS[name](labels, guesses) for name in task.metrics}


def confusion(
    labels: Int[np.ndarray, " n"], guesses: Int[np.ndarray, " n"], number: int
) -> Int[np.ndarray, "number number"]:
    """Number of records by label (row) and guess (column).

    Example:
        >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    counts = np.zeros((number, number), np.int64)
    np.add.at(counts, (labels, guesses), 1)
    return counts
