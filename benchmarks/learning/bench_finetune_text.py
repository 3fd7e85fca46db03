"""Which optimizer fine-tunes a pretrained encoder best? Three tasks, each method at its best rate.

    python examples/finetuning/fetch_text.py --out runs/text              the encoder and the texts
    python benchmarks/learning/bench_finetune_text.py --prepare runs/text  tokens, into runs/study
    python benchmarks/learning/bench_finetune_text.py --minutes 12        the first searches
    python benchmarks/learning/bench_finetune_text.py --workers 6           six at a time
    python benchmarks/learning/bench_finetune_text.py --list              remaining searches
    python benchmarks/learning/bench_finetune_text.py --show              the table

all-MiniLM-L6-v2 (22.7M weights) is tuned for three epochs on Reuters R52, the sections of Debian's
packages and 20 Newsgroups, at 128 tokens a record. A tenth of the training records is held out: it
chooses the rate, the test records are only measured. A search has two rounds: every rate with one
seed, then the best rate with two more.

AdamW trains the classifier at one rate in all methods, `--head-lr` of the example: its pooler is
not trained in this checkpoint, and at the rates of pretrained weights it learns too slowly. The
low-rank methods keep the embeddings fixed, as LoRA does: of 22.7M weights 11.9M are embeddings,
whose moments would be most of the state.

The runs of a round train together, as one `vmap` of the training step of
examples/finetuning/training.py: the rate is a number in the optimizer's state (`at_rate`), and the
batches, dropout and initial head follow from a run's seed. One program serves all tasks: their
heads have 64 outputs, of which a task uses as many as it has labels.

A search is one line of --out; a search that --out already has is not repeated. `--shard 0/4` does
the searches of every fourth method only. Peak memory and step times are measured for one run alone,
by bench_finetune.py with the same methods.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt16
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from benchmarks.common.environment import environment
from examples.common import hugging_face, pretrained, roberta
from examples.finetuning import classification, finetune_text, records, settings, training


LENGTH = 128  # tokens
OUTPUTS = 64
EPOCHS = 3
REFRESH_EVERY = 50
TASKS = ("r52", "sections", "20newsgroups")
SEEDS = (0, 1, 2)
CHUNK = 32  # steps of a call


class Method(NamedTuple):
    """An optimizer of the study.

    Attributes:
        settings: settings of the fine-tuning examples.
        rates: learning rates of the search.
    """

    settings: dict[str, Any]
    rates: tuple[float, ...]


RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)


def methods() -> Iterator[tuple[str, Method]]:
    """The methods by name, in the order of their importance."""

    def method(optimizer: str, first: float, **settings: Any) -> Method:
        place = RATES.index(first)
        return Method({"optimizer": optimizer, **settings}, RATES[place : place + 5])

    def low_rank(optimizer: str, first: float, **settings: Any) -> Method:
        return method(optimizer, first, **{"rank": 8, "freeze_embeddings": True} | settings)

    # The defaults of the library, and the Fisher stages without a residual.
    natural = partial(low_rank, "natural_galore", 5e-5, fisher="none", residual="whitened")
    fisher = partial(low_rank, "natural_galore", 1e-4, residual="none")
    yield "adamw", method("adamw", 2e-5)
    yield "lora-8", method("lora", 2e-4, rank=8)
    yield "galore-8", low_rank("galore", 5e-5)
    yield "natural_galore-8", natural()
    yield "window-8", fisher(fisher="window")  # the paper's form
    yield "muon", method("muon", 5e-5)
    yield "natural_galore-core-8", natural(fisher="core")
    yield "core-8", fisher(fisher="core")
    yield "adamw-frozen", method("adamw", 2e-5, freeze_embeddings=True)
    for rank in (4, 32):
        yield f"lora-{rank}", method("lora", 2e-4, rank=rank)
        yield f"galore-{rank}", low_rank("galore", 5e-5, rank=rank)
        yield f"natural_galore-{rank}", natural(rank=rank)
    yield "window-4", fisher(fisher="window", rank=4)
    yield "galore-8-all", low_rank("galore", 5e-5, freeze_embeddings=False)
    yield "natural_galore-8-all", natural(freeze_embeddings=False)


METHODS = dict(methods())
MAIN = ("adamw", "lora-8", "galore-8", "natural_galore-8", "window-8", "muon")


class Search(NamedTuple):
    """The search of a method's rate on a task at one batch size, from one start.

    Attributes:
        start: "pretrained" or "random" weights.
        batch_size: records per batch.
        method: name in METHODS.
        task: name in TASKS.
    """

    start: str
    batch_size: int
    method: str
    task: str


def searches() -> list[Search]:
    """All searches of the study, in the order of their importance; a program's together."""
    others = [name for name in METHODS if name not in MAIN]
    parts = [
        ("pretrained", 32, MAIN),
        ("pretrained", 32, others),
        ("pretrained", 16, MAIN),
        ("random", 32, MAIN),
        ("pretrained", 128, MAIN),
    ]
    return [
        Search(start, size, name, task)
        for start, size, names in parts
        for name in names
        for task in TASKS
    ]


