"""What does a step of a small model cost if the host need not wait for the device?

A GPU's host waits for the value of every condition of a program. A step of AdamW has none, so the
host prepares the next step while the device computes. A projection has the condition of its
refreshes in every step, unless `update` has the argument `refresh_bases`: then steps with and
without refreshes are two programs. Each optimizer takes blocks of steps in turn, and the host waits
only at the end of a block.

    python benchmarks/speed/bench_async.py [--out benchmarks/results/async.json]
    python benchmarks/speed/bench_async.py --size 130m --methods adamw,galore,galore_two_programs
    python benchmarks/speed/bench_async.py --size tiny --seq-len 16 --batch 2 --turns 1    quick

Methods are those of bench_step.py. `_two_programs` after a name: `stagger=False`, and
`refresh_bases`, true on every --refresh-every-th step.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.common.llama_step import llama_step
from benchmarks.common.methods import METHODS, RANKS, REFERENCE, ours
from examples.common import llama


TWO = "_two_programs"
RECIPES = ("galore", "natural_galore")
SETTINGS = ("size", "batch", "seq_len", "dtype", "refresh_every", "turns")


class Trainer:
    """A model and its optimizer; `run` takes steps, and waits for the device at their end."""

    def __init__(self, name: str, args: argparse.Namespace):
        settings = {"scan": True, "dtype": jnp.dtype(args.dtype)}
        config = dataclasses.replace(llama.CONFIGS[args.size], **settings)
        recipe = name.removesuffix(TWO)
        make = METHODS[name] if recipe == name else ours(recipe, stagger=False)
        tx = make(RANKS[args.size], args.refresh_every, 0.0)
        step = jax.jit(
            llama_step(tx, config, False),
            static_argnames="refresh_bases",
            donate_argnames=("params", "state"),
        )
        model = llama.Llama(config, nnx.Rngs(0))
        self.params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self.state = tx.init(self.params)
        draw = np.random.default_rng(0).integers
        self.tokens = jnp.asarray(draw(config.vocabulary, size=(args.batch, args.seq_len + 1)))
        self.every, self.count = args.refresh_every, 0
        arguments = (self.params, self.state, self.tokens)
        compiled = lambda **extra: step.lower(*arguments, **extra).compile()
        self.programs = (
            {None: compiled()}
            if recipe == name
            else {due: compiled(refresh_bases=due) for due in (True, False)}
        )

    def run(self, steps: int) -> float:
        """Seconds of the steps."""
        start = time.perf_counter()
        for _ in range(steps):
            due = self.count % self.every == 0 if len(self.programs) > 1 else None
            program = self.programs[due]
            self.params, self.state, _ = program(self.params, self.state, self.tokens)
            self.count += 1
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of each method, in blocks and waiting after each step."""
    trainers = {}
    for name in args.methods:
        start = time.perf_counter()
        trainers[name] = Trainer(name, args)
        trainers[name].run(args.refresh_every)  # and the first, slower executions
        print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    blocks: dict[str, list[float]] = {name: [] for name in trainers}
    waited: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(args.turns):
        for name in list(trainers)[:: 1 if turn % 2 else -1]:
            blocks[name].append(trainers[name].run(args.refresh_every) / args.refresh_every)
            single = [trainers[name].run(1) for _ in range(args.refresh_every)]
            waited[name].append(statistics.mean(single))
    return {
        name: {
            "block_step_seconds": statistics.median(blocks[name]),
            "waited_step_seconds": statistics.median(waited[name]),
        }
        for name in trainers
    }


def show(args: argparse.Namespace, found: dict[str, Any]) -> None:
    table = Table(
        *("method", "step ms", "to adamw", "waiting after each ms", "to adamw"),
        title=f"Llama {args.size}, {args.batch} x {args.seq_len} tokens",
    )
    for name, row in found.items():
        cells = []
        for kind in ("block_step_seconds", "waited_step_seconds"):
            of = found.get(REFERENCE, {}).get(kind)
            cells += [f"{1e3 * row[kind]:.2f}", f"{row[kind] / of:.2f}" if of else "-"]
        table.add_row(name, *cells)
    Console(width=120).print(table)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",")
    default = [REFERENCE, *RECIPES, *(name + TWO for name in RECIPES)]
    parser.add_argument("--size", choices=RANKS, default="60m")
    parser.add_argument("--methods", type=words, default=default)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of each")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--refresh-every", type=int, default=50, help="and steps of a block")
    parser.add_argument("--turns", type=int, default=6, help="blocks of each method")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    known = (*METHODS, *(name + TWO for name in RECIPES))
    if unknown := [name for name in args.methods if name not in known]:
        parser.error(f"no method {unknown[0]!r}: choose from {', '.join(known)}")
    found = measure(args)
    show(args, found)
    if args.out:
        settings = {name: getattr(args, name) for name in SETTINGS}
        results = {"environment": environment(), "settings": settings, "methods": found}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
