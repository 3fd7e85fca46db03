"""Which optimizer tunes a pretrained model for function calling best? Each method at its best rate.

    python examples/finetuning/fetch_calls.py --out runs/calls           the model and the records
    python benchmarks/learning/bench_function_calling.py --minutes 8     the first runs
    python benchmarks/learning/bench_function_calling.py --list          remaining rounds
    python benchmarks/learning/bench_function_calling.py --show          the table
    python benchmarks/learning/bench_function_calling.py --methods untuned,galore-8 --steps 2 \\
        --batch-size 2 --length 256 --judged 4 --dtype float32 --out runs/calls.jsonl    on a CPU

SmolLM2-135M-Instruct, from its 4-bit file, learns the records of the Berkeley Function-Calling
Leaderboard for three epochs, with the loss of finetune_function_calling.py. Success is that of
generated plans with accepted arguments, and without arguments (examples/finetuning/plans.py).

A tenth of the training records is held out and chooses the rate, by success, then by loss; the test
records are only measured. No two of the three parts call the same function. A method has two
rounds: every rate with one seed, then the best rate with two more. `untuned` is the model as it is.

The low-rank methods keep the embedding fixed, which is also the head, as LoRA does. `core` has the
Fisher stage and no residual, as the example by default; `natural_galore` has the defaults of the
library, an orthogonalised residual without the Fisher stage.

A run is one line of --out; a run that --out already has with the same settings is not repeated.
Peak bytes are those of the compiled step: weights, state, batch and temporaries.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.learning.bench_finetune_text import (
    RATES,
    SEEDS,
    Method,
    RateState,
    append,
    at_rate,
    read,
    warmup_of,
)
from examples.common import hugging_face, llama, pretrained, run_log, training_loop
from examples.finetuning import finetune_function_calling as calling, plans, training


UNTUNED = "untuned"
HELD_OUT = 0.1  # of the training records
JUDGE_BATCH = 128
SETTINGS = ("epochs", "steps", "batch_size", "length", "judged", "dtype")  # of a line


def methods() -> Iterator[tuple[str, Method]]:
    """The methods by name, in the order of their importance."""

    def method(optimizer: str, first: float, **settings: Any) -> Method:
        place = RATES.index(first)
        return Method({"optimizer": optimizer, **settings}, RATES[place : place + 5])

    low_rank = partial(method, freeze_embeddings=True)
    yield UNTUNED, Method({}, (0.0,))
    yield "adamw", method("adamw", 2e-5)
    for rank in (8, 32):
        yield f"lora-{rank}", method("lora", 2e-4, rank=rank)
        yield f"galore-{rank}", low_rank("galore", 5e-5, rank=rank)
        yield (
            f"natural_galore-{rank}",
            low_rank("natural_galore", 5e-5, rank=rank, fisher="none", residual="whitened"),
        )
        yield (
            f"core-{rank}",
            low_rank("natural_galore", 1e-4, rank=rank, fisher="core", residual="none"),
        )
    yield "muon", method("muon", 5e-5)


METHODS = dict(methods())


@dataclass(frozen=True)
class Config(calling.Config):
    """The example's settings, with an optimizer whose rate is part of its state."""

    refresh_every: int = 50
    scale: float | None = None
    dtype: str = "bfloat16"
    remat: bool = True

    def make_optimizer(self) -> optax.GradientTransformation:
        tx = self.OPTIMIZERS[self.optimizer].make(1.0, self)
        return optax.chain(tx, at_rate(head=0.0))  # the model has no classifier


def config_of(name: str, **settings: Any) -> Config:
    """The settings of a method."""
    (config,) = Config(**METHODS[name].settings, **settings, lr=1.0).runs()
    return config


class Data(NamedTuple):
    """The model, and the records in three parts."""

    inputs: calling.Inputs
    validation: calling.Split


def load(folder: Path, length: int, dtype: str) -> Data:
    """Reads the output of fetch_calls.py.

    Args:
        folder: its folder.
        length: maximum tokens of a record; longer records are dropped.
        dtype: dtype of activations and matmuls.
    """
    shape, weights = hugging_face.read_llama(folder / "model")
    shape = replace(shape, scan=True, remat=True, dtype=jnp.dtype(dtype))
    tokenizer = hugging_face.read_tokenizer(folder / "model", shape.vocabulary)
    chat = calling.chat_of(tokenizer)
    sets = calling.read_records(folder / "records")
    train, validation = plans.split(sets["training"].records, HELD_OUT, seed=1)
    parts = [
        calling.tokenized(tokenizer, chat, examples, length)
        for examples in (train, sets["testing"].records, validation)
    ]
    end = tokenizer.token_to_id(chat.end)
    weights = hugging_face.stacked(weights)
    return Data(calling.Inputs(shape, weights, tokenizer, end, *parts[:2], {}), parts[2])


