"""The eight GLUE tasks (arXiv 1804.07461) of the RoBERTa paper: columns, labels and metrics.

The folder of a task has the files `train` and `dev` (or `validation`), as GLUE's own .tsv or as
.jsonl with the column names of Hugging Face's data set. MNLI has two validation sets.
"""

from pathlib import Path

from examples.finetuning import records
from examples.finetuning.classification import Example, Task, parse


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


def load(task: str, folder: Path, *, skip: bool = False) -> dict[str, records.Records[Example]]:
    """Reads the training records of a task, "train", and its validation sets by name.

    Raises:
        FileNotFoundError: a file is missing; the message has the command that downloads it.
        ValueError: a record is malformed and `skip` is false.
    """
    about = TASKS[task]
    files = {"train": ("train",), **about.validation}

    def one(names: tuple[str, ...]) -> records.Records[Example]:
        file = records.find(folder, *names)
        if file is None:
            raise FileNotFoundError(
                f"no {names[0]}.tsv or {names[-1]}.jsonl in {folder}; to download {about.name}: "
                f"python -c \"import datasets as d; [s.to_json(f'{folder}/{{n}}.jsonl') for n, s "
                f"in d.load_dataset('nyu-mll/glue', '{task}').items()]\""
            )
        return records.read(file, lambda row: parse(about, row), columns=about.header, skip=skip)

    return {name: one(names) for name, names in files.items()}
