"""Make small models and records from the standard library's text, to try every example offline.

    python examples/finetuning/tiny_assets.py --out runs/tiny      a few seconds, no network
    python examples/finetuning/finetune_glue.py --task cola --model runs/tiny/roberta \\
        --data runs/tiny/glue/CoLA --lr 1e-3 --scale 1 --epochs 10
    python examples/pretraining/pretrain.py --dataset c4 --data runs/tiny/c4 \\
        --tokenizer runs/tiny/c4

The output folder (about 3 MB) has a two-layer RoBERTa and a two-layer Llama with random weights in
Hugging Face's format, with a byte-level BPE tokenizer trained on docstrings; 640 training and 100
validation records per GLUE task, in the format in which the task is published; plans in TinyAgent's
format; and the docstrings as shards of C4. A label depends on one word of the last sentence, so it
can be learned.
"""

import ast
import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.common import command_line, data, hugging_face, llama, roberta
from examples.finetuning import classification, glue


SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # in the order of RoBERTa's vocabulary
RECORDS = {"train": 640, "dev": 100}


def docstrings(files: Iterable[Path]) -> Iterator[str]:
    """The docstrings of the modules, classes and functions in these files."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Distinct sentences of 5 to 16 plain words."""
    seen = set()
    for text in texts:
        for sentence in re.split(r"(?<=\.)\s+|\n\s*\n", text):
            words = sentence.split()
            line = " ".join(words)
            if 5 <= len(words) <= 16 and re.fullmatch(r"[\w ,.'()-]+", line) and line not in seen:
                seen.add(line)
                yield line


def train_tokenizer(texts: Sequence[str], vocabulary: int = 1000) -> Tokenizer:
    """A byte-level BPE tokenizer with RoBERTa's special tokens around sentences and pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def save_roberta(folder: Path, tokenizer: Tokenizer, layers: int = 2) -> None:
    """Writes a small RoBERTa with random weights and no classifier, like RoBERTa-base."""
    config = roberta.RobertaConfig(
        hidden=64,
        intermediate=128,
        heads=4,
        layers=layers,
        vocabulary=tokenizer.get_vocab_size(),
        positions=66,
        dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
    )
    model = roberta.Roberta(config, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    del params["classifier"]
    hugging_face.save_encoder(folder, config, jax.tree.map(np.asarray, params))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_llama(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a two-layer Llama with random weights, four query and two key-value heads."""
    config = llama.LlamaConfig(
        64, 128, heads=4, layers=2, vocabulary=tokenizer.get_vocab_size(), kv_heads=2
    )
    params = nnx.to_pure_dict(nnx.state(llama.Llama(config, nnx.Rngs(0)), nnx.Param))
    hugging_face.save_llama(folder, config, jax.tree.map(np.asarray, params))
    tokenizer.save(str(folder / "tokenizer.json"))


def has_the(sentence: str) -> bool:
    return "the" in sentence.split()


def has_to(sentence: str) -> bool:
    return "to" in sentence.split()


def answer(task: classification.Task, sentence: str) -> int | float:
    """The label of a record: which of two words its last sentence contains."""
    if not task.labels:
        return 2.0 * has_the(sentence) + 2.5 * has_to(sentence)
    if len(task.labels) == 3:
        return 2 * has_the(sentence) or int(has_to(sentence))
    return int(has_the(sentence))


# Format of each task's own .tsv: its header, and the cells from (number, sentences, label).
LAYOUTS: dict[str, tuple[str, Callable[[int, Sequence[str], Any], Sequence[Any]]]] = {
    "cola": ("", lambda i, s, label: ("stdlib", label, "", *s)),
    "sst2": ("sentence\tlabel", lambda i, s, label: (*s, label)),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        lambda i, s, label: (label, i, i + 1, *s),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        lambda i, s, label: (i, "docs", "stdlib", "none", i, "none", "none", *s, label),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        lambda i, s, label: (i, 2 * i, 2 * i + 1, *s, label),
    ),
    "mnli": (
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        lambda i, s, label: (i, "docs", *s, label, label),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", lambda i, s, label: (i, *s, label)),
    "rte": ("index\tsentence1\tsentence2\tlabel", lambda i, s, label: (i, *s, label)),
}
NAMED = ("mnli", "qnli", "rte")  # tasks whose .tsv has class names as labels


def save_task(folder: Path, name: str, pool: Sequence[str]) -> None:
    """Writes training and validation records of a task; their last sentences are disjoint."""
    task, (header, cells) = glue.TASKS[name], LAYOUTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    number = itertools.count()
    for split, count in RECORDS.items():
        names = ["train"] if split == "train" else [names[0] for names in task.validation.values()]
        for file in names:
            lines = [header] if header else []
            for i in itertools.islice(number, count):
                last = pool[i % len(pool)]
                texts = [pool[(7 * i + 3) % len(pool)], last][-len(task.texts) :]
                label = answer(task, last)
                value = task.labels[int(label)] if name in NAMED else label
                lines.append("\t".join(map(str, cells(i, texts, value))))
            (folder / f"{file}.tsv").write_text("\n".join(lines) + "\n")


def save_c4(folder: Path, tokenizer: Tokenizer, texts: Sequence[str], held_out: int = 10) -> None:
    """Writes texts as shards of C4, with a tokenizer; every `held_out`-th is for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = [text for i, text in enumerate(texts) if i % held_out]
    splits = {"train": [rest[::2], rest[1::2]], "validation": [texts[::held_out]]}
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            lines = [json.dumps({"text": text, "url": "stdlib"}) + "\n" for text in shard]
            file = folder / f"c4-{split}.{i:05}-of-{len(shards):05}.json.gz"
            file.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    tokenizer.save(str(folder / "tokenizer.json"))


PLACES = ("parser", "socket", "thread", "buffer", "module", "header", "stream", "format")


def save_plans(folder: Path) -> None:
    """Writes plans in TinyAgent's format: two wordings for each pair of a name and a subject."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = np.random.default_rng(0).permutation(list(itertools.product(PLACES, PLACES)))
    found: dict[str, dict[str, Any]] = {"training": {}, "testing": {}}
    for i, (name, subject) in enumerate(pairs):
        plans = {
            f"Write to {name} about {subject}": f'1. find("{name}")\n2. mail("$1", "{subject}")',
            f"Note {name} in {subject}": f'1. note("{subject}", "{name}")',
        }
        for text, calls in plans.items():
            plan = {
                "type": "plan",
                "raw_input": [{"role": "user", "content": text}],
                "raw_output": f"{calls}\n{calls.count(chr(10)) + 2}. join()<END_OF_PLAN>",
            }
            found["testing" if i < 8 else "training"][f"{name}-{subject}-{text[0]}"] = {
                "input": text,
                "output": [plan],
            }
    for split, records in found.items():
        (folder / f"{split}_data.json").write_text(json.dumps(records, indent=1))


def make(out: Path) -> None:
    """Writes all models and records to the folder."""
    files = data.standard_library()[::4]  # a quarter suffices
    texts = list(docstrings(files))
    pool = list(sentences(texts))
    order = np.random.default_rng(0).permutation(len(pool))
    pool = [pool[i] for i in order]
    tokenizer = train_tokenizer(texts)
    save_roberta(out / "roberta", tokenizer)
    save_llama(out / "llama", tokenizer)
    for name, task in glue.TASKS.items():
        save_task(out / "glue" / task.name, name, pool)
    save_plans(out / "plans")
    save_c4(out / "c4", tokenizer, texts)


def main() -> None:
    command_line.fill_folder(make, "runs/tiny", __doc__)


if __name__ == "__main__":
    main()
