"""Which form of Newton-Schulz orthogonalises a matrix fastest, and how exactly?

Median milliseconds of one call for stacks of m x n matrices, compiled seconds, and the error
|S − U Vᵀ| / |U Vᵀ| of the first matrix against its exact factor in float64 (up to m = 1024). The
matrices are what a projection leaves of Gaussian gradients with m/4 larger directions (`gaussian`),
or of gradients whose singular values fall as 1/i (`harmonic`, for the error alone). `leak` is the
part of S in the span of the projected directions, |PᵀS| / |S|.

    python benchmarks/speed/bench_orthogonalize.py [--out benchmarks/results/orthogonalize.json]
    python benchmarks/speed/bench_orthogonalize.py --sizes 64 --batches 1 --methods muon,gram

    muon      five steps of Muon's coefficients in bfloat16, on X / |X|: this library until 0.2
    direct    `orthogonalised` in float16, X <- q(X Xᵀ) X
    gram      `orthogonalised` in float16, on the m x m Gram matrix
    ... 4     four steps instead of three, for singular values from 0.0092 instead of 0.016
    cubic     six steps of degree 3 in float16, which reach 0.0110
    ... loop  the steps in a loop instead of unrolled, or the reverse
    project   Q − P (PᵀQ), what one re-projection of S would add

`crossover` in the results is, for each m, the ratio n/m from which `gram` is the faster form:
GRAM_FROM of natgalore_jax/util/orthogonalize.py. Results are written as they come;
cases that --out holds for the same machine are not measured again.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.environment import environment
from benchmarks.common.muon import newton_schulz
from natgalore_jax.util.orthogonalize import orthogonalised


FOUR = (  # minimax_steps(0.0092, 4) of tests/oracle/oracles.py
    (8.0488, -23.0631, 16.7064),
    (3.6519, -2.6802, 0.5154),
    (2.7219, -1.9934, 0.4408),
    (1.9715, -1.3404, 0.3745),
)
CUBIC = (  # minimax_steps(0.0110, 6, degree=3)
    (4.9766, -4.8254),
    (2.4341, -0.6130),
    (2.2594, -0.5908),
    (1.9657, -0.5531),
    (1.6569, -0.5128),
    (1.5114, -0.4943),
)
RATIOS = (1.0, 2.67, 4.0)
RANK = 4  # m / r
ERROR_UP_TO = 1024  # m: a float64 SVD of 1024 x 4096 takes seconds
SECONDS = 0.3  # of calls per case
FLOPS = 1.5e14  # of one call; larger cases are skipped


def muon(X):
    X, wide = X / jnp.linalg.norm(X, axis=(-2, -1), keepdims=True), X.dtype
    return newton_schulz(X.astype(jnp.bfloat16)).astype(wide)


def cubic(X):
    """The direct form with polynomials of degree 3."""
    wide, X = X.dtype, X.astype(jnp.float16)
    A = jnp.matmul(X, X.mT, preferred_element_type=wide)
    s = jnp.sqrt(jnp.sqrt(jnp.square(A).sum(axis=(-2, -1), keepdims=True)))
    A = (A / s**2).astype(X.dtype)
    for i, (a, b) in enumerate(CUBIC):
        q = (a * jnp.eye(A.shape[-1]) + b * A) / (s if i == 0 else 1.0)
        X = jnp.matmul(q.astype(X.dtype), X, preferred_element_type=wide)
        if i < len(CUBIC) - 1:
            X = X.astype(A.dtype)
            A = X @ X.mT
    return X


def ours(gram: bool, dtype: Any = jnp.float16, **settings: Any):
    return lambda X: orthogonalised(X, 0.0, dtype=dtype, gram=gram, **settings)


METHODS = {
    "muon": muon,
    "direct": ours(False),
    "gram": ours(True),
    "direct 4": ours(False, coefficients=FOUR),
    "gram 4": ours(True, coefficients=FOUR),
    "direct loop": ours(False, unroll=False),
    "gram loop": ours(True, unroll=False),
    "direct bfloat16": ours(False, jnp.bfloat16),
    "gram bfloat16": ours(True, jnp.bfloat16),
    "cubic": cubic,
}
EVERYWHERE = ("muon", "direct", "gram")
OTHERS_AT = (1024, 2048)  # m at which the other methods are measured too


def flops(m: int, n: int, batch: int) -> float:
    return batch * (20.0 * m * m * n + 10.0 * m**3)


@functools.partial(jax.jit, static_argnames=("shape", "kind"))
def residual(shape: tuple[int, int, int], kind: str) -> tuple[jax.Array, jax.Array]:
    """T = G − P PᵀG for the leading directions P, and P, which all matrices of the stack share."""
    _, m, n = shape
    r = m // RANK
    left, right, noise = jax.random.split(jax.random.key(0), 3)
    if kind == "harmonic":
        U = jnp.linalg.qr(jax.random.normal(left, (m, m)))[0]
        V = jnp.linalg.qr(jax.random.normal(right, (n, m)))[0]
        P, T = U[:, :r], (U[:, r:] / jnp.arange(r + 1, m + 1)[None]) @ V[:, r:].T
        T = jnp.broadcast_to(T, shape)
    else:
        P = jnp.linalg.qr(jax.random.normal(left, (m, r)))[0]
        T = jax.random.normal(noise, shape)
    T = T - jnp.matmul(P, jnp.matmul(P.T, T, precision="highest"), precision="highest")
    # A norm of 5: in float16's range, as whitened() has it.
    return 5 * T / jnp.linalg.norm(T, axis=(-2, -1), keepdims=True), P


def errors(S: jax.Array, T: np.ndarray, P: np.ndarray) -> dict[str, float]:
    """Of one matrix, against the factor of its m − r singular directions in float64."""
    U, _, V = np.linalg.svd(T.astype(np.float64), full_matrices=False)
    kept = len(T) - P.shape[1]
    exact, S = U[:, :kept] @ V[:kept], np.asarray(S, np.float64)
    size = np.linalg.norm(exact)
    return {
        "error": float(np.linalg.norm(S - exact) / size),
        "leak": float(np.linalg.norm(P.T @ S) / size),
    }


def timed(f, *args) -> float:
    """Median milliseconds of a compiled call."""
    call = lambda: jax.block_until_ready(f(*args))
    call()
    start = time.perf_counter()
    call()
    times = []
    for _ in range(max(3, min(30, int(SECONDS / (time.perf_counter() - start))))):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def project(Q, P):
    return Q - P @ (P.mT @ Q)


def measure(batch: int, m: int, n: int, methods: list[str]) -> dict[str, Any]:
    X, P = residual((batch, m, n), "gaussian")
    row: dict[str, Any] = {"batch": batch, "m": m, "n": n, "methods": {}}

    def program(name):
        start = time.perf_counter()
        compiled = jax.jit(METHODS[name]).lower(X).compile()
        return compiled, time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        programs = dict(zip(methods, pool.map(program, methods), strict=True))
    for name, (compiled, seconds) in programs.items():
        row["methods"][name] = {"ms": timed(compiled, X), "compile_seconds": round(seconds, 2)}
    Q = jnp.ones((batch, m, m), jnp.float16)
    row["project_ms"] = timed(
        jax.jit(project), Q, jnp.broadcast_to(P, (batch, *P.shape)).astype(Q.dtype)
    )
    if batch == 1 and m <= ERROR_UP_TO:
        for kind in ("gaussian", "harmonic"):
            T, P = residual((1, m, n), kind)
            for name in methods:
                if name in programs:
                    S = programs[name][0](T)[0]
                    row["methods"][name][kind] = errors(S, np.asarray(T[0]), np.asarray(P))
    return row


def crossover(rows: list[dict[str, Any]]) -> dict[str, float]:
    """For each m, the least n/m at which `gram` is as fast as `direct`.

    Interpolated between the ratios measured; the median over batches.
    """
    found: dict[str, list[float]] = {}
    order = lambda row: (row["m"], row["batch"], row["n"])
    for before, after in itertools.pairwise(sorted(rows, key=order)):
        if order(before)[:2] != order(after)[:2]:
            continue
        (x, slower), (y, faster) = (
            (row["n"] / row["m"], row["methods"]["gram"]["ms"] - row["methods"]["direct"]["ms"])
            for row in (before, after)
        )
        if slower > 0 >= faster:
            crossing = x + (y - x) * slower / (slower - faster)
            found.setdefault(str(before["m"]), []).append(crossing)
    return {m: round(statistics.median(crossings), 2) for m, crossings in found.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda x: [int(part) for part in x.split(",")]
    words = lambda x: x.split(",")
    parser.add_argument("--sizes", type=numbers, default=[1024, 2048, 512, 4096, 8192], help="m")
    parser.add_argument("--batches", type=numbers, default=[24, 8, 1])
    parser.add_argument("--methods", type=words, default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after this time")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    results: dict[str, Any] = {"environment": environment(), "cases": []}
    if args.out and args.out.exists():
        recorded = json.loads(args.out.read_text())
        results = recorded if recorded["environment"] == results["environment"] else results
    done = {(row["batch"], row["m"], row["n"]) for row in results["cases"]}
    for m, batch, ratio in itertools.product(args.sizes, args.batches, RATIOS):
        n = int(ratio * m)
        if (batch, m, n) in done or flops(m, n, batch) > FLOPS or time.time() > until:
            continue
        everything = m in OTHERS_AT or args.sizes == [m]
        methods = [name for name in args.methods if everything or name in EVERYWHERE]
        results["cases"].append(measure(batch, m, n, methods))
        if {"gram", "direct"} <= set(methods):
            results["crossover"] = crossover(results["cases"])
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        row = results["cases"][-1]
        times = {name: float(f"{of['ms']:.3g}") for name, of in row["methods"].items()}
        print(f"{batch} x {m} x {n}: {times}, project {row['project_ms']:.3g}", flush=True)
    print("gram is faster from n/m =", results.get("crossover"))


if __name__ == "__main__":
    main()