class Program(NamedTuple):
    """The training step of a method, compiled.

    Attributes:
        functions: functions of the example.
        step: (TrainState, batch) -> (TrainState, loss).
        bytes: weights, state and peak of the step.
        seconds: time of the compilation.
    """

    functions: training.Functions
    step: Any
    bytes: dict[str, int]
    seconds: float


def batch_of(split: calling.Split, size: int, seed: int, step: int) -> tuple[Any, ...]:
    rows = training.epoch_rows(len(split.tokens), size, seed, step)
    return np.int32(step), split.tokens[rows], split.of_plan[rows]


def with_rate(state: training_loop.TrainState, rate: float, steps: int) -> training_loop.TrainState:
    """The initial state with the learning rate and the number of steps in its last part."""
    counts = map(jnp.int32, (warmup_of(steps), steps))
    schedule = RateState(jnp.int32(0), jnp.float32(rate), *counts)
    return state._replace(opt_state=(*state.opt_state[:-1], schedule))


def compiled(config: Config, inputs: calling.Inputs) -> Program:
    """The training step of the example with the rate as a number of its state."""
    functions = training.make_functions(
        config,
        partial(llama.Llama, inputs.shape),
        inputs.weights,
        lambda model, tokens, of_plan, rngs: calling.plan_loss(model, tokens, of_plan),
        head="head",
    )
    state = jax.eval_shape(lambda key: with_rate(functions.init(key), 1.0, 1), jax.random.key(0))
    batch = batch_of(inputs.train, config.batch_size, 0, 1)
    start = time.perf_counter()
    step = functions.train_step.lower(state, batch).compile()
    seconds = round(time.perf_counter() - start, 1)
    memory = step.memory_analysis()
    found = {
        "weights_bytes": run_log.nbytes(state.params),
        "state_bytes": run_log.nbytes(state.opt_state),
        "peak_bytes": memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }
    return Program(functions, step, found, seconds)


