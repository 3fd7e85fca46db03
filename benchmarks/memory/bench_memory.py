"""How many bytes does each optimizer's state take on the paper's Llama sizes?

Counted from shapes, float32 throughout, so the result is the same on any machine. `projected` is
the state of the leaves that GaLore projects, `total` that of all leaves.

    python benchmarks/memory/bench_memory.py [--out benchmarks/results/memory.json]
"""

import argparse
import json
import pathlib

import optax

import natgalore_jax as natgalore
from benchmarks.common.environment import environment
from benchmarks.common.methods import RANKS
from examples.common import llama


SIZES = ("60m", "130m", "350m", "1b", "7b")


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
    moments, all_roles = ("linear", "square"), ("linear", "square", "basis")
    fishers = (*all_roles, "fisher", "root")
    return {
        "adamw": optax.adamw(1.0),
        "galore": natgalore.galore(1.0, rank),
        "natural_galore": natgalore.natural_galore(1.0, rank),
        "natural_galore, core": natgalore.natural_galore(1.0, rank, fisher="core"),
        "natural_galore, window": natgalore.natural_galore(1.0, rank, fisher="window"),
        "natural_galore, window, both": natgalore.natural_galore(
            1.0, rank, fisher="window", side="both"
        ),
        "galore, random": natgalore.galore(1.0, rank, basis="random"),
        "adamw, 8 bits": natgalore.quantized(optax.adamw(1.0), moments),
        "natural_galore, core, 8 bits": natgalore.quantized(
            natgalore.natural_galore(1.0, rank, fisher="core"), moments
        ),
        "natural_galore, core, 8 bits, bases too": natgalore.quantized(
            natgalore.natural_galore(1.0, rank, fisher="core"), all_roles
        ),
        "natural_galore, core, 8 bits, Fishers too": natgalore.quantized(
            natgalore.natural_galore(1.0, rank, fisher="core"), fishers
        ),
        "galore, 8 bits": natgalore.quantized(natgalore.galore(1.0, rank), moments),
        "galore, 8 bits, bases too": natgalore.quantized(natgalore.galore(1.0, rank), all_roles),
        "galore, random, 8 bits": natgalore.quantized(
            natgalore.galore(1.0, rank, basis="random"), moments
        ),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    results: dict = {"environment": environment()}
    for size in SIZES:
        rank = RANKS[size]
        params = llama.abstract_params(llama.CONFIGS[size])
        report = natgalore.memory_report(params, optimizers(rank))
        results[size] = {"rank": rank, "total": report.total, "projected": report.projected}
        print(f"Llama {size}, rank {rank}\n{report}\n")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