# The optimizer with its rate in the state


class RateState(NamedTuple):
    """State of `at_rate`; float32 and int32 scalars.

    Attributes:
        count: steps so far.
        peak: learning rate after the warm-up.
        warmup: steps of the linear warm-up from 0.
        steps: total steps; the rate decays linearly to 0.
    """

    count: Array
    peak: Array
    warmup: Array
    steps: Array


def at_rate(head: float) -> optax.GradientTransformation:
    """Multiplies updates at learning rate 1 by the schedule of `settings.Config`.

    Without weight decay, updates are proportional to the learning rate.

    Args:
        head: learning rate of the classifier after the warm-up.
    """

    def init(params):
        del params
        return RateState(*jnp.zeros((2, 2), jnp.int32)[0], *jnp.ones(2, jnp.int32))

    def update(updates, state, params=None):
        del params
        t, warmup, steps = (x.astype(jnp.float32) for x in (state.count, state.warmup, state.steps))
        share = jnp.minimum(t / warmup, (steps - t) / (steps - warmup))
        updates = {
            name: jax.tree.map(
                partial(jnp.multiply, share * (head if name == "classifier" else state.peak)), part
            )
            for name, part in updates.items()
        }
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def warmup_of(steps: int) -> int:
    return max(1, steps * 6 // 100)


@dataclass(frozen=True)
class Config(finetune_text.Config):
    """The example's settings, with an optimizer whose rate is part of its state."""

    batch_size: int = 32
    refresh_every: int = REFRESH_EVERY
    dtype: str = "bfloat16"

    def make_optimizer(self) -> optax.GradientTransformation:
        tx = self.OPTIMIZERS[self.optimizer].make(1.0, self)
        return optax.chain(settings.with_head(tx, settings.adamw(1.0, self)), at_rate(self.head_lr))


def with_rates(state: Any, rates: Sequence[float], steps: int) -> Any:
    """TrainStates of several runs with their rates in the optimizer's state."""
    fill = lambda value, dtype: jnp.full(len(rates), value, dtype)
    rate = RateState(
        count=fill(0, jnp.int32),
        peak=jnp.asarray(rates, jnp.float32),
        warmup=fill(warmup_of(steps), jnp.int32),
        steps=fill(steps, jnp.int32),
    )
    return state._replace(opt_state=(*state.opt_state[:-1], rate))


# Data


class Split(NamedTuple):
    """Tokens, padded, and labels of a set of records."""

    tokens: UInt16[np.ndarray, "records length"]
    labels: Int[np.ndarray, " records"]


class Data(NamedTuple):
    """A task: training, validation and test records, and the number of labels."""

    train: Split
    validation: Split
    test: Split
    labels: int


def prepare(texts: Path, out: Path, length: int = LENGTH) -> None:
    """Tokenises the corpora in `texts` and copies its encoder.

    Its weights are rounded to bfloat16, as the matmuls round them.
    """
    config = hugging_face.encoder_config(texts / "encoder")
    tokenizer = hugging_face.read_tokenizer(texts / "encoder", config.vocabulary)
    (out / "encoder").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (out / "encoder" / name).write_bytes((texts / "encoder" / name).read_bytes())
    tensors = load_file(texts / "encoder" / "model.safetensors")
    half = {k: x.astype(jnp.bfloat16) if x.dtype.kind == "f" else x for k, x in tensors.items()}
    save_file(half, out / "encoder" / "model.safetensors")
    for task in (folder.name for folder in sorted(texts.iterdir()) if folder.name in TASKS):
        parse = lambda row: classification.Example((row["text"],), row["label"])
        read = lambda split, task=task, parse=parse: (
            records.read(texts / task / f"{split}.jsonl", parse).records
        )
        sets = {split: read(split) for split in ("train", "test")}
        names = sorted({example.label for example in sets["train"]})
        arrays: dict[str, np.ndarray] = {"names": np.array(names)}
        for split, examples in sets.items():
            indexed = [e._replace(label=names.index(e.label)) for e in examples]
            tokens, labels = finetune_text.tokenized(tokenizer, config, indexed, length)
            width = ((0, 0), (0, length - tokens.shape[1]))
            tokens = np.pad(tokens, width, constant_values=config.padding)
            arrays[f"{split}_tokens"] = tokens.astype(np.uint16)
            arrays[f"{split}_labels"] = labels.astype(np.uint8)
        np.savez_compressed(out / f"{task}.npz", **arrays)
        print(
            f"{out / task}.npz: {len(sets['train'])} training and {len(sets['test'])} test records"
        )


def load(folder: Path, task: str) -> Data:
    """The records of a prepared task; a tenth of the training records is for validation."""
    file = np.load(folder / f"{task}.npz")
    split = lambda name: Split(file[f"{name}_tokens"], file[f"{name}_labels"].astype(np.int32))
    train = split("train")
    order = np.random.default_rng(0).permutation(len(train.labels))
    held_out, rest = np.split(order, [len(order) // 10])
    part = lambda rows: Split(train.tokens[rows], train.labels[rows])
    return Data(part(rest), part(held_out), split("test"), len(file["names"]))


# Training


class Programs(NamedTuple):
    """Compiled functions of a search.

    Attributes:
        init: seeds -> TrainStates.
        chunk: (TrainStates, steps, batches) -> (TrainStates, sum of the losses of each run).
        predict: (params, tokens) -> guessed labels of each run.
    """

    init: Any
    chunk: Any
    predict: Any


def config_of(name: str, batch_size: int = 32) -> Config:
    """The settings of a method."""
    (config,) = Config(**METHODS[name].settings, lr=1.0, batch_size=batch_size).runs()
    return config


def loss(model: Any, tokens: Array, labels: Array, rngs: Any) -> Float[Array, ""]:
    return finetune_text.losses(model(tokens, rngs), labels).mean()


def programs(config: Config, shape: roberta.RobertaConfig, weights: pretrained.Params) -> Programs:
    """The training step of the examples, for several runs at once."""
    functions = training.make_functions(config, shape.build, weights, loss, head="classifier")
    step = jax.vmap(functions.train_step)

    @partial(jax.jit, donate_argnums=0)
    def chunk(states, steps, batches):
        def one(i, carry):
            states, total = carry
            number, tokens, labels = (x[i] for x in batches)
            states, loss = step(states, (number, tokens.astype(jnp.int32), labels))
            return states, total + loss

        return jax.lax.fori_loop(0, steps, one, (states, jnp.zeros(len(batches[0][0]))))

    @jax.jit
    def predict(params, tokens):
        guess = lambda params: functions.model(params)(tokens.astype(jnp.int32)).argmax(axis=1)
        return jax.vmap(guess)(params)

    init = lambda seeds: jax.vmap(functions.init)(jax.vmap(jax.random.key)(jnp.asarray(seeds)))
    return Programs(init, chunk, predict)


def guesses(
    program: Programs, params: Any, tokens: UInt16[np.ndarray, "n length"], size: int = 256
) -> Int[np.ndarray, "runs n"]:
    """Guessed labels of all records, in batches of equal size; the last batch is filled up."""
    n = len(tokens)
    filled = np.resize(tokens, (-(-n // size) * size, tokens.shape[1]))
    parts = [program.predict(params, part) for part in np.split(filled, len(filled) // size)]
    return np.concatenate([np.asarray(part) for part in parts], axis=1)[:, :n]


def train(
    program: Programs, data: Data, runs: Sequence[tuple[float, int]], batch_size: int, epochs: int
) -> list[dict[str, Any]]:
    """Trains runs, given by rate and seed, together.

    Returns:
        Of each run: rate, seed, losses of the epochs, validation accuracy after each epoch, test
        accuracy and macro-F1 at the end.
    """
    rates, seeds = zip(*runs, strict=True)
    per_epoch = len(data.train.labels) // batch_size
    steps = epochs * per_epoch
    states = with_rates(program.init(seeds), rates, steps)
    losses, validations = [], []
    accuracy = lambda labels, guessed: (guessed == labels).mean(axis=1)
    for epoch in range(epochs):
        total = 0.0
        for first in range(0, per_epoch, CHUNK):
            numbers = epoch * per_epoch + first + 1 + np.arange(CHUNK)
            numbers = numbers[: per_epoch - first]
            rows = np.array(
                [
                    [
                        training.epoch_rows(len(data.train.labels), batch_size, seed, int(n))
                        for seed in seeds
                    ]
                    for n in numbers
                ]
            )
            # The dropout of a step follows from its number, which differs between seeds.
            keys = numbers[:, None] + 1_000_000 * np.array(seeds)
            batches = keys.astype(np.int32), data.train.tokens[rows], data.train.labels[rows]
            fill = CHUNK - len(numbers)
            batches = [np.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1))) for x in batches]
            states, part = program.chunk(states, np.int32(len(numbers)), batches)
            total = total + part
        losses.append(np.asarray(total) / per_epoch)
        guessed = guesses(program, states.params, data.validation.tokens)
        validations.append(accuracy(data.validation.labels, guessed))
    guessed = guesses(program, states.params, data.test.tokens)
    tests = accuracy(data.test.labels, guessed)
    rounded = lambda values: [round(float(value), 5) for value in values]
    return [
        {
            "rate": rate,
            "seed": seed,
            "losses": rounded(loss[i] for loss in losses),
            "validation": rounded(value[i] for value in validations),
            "accuracy": round(float(tests[i]), 5),
            "macro_f1": round(classification.macro_f1(data.test.labels, guessed[i]), 5),
        }
        for i, (rate, seed) in enumerate(runs)
    ]


def best_rates(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Rates in the order of their mean validation accuracy at the end, best first."""
    means = {
        rate: np.mean([run["validation"][-1] for run in runs if run["rate"] == rate])
        for rate in {run["rate"] for run in runs}
    }
    return sorted(means, key=lambda rate: (-means[rate], rate))


def rounds(rates: Sequence[float], first: Sequence[dict[str, Any]] | None = None):
    """The runs of a round: all rates with the first seed, or the best rate with the others."""
    if first is None:
        return [(rate, SEEDS[0]) for rate in rates]
    return [(best_rates(first)[0], seed) for seed in SEEDS[1:]]


@cache
def programs_of(data: Path, start: str, batch_size: int, method: str) -> Programs:
    """The programs of a method, compiled once for all tasks."""
    config = config_of(method, batch_size)
    shape, weights = hugging_face.read_encoder(data / "encoder", OUTPUTS)
    shape = replace(shape, dtype=jnp.dtype(config.dtype))
    if start == "random":
        weights = roberta.abstract_params(shape)
    return programs(config, shape, weights)


def run(search: Search, args: argparse.Namespace) -> None:
    """Does one search and appends its line to --out."""
    begin = time.perf_counter()
    program = programs_of(args.data, search.start, search.batch_size, search.method)
    data = load(args.data, search.task)
    one = partial(train, program, data, batch_size=search.batch_size, epochs=args.epochs)
    first = one(runs=rounds(METHODS[search.method].rates))
    runs = first + one(runs=rounds(METHODS[search.method].rates, first))
    seconds = round(time.perf_counter() - begin, 1)
    line = search._asdict() | {"epochs": args.epochs, "runs": runs, "seconds": seconds}
    append(args.out, line | {"environment": environment()})
    found = summary([line], search)
    print(*search, f"accuracy {found}, {seconds} s", flush=True)


def complete(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs whose rate has all seeds."""
    seeds = lambda rate: {run["seed"] for run in runs if run["rate"] == rate}
    return [run for run in runs if seeds(run["rate"]) == set(SEEDS)]


# Results


def append(file: Path, line: dict[str, Any]) -> None:
    """Appends a line in one write, since several processes write to the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        out.write((json.dumps(line) + "\n").encode())


def read(file: Path) -> list[dict[str, Any]]:
    """The searches in a results file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def done(file: Path) -> set[Search]:
    """The searches that the file has."""
    return {search_of(line) for line in read(file)}


def search_of(line: dict[str, Any]) -> Search:
    """The search of a line of a results file."""
    return Search(*(line[name] for name in Search._fields))


def left(args: argparse.Namespace) -> list[Search]:
    """The searches of the shard that --out does not have yet."""
    index, number = map(int, args.shard.split("/"))
    have = done(args.out)
    wanted = [
        search
        for search in searches()
        if search.method in args.methods
        and search.batch_size in args.batches
        and search.start in args.starts
        and search.task in args.tasks
    ]
    compiled = list(dict.fromkeys(program_key(search) for search in wanted))
    mine = compiled[index::number]
    return [search for search in wanted if program_key(search) in mine and search not in have]


def program_key(search: Search) -> tuple[str, int, str]:
    """The searches of a program differ in their task alone."""
    return search.start, search.batch_size, search.method


def show(file: Path) -> None:
    """Prints a table for each start and batch size."""
    found = read(file)
    for start, size in sorted({(x["start"], x["batch_size"]) for x in found}):
        table = Table("method", *TASKS, "mean", "macro-F1", title=f"{start}, batch {size}")
        for name in METHODS:
            cells, means, f1s = [], [], []
            for task in TASKS:
                result = summary(found, Search(start, size, name, task))
                cells.append("-" if result is None else str(result))
                if result is not None:
                    means.append(result.accuracy)
                    f1s.append(result.macro_f1)
            if means:
                whole = len(means) == len(TASKS)
                mean = [f"{np.mean(x):.2f}" if whole else "-" for x in (means, f1s)]
                table.add_row(name, *cells, *mean)
        Console(width=None if sys.stdout.isatty() else 140).print(table)


class Summary(NamedTuple):
    """A method on a task at its best rate, in percent.

    Attributes:
        rate: learning rate.
        accuracy, deviation: mean and standard deviation of the test accuracy over seeds.
        macro_f1: mean over seeds.
        at_edge: the rate is the first or last of the search.
    """

    rate: float
    accuracy: float
    deviation: float
    macro_f1: float
    at_edge: bool

    def __str__(self) -> str:
        edge = "!" if self.at_edge else ""
        return f"{self.accuracy:.2f} ± {self.deviation:.2f} at {self.rate:g}{edge}"


def summary(found: Sequence[dict[str, Any]], search: Search) -> Summary | None:
    """The result of a search; None if the file does not have it."""
    for line in found:
        if search_of(line) == search:
            (rate,) = {run["rate"] for run in complete(line["runs"])}
            runs = [run for run in line["runs"] if run["rate"] == rate]
            rates = {run["rate"] for run in line["runs"]}
            accuracies = [100 * run["accuracy"] for run in runs]
            return Summary(
                rate,
                float(np.mean(accuracies)),
                float(np.std(accuracies, ddof=1)),
                float(np.mean([100 * run["macro_f1"] for run in runs])),
                rate in (min(rates), max(rates)),
            )
    return None


def spawn(args: argparse.Namespace) -> None:
    """Starts the workers, spread over the GPUs, and waits for them."""
    given, workers = list(sys.argv[1:]), []
    place = given.index("--workers")
    del given[place : place + 2]
    for i in range(args.workers):
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": str(i % args.gpus),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, sys.argv[0], *given, "--shard", f"{i}/{args.workers}"]
        workers.append(subprocess.Popen(command, env=env))
    failed = [i for i, worker in enumerate(workers) if worker.wait()]
    if failed:
        sys.exit(f"workers {failed} failed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser.add_argument(
        "--data", type=Path, default="runs/study", help="prepared tokens and encoder"
    )
    parser.add_argument("--out", type=Path, default="benchmarks/results/finetune_text.jsonl")
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="tokenise these texts into --data"
    )
    parser.add_argument("--list", action="store_true", help="list the searches that are left")
    parser.add_argument("--show", action="store_true", help="print the results")
    parser.add_argument("--tasks", type=words, default=list(TASKS))
    parser.add_argument("--methods", type=words, default=list(METHODS))
    parser.add_argument("--batches", type=numbers, default=[32, 16, 128])
    parser.add_argument("--starts", type=words, default=["pretrained", "random"])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--minutes", type=float, default=600, help="begin nothing after this time")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th program from I")
    parser.add_argument("--workers", type=int, help="start this many processes, one shard each")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs for the workers")
    args = parser.parse_args()
    args.until = time.time() + 60 * args.minutes
    for name, given, known in (("task", args.tasks, TASKS), ("method", args.methods, METHODS)):
        if unknown := [x for x in given if x not in known]:
            parser.error(f"no {name} {unknown[0]!r}: choose from {', '.join(known)}")
    if args.prepare:
        prepare(args.prepare, args.data)
    elif args.show:
        show(args.out)
    elif args.list:
        for search in left(args):
            print(*search)
        print(f"{len(left(args))} of {len(searches())} searches left")
    elif args.workers:
        spawn(args)
    else:
        for search in left(args):
            if time.time() < args.until:
                run(search, args)


if __name__ == "__main__":
    main()
