"""How many bytes do weights, gradients and optimizer state of a Llama take?

Counted from shapes, with stacked layers: the same on any machine. For --compiled sizes a float32
training step with recomputed layers is compiled too, and the temporaries (gradients included) that
this machine's compiler allocates are recorded. Nothing is run.

    python benchmarks/memory/bench_bytes.py [--out benchmarks/results/bytes.json]
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import natgalore_jax as natgalore
from benchmarks.common.environment import environment
from benchmarks.common.llama_step import llama_step
from benchmarks.common.methods import RANKS
from examples.common import llama
from natgalore_jax.planning import model_shapes as shapes
from natgalore_jax.planning.byte_counts import byte_count_of, state_of, temporaries


class Method(NamedTuple):
    """An optimizer as a function of the rank, and whether its gradients are cores."""

    make: Callable[[int], optax.GradientTransformation]
    low_rank_gradients: bool = False


def galore(rank: int) -> optax.GradientTransformation:
    return natgalore.galore(1e-3, rank, stagger=False)


def in_8_bits(rank: int) -> optax.GradientTransformation:
    return natgalore.quantized(galore(rank), ("linear", "square", "basis"))


METHODS = {
    "AdamW": Method(lambda rank: optax.adamw(1e-3)),
    "8-bit AdamW": Method(lambda rank: natgalore.quantized(optax.adamw(1e-3))),
    "GaLore": Method(galore),
    "GaLore, low-rank gradients": Method(galore, True),
    "GaLore in 8 bits, low-rank gradients": Method(in_8_bits, True),
}


def step_of(method: Method, size: str, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The training step of a Llama with scanned and recomputed layers."""
    config = dataclasses.replace(llama.CONFIGS[size], scan=True, remat=True)
    return llama_step(tx, config, method.low_rank_gradients)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",") if text else []
    parser.add_argument("--sizes", type=words, default=["1b", "7b"])
    parser.add_argument("--compiled", type=words, default=["1b"], help="sizes, or '' for none")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens, of one sequence")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(), "tokens": args.seq_len}
    for size in args.sizes:
        rank = RANKS[size]
        found = results[size] = {"rank": rank}
        for dtype in ("float32", "bfloat16"):
            params = shapes.llama(size, dtype)
            found[dtype] = {
                name: byte_count_of(method.make(rank), params, method.low_rank_gradients).bytes
                for name, method in METHODS.items()
            }
            for name, counted in found[dtype].items():
                parts = ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in counted.items())
                print(f"Llama {size}, rank {rank}, {dtype}, {name}: {parts} GB", flush=True)
        if size in args.compiled:
            params = shapes.llama(size)
            tokens = jax.ShapeDtypeStruct((1, args.seq_len + 1), np.int32)
            found["temporaries"] = {}
            for name, method in METHODS.items():
                tx = method.make(rank)
                state, _, _ = state_of(tx, params)
                size_bytes = temporaries(step_of(method, size, tx), params, state, tokens)
                found["temporaries"][name] = size_bytes
                print(
                    f"Llama {size}, compiled, {name}: {size_bytes / 1e9:.2f} GB temporary",
                    flush=True,
                )
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
