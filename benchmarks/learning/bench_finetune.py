"""What does a step of fine-tuning cost under Natural GaLore, GaLore, AdamW and LoRA?

The training steps of examples/finetuning/finetune_glue.py and finetune_function_calling.py on
models of their real size, with random float32 weights and random tokens, at the paper's ranks. All
methods have the same model and batch and take turns, step by step; compare within one table only.

    python benchmarks/learning/bench_finetune.py [--out benchmarks/results/finetune.json]
    python benchmarks/learning/bench_finetune.py --tasks roberta-base --rank 8 --length 512
    python benchmarks/learning/bench_finetune.py --tasks minilm --methods adamw,lora-8,window-8
    python benchmarks/learning/bench_finetune.py --tasks minilm,roberta-base --batch-size 32
    python benchmarks/learning/bench_finetune.py --tasks tiny --steps 2    a quick run on a CPU

Methods are those of the examples and those of bench_finetune_text.py, by their names. `window`
is `natural_galore` in the paper's form. Bytes are those of the compiled step: weights and state,
which are its arguments, and temporaries. With --steps 0 nothing is run. Methods that --out already
holds for the same task and machine are not measured again. With --profile further steps are traced:
kernels, and their time on the device.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.learning import bench_finetune_text
from benchmarks.speed.profile_step import operations
from examples.common import bert, llama, roberta, run_log
from examples.finetuning import (
    finetune_function_calling,
    finetune_glue,
    finetune_text,
    settings,
    training,
)


METHODS = ("adamw", "lora", "galore", "natural_galore", "window")
REFERENCE = "adamw"


class Task(NamedTuple):
    """A fine-tuning task.

    Attributes:
      config: settings of the example, with rank and batch size.
      make_model: a new model from random streams.
      loss_fn: as `training.make_functions` takes it.
      head: the module that LoRA trains in full.
      vocabulary: number of tokens.
      length: tokens of a record.
      targets: tokens -> the other argument of the loss.
    """

    config: settings.Config
    make_model: Callable[[nnx.Rngs], nnx.Module]
    loss_fn: Callable[..., Any]
    head: str
    vocabulary: int
    length: int
    targets: Callable[[np.ndarray], np.ndarray]


def texts(config: finetune_text.Config, shape: roberta.RobertaConfig) -> Task:
    return Task(
        config,
        shape.build,
        bench_finetune_text.loss,
        "classifier",
        shape.vocabulary,
        128,
        lambda tokens: (tokens[:, 1] % 2).astype(np.int32),
    )


def plans(shape: llama.LlamaConfig, length: int) -> Task:
    return Task(
        finetune_function_calling.Config(),
        partial(llama.Llama, shape),
        lambda model, tokens, of_plan, rngs: finetune_function_calling.plan_loss(
            model, tokens, of_plan
        ),
        "head",
        shape.vocabulary,
        length,
        lambda tokens: np.arange(tokens.shape[1])[None] >= tokens.shape[1] // 2 + 0 * tokens,
    )


SCANNED = {"scan": True, "remat": True}
TINYLLAMA = replace(llama.CONFIGS["tinyllama"], **SCANNED, dtype=jnp.bfloat16)
ROBERTA = roberta.RobertaConfig(dtype=jnp.bfloat16)
MINILM = bert.BertConfig(hidden=384, intermediate=1536, layers=6, labels=64, dtype=jnp.bfloat16)
TASKS = {
    "minilm": lambda: texts(finetune_text.Config(), MINILM),  # as in bench_finetune_text.py
    "roberta-base": lambda: texts(finetune_glue.Config(rank=8), ROBERTA),
    "tinyllama": lambda: plans(TINYLLAMA, 512),
    "tiny": lambda: plans(replace(llama.CONFIGS["tiny"], **SCANNED), 16),
}


def config_of(task: Task, method: str, args: argparse.Namespace) -> settings.Config:
    """The example's settings for a method."""
    paper = {"optimizer": "natural_galore", "fisher": "window", "residual": "none"}
    settings: dict[str, Any] = paper if method == "window" else {"optimizer": method}
    settings |= {"steps": 1000, "rank": args.rank or task.config.rank}
    if method in bench_finetune_text.METHODS:
        settings |= bench_finetune_text.METHODS[method].settings
    if args.batch_size:
        settings["batch_size"] = args.batch_size
    return replace(task.config, **settings).runs()[0]