def measured(data: Data, params: pretrained.Params, args: argparse.Namespace) -> dict[str, Any]:
    """Success and loss on the validation records, success on the test records; all in [0, 1]."""
    inputs, parts = data.inputs, {"validation": data.validation, "test": data.inputs.test}
    found: dict[str, Any] = {}
    for name, split in parts.items():
        count = min(args.judged or len(split.examples), len(split.examples))
        scores = calling.success(inputs, params, split, range(count), JUDGE_BATCH)
        keys = {"success": name, "success without arguments": f"{name}_without_arguments"}
        found |= {keys[key]: round(score, 5) for key, score in scores.items()}
    structure = llama.structure(inputs.shape)
    loss = jax.jit(lambda params, *batch: calling.plan_loss(nnx.merge(structure, params), *batch))
    tokens, of_plan = data.validation[:2]
    count = min(args.judged or len(tokens), len(tokens))
    rows = np.resize(np.arange(count), (-(-count // args.batch_size), args.batch_size))
    losses = [float(loss(params, tokens[row], of_plan[row])) for row in rows]
    return found | {"validation_loss": round(float(np.mean(losses)), 5)}


def run(
    name: str, rate: float, seed: int, data: Data, program: Program | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Trains and measures once; without a program, measures the model as it is."""
    line: dict[str, Any] = {"method": name, "rate": rate, "seed": seed} | settings_of(args)
    line |= {"records": len(data.inputs.train.tokens)}
    params, losses, start = data.inputs.weights, [], time.perf_counter()
    if program is not None:
        per_epoch = len(data.inputs.train.tokens) // args.batch_size
        steps = args.steps or args.epochs * per_epoch
        state = with_rate(program.functions.init(jax.random.key(seed)), rate, steps)
        jax.block_until_ready(state)
        total, start = [], time.perf_counter()
        for step in range(1, steps + 1):
            state, loss = program.step(
                state, batch_of(data.inputs.train, args.batch_size, seed, step)
            )
            total.append(loss)
            if step % per_epoch == 0 or step == steps:
                losses.append(round(float(np.mean(jax.device_get(total))), 5))
                total = []
        params = jax.jit(training.plain_params)(state.params)
        line |= program.bytes | {"compile_seconds": program.seconds}
        line |= {"train_steps": steps, "losses": losses}
        del state
    jax.block_until_ready(params)
    trained = time.perf_counter()
    line |= measured(data, jax.tree.map(jnp.asarray, params), args)
    return line | {
        "train_seconds": round(trained - start, 1),
        "judge_seconds": round(time.perf_counter() - trained, 1),
        "environment": environment(),
    }


# Rounds and results


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that lines must share to be compared."""
    return {name: getattr(args, name) for name in SETTINGS}


def best_rate(runs: Sequence[dict[str, Any]]) -> float:
    """The rate with the most success on the validation records, then the least loss."""
    key = lambda run: (-run["validation"], np.nan_to_num(run["validation_loss"], nan=np.inf))
    return min(runs, key=key)["rate"]


def next_run(name: str, found: Sequence[dict[str, Any]]) -> tuple[float, int] | None:
    """Rate and seed of the method's next run, given its finished runs; None after the last."""
    have = {(run["rate"], run["seed"]) for run in found}
    first = [(rate, SEEDS[0]) for rate in METHODS[name].rates]
    if missing := [run for run in first if run not in have]:
        return missing[0]
    best = best_rate([run for run in found if run["seed"] == SEEDS[0]])
    others = [(best, seed) for seed in SEEDS[1:] if name != UNTUNED]
    return next((run for run in others if run not in have), None)


def runs_of(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The method's lines in --out with the settings of this call."""
    wanted = {"method": name} | settings_of(args)
    return [line for line in read(args.out) if wanted.items() <= line.items()]


def show(args: argparse.Namespace) -> None:
    """Prints a table of the methods at their best rates; ! is a rate at the edge of the search."""
    table = Table(
        *("method", "rate", "success %", "without arguments %", "state MB", "peak MB", "train s"),
        title=f"test records, seeds of the best rate, {settings_of(args)}",
    )
    for name in METHODS:
        found = runs_of(name, args)
        if not found:
            continue
        rate = best_rate([run for run in found if run["seed"] == SEEDS[0]])
        at_best = [run for run in found if run["rate"] == rate]
        rates = METHODS[name].rates
        mean = lambda key, runs=at_best: float(np.mean([run.get(key, 0) for run in runs]))

        def spread(key: str, runs=at_best) -> str:
            values = [100 * run[key] for run in runs]
            return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f}"

        edge = "!" if len(rates) > 1 and rate in (rates[0], rates[-1]) else ""
        table.add_row(
            name,
            f"{rate:g}{edge}",
            f"{spread('test')} ({len(at_best)})",
            spread("test_without_arguments"),
            f"{mean('state_bytes') / 1e6:,.1f}",
            f"{mean('peak_bytes') / 1e6:,.0f}",
            f"{mean('train_seconds'):.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",")
    parser.add_argument("--data", type=Path, default="runs/calls", help="output of fetch_calls.py")
    parser.add_argument(
        "--out", type=Path, default="benchmarks/results/function-calling.jsonl", help="results"
    )
    parser.add_argument("--list", action="store_true", help="list the next run of each method")
    parser.add_argument("--show", action="store_true", help="print the results")
    parser.add_argument("--methods", type=words, default=list(METHODS), help="names, with commas")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=32, help="records of a training step")
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a record; longer ones are dropped"
    )
    parser.add_argument("--judged", type=int, help="plans to generate of each part; default: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=600, help="begin no run after this time")
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"no method {unknown[0]!r}: choose from {', '.join(METHODS)}")
    if args.show:
        show(args)
        return
    remaining = {name: next_run(name, runs_of(name, args)) for name in args.methods}
    if args.list:
        for name, following in remaining.items():
            if following is not None:
                print(f"{name}: next is rate {following[0]:g}, seed {following[1]}")
        return
    data = load(args.data, args.length, args.dtype)
    for name in args.methods:
        program = None
        while time.time() < until and (following := next_run(name, runs_of(name, args))):
            if name != UNTUNED and program is None:
                settings = {"batch_size": args.batch_size, "dtype": args.dtype}
                program = compiled(config_of(name, **settings), data.inputs)
            line = run(name, *following, data, program, args)
            append(args.out, line)
            print(
                f"{name} rate {line['rate']:g} seed {line['seed']}: success {line['test']:.3f}, "
                f"without arguments {line['test_without_arguments']:.3f}, "
                f"{line['train_seconds']} + {line['judge_seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
