"""Does the residual's orthogonalisation change what is learned?

bench_convergence.py with Muon's five Newton-Schulz steps in bfloat16 in place of the library's
three minimax steps, or with the library's own, for the comparison on one machine:

    python benchmarks/learning/bench_muon_steps.py muon --methods natural_galore --rate 0.0025 \\
        --seeds 2 --steps 2000 --rest-rate 0.016 --out benchmarks/results/muon-steps.jsonl

All arguments but the first are those of bench_convergence.py; each line of the results gets the
name of its steps as `steps`.
"""

import json
import pathlib
import sys

import jax.numpy as jnp

from benchmarks.common.muon import newton_schulz
from benchmarks.learning import bench_convergence
from natgalore_jax.subspace import projection


STEPS = ("own", "muon")


def five_steps(X, ridge=0.0):
    """Five steps on X / (|X|² + ridge)^½, the short side first."""
    if X.shape[-2] > X.shape[-1]:
        return five_steps(X.mT, ridge).mT
    square = jnp.square(X).sum(axis=(-2, -1), keepdims=True) + ridge
    unit = X / jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return newton_schulz(unit.astype(jnp.bfloat16)).astype(X.dtype)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in STEPS:
        sys.exit(f"error: the first argument is one of {', '.join(STEPS)}.\n{__doc__}")
    steps = sys.argv.pop(1)
    if "--out" not in sys.argv:
        sys.exit("error: --out names the file of results.")
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    if steps == "muon":
        projection.polar = five_steps
    known = out.read_text().splitlines() if out.exists() else []
    out.unlink(missing_ok=True)  # runs of the other steps would count as done
    try:
        bench_convergence.main()
    finally:
        new = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        lines = [*known, *(json.dumps({"steps": steps} | row) for row in new)]
        out.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