def measure(task: Task, args: argparse.Namespace, found: dict[str, Any], save) -> None:
    """Compiles the step of each method; then they take turns."""
    shapes = nnx.eval_shape(lambda: nnx.state(task.make_model(nnx.Rngs(0)), nnx.Param))
    weights, states, steps = nnx.to_pure_dict(shapes), {}, {}
    config = config_of(task, REFERENCE, args)
    length = args.length or task.length
    found |= {"rank": config.rank, "batch_size": config.batch_size, "length": length}
    methods = found.setdefault("methods", {})
    tokens = np.random.default_rng(0).integers(
        3, task.vocabulary, size=(config.batch_size, length), dtype=np.int32
    )
    batch = (np.int32(1), tokens, task.targets(tokens))
    for method in args.methods:
        if time.time() > args.until:
            break
        functions = training.make_functions(
            config_of(task, method, args), task.make_model, weights, task.loss_fn, task.head
        )
        abstract = jax.eval_shape(functions.init, jax.random.key(0))
        start = time.perf_counter()
        steps[method] = functions.train_step.lower(abstract, batch).compile()
        seconds = time.perf_counter() - start
        memory = steps[method].memory_analysis()
        trained = abstract.params["trained"]
        methods[method] = {
            "trained_parameters": sum(x.size for x in jax.tree.leaves(trained)),
            "weights_bytes": run_log.nbytes(abstract.params),
            "state_bytes": run_log.nbytes(abstract.opt_state),
            "temp_bytes": memory.temp_size_in_bytes,
            "total_bytes": memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
            "compile_seconds": round(seconds, 1),
        }
        save()
        if args.steps:
            states[method] = functions.init(jax.random.key(0))

    def step(method: str) -> float:
        start = time.perf_counter()
        states[method], loss = steps[method](states[method], batch)
        methods[method]["loss"] = float(loss)
        jax.block_until_ready(states[method])
        return time.perf_counter() - start

    for method in states:
        methods[method]["first_step_seconds"] = step(method)
    times: dict[str, list[float]] = {method: [] for method in states}
    for turn in range(args.steps):
        for method in states if turn % 2 else reversed(states):
            times[method].append(step(method))
    for method, taken in times.items():
        median = statistics.median(taken) if taken else None
        if median is not None:
            methods[method] |= {
                "steps": len(taken),
                "median_step_seconds": median,
                "tokens_per_second": tokens.size / median,
            }
    for method in states if args.profile else ():
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(args.profile):
                    step(method)
            found = operations(folder).values()
        methods[method] |= {
            "kernels": sum(x.times for x in found) / args.profile,
            "device_ms": sum(x.taken for x in found) / args.profile / 1e3,
        }
    save()


def show(results: dict[str, Any]) -> None:
    """Prints a table for each task."""
    for name, found in results["tasks"].items():
        about = f"rank {found['rank']}, {found['batch_size']} x {found['length']} tokens"
        table = Table(
            *("method", "tokens/s", "to adamw", "step ms", "trained M", "weights MB", "state MB"),
            *("temp MB", "total MB", "to adamw", "compile s"),
            title=f"{name}: {about}",
        )
        adamw = found["methods"].get(REFERENCE, {})
        for method, row in found["methods"].items():
            speed, other = row.get("tokens_per_second"), adamw.get("tokens_per_second")
            total = adamw.get("total_bytes")
            table.add_row(
                method,
                f"{speed:,.0f}" if speed else "-",
                f"{speed / other:.2f}" if speed and other else "-",
                f"{1e3 * row['median_step_seconds']:,.1f}" if speed else "-",
                f"{row['trained_parameters'] / 1e6:,.1f}",
                *(f"{row[f'{k}_bytes'] / 1e6:,.0f}" for k in ("weights", "state", "temp", "total")),
                f"{row['total_bytes'] / total:.2f}" if total else "-",
                f"{row['compile_seconds']:.0f}",
            )
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",")
    parser.add_argument("--tasks", type=words, default=["roberta-base", "tinyllama"])
    parser.add_argument("--methods", type=words, default=list(METHODS))
    parser.add_argument("--rank", type=int, help="by default the example's, 8 for RoBERTa")
    parser.add_argument("--batch-size", type=int, help="records; by default the example's")
    parser.add_argument("--length", type=int, help="tokens of a record")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", type=int, default=0, help="steps to trace")
    parser.add_argument("--minutes", type=float, default=60, help="compile nothing after this time")
    parser.add_argument("--out", type=pathlib.Path, default="runs/finetune.json")
    args = parser.parse_args()
    args.until = time.time() + 60 * args.minutes
    for name, asked, known in (
        ("task", args.tasks, TASKS),
        ("method", args.methods, (*METHODS, *bench_finetune_text.METHODS)),
    ):
        if unknown := [x for x in asked if x not in known]:
            parser.error(f"no {name} {unknown[0]!r}: choose from {', '.join(known)}")
    results: dict[str, Any] = {"environment": environment(), "tasks": {}}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        results = before if before["environment"] == environment() else results
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save = lambda: args.out.write_text(json.dumps(results, indent=1) + "\n")
    for name in args.tasks:
        task = TASKS[name]()
        rank = args.rank or task.config.rank
        called = name if rank == task.config.rank else f"{name}, rank {rank}"
        found = results["tasks"].setdefault(called, {})
        missing = [m for m in args.methods if m not in found.get("methods", {})]
        if missing:
            measure(task, args, found, save)
    show(results)


if __name__ == "__main__":
    main()
