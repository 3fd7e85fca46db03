"""Does the residual's orthogonalisation change what is learned?

bench_convergence.py with Muon's five Newton-Schulz steps in bfloat16 in place of the library's
three minimax steps, with two, or with the library's own, for the comparison on one machine:

    python benchmarks/learning/bench_muon_steps.py muon --methods natural_galore --rate 0.0025 \\
        --seeds 2 --steps 2000 --rest-rate 0.016 --out benchmarks/results/muon-steps.jsonl

    python benchmarks/learning/bench_muon_steps.py two --size toy --dataset wheels \\
        --vocabulary 8192 --batch 8 --length 128 --steps 300 --methods natural_galore \\
        --rate 0.005 --rest-rate 0.004 --seeds 3 --dtype float32 \\
        --out benchmarks/results/muon-steps.jsonl

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


STEPS = ("own", "muon", "two")
TWO = ((6.2871, -16.2858, 11.4358), (2.3473, -1.6864, 0.4086))  # oracles.minimax_steps(0.066, 2)


def five_steps(X, ridge=0.0):
    """Five steps on X / (|X|² + ridge)^½, the short side first."""
    if X.shape[-2] > X.shape[-1]:
        return five_steps(X.mT, ridge).mT
    square = jnp.square(X).sum(axis=(-2, -1), keepdims=True) + ridge
    unit = X / jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return newton_schulz(unit.astype(jnp.bfloat16)).astype(X.dtype)


def two_steps(X, ridge=0.0):
    """Two minimax steps on X over its Schatten 8-norm: a third fewer products than three steps.

    Singular values of at least 0.066 of the norm end within 15 % of 1, and smaller ones grow 15
    times; the library's three steps, over the 4-norm, have 0.016 and 61.
    """
    if X.shape[-2] > X.shape[-1]:
        return two_steps(X.mT, ridge).mT
    A = X @ X.mT
    square = jnp.square(X).sum(axis=(-2, -1), keepdims=True)
    ratio = jnp.sqrt(jnp.linalg.norm(A @ A, axis=(-2, -1), keepdims=True))
    ratio /= jnp.where(square > 0, square, 1.0)
    X /= jnp.sqrt(jnp.where(square > 0, (square + ridge) * ratio, 1.0))
    for a, b, c in TWO:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in STEPS:
        sys.exit(f"error: the first argument is one of {', '.join(STEPS)}.\n{__doc__}")
    steps = sys.argv.pop(1)
    if "--out" not in sys.argv:
        sys.exit("error: --out names the file of results.")
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    projection.polar = {"muon": five_steps, "two": two_steps}.get(steps, projection.polar)
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
