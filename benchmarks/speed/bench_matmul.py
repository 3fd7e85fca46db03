"""Which arithmetic should projection and back-projection use?

For R = PᵀG (`down`) and W + P U + a W (`up`) at the sizes of Llama's matrices, in every arithmetic
that the device's compiler offers: median time, the time of an elementwise pass over the large
arrays (`pass`), and relative error against float64.

    python benchmarks/speed/bench_matmul.py [--out benchmarks/results/matmul.json]
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.common.environment import environment


SIZES = {  # m, n, rank, layers in a stack
    "60m": (512, 1376, 128, 8),
    "350m": (1024, 2736, 256, 24),
    "1b": (2048, 5461, 512, 24),
}
ARITHMETICS = {
    "default": lax.Precision.DEFAULT,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
    **{
        name: getattr(lax.DotAlgorithmPreset, name)
        for name in ("TF32_TF32_F32", "TF32_TF32_F32_X3", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6")
    },
}


def split_down(P, G):
    """PᵀG for an exact bfloat16 G, with P as a sum of two bfloat16 parts."""
    high = lax.reduce_precision(P, 8, 7)
    dot = lambda part: jnp.matmul(
        part.astype(jnp.bfloat16).mT, G, preferred_element_type=jnp.float32
    )
    return dot(high) + dot(P - high)


def timed(f, *args, repeats: int) -> tuple[float, jax.Array]:
    f = jax.jit(f).lower(*args).compile()
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        out = jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:]), out


def error(x: jax.Array, exact: np.ndarray) -> float:
    """Relative error of the first matrix of a stack in the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(x[0], np.float64) - exact) / np.linalg.norm(exact))


def measure(m: int, n: int, r: int, layers: int, dtype, repeats: int) -> dict:
    keys = jax.random.split(jax.random.key(0), 4)
    G = jax.random.normal(keys[0], (layers, m, n)).astype(dtype)
    W = jax.random.normal(keys[1], (layers, m, n)).astype(dtype)
    P = jax.jit(jax.vmap(lambda k: jnp.linalg.qr(jax.random.normal(k, (m, r)))[0]))(
        jax.random.split(keys[2], layers)
    )
    U = 1e-3 * jax.random.normal(keys[3], (layers, r, n))
    first = lambda x: np.asarray(x[0], np.float64)
    exact = {"down": first(P).T @ first(G), "up": first(P) @ first(U)}

    def down(precision):
        return lambda P, G: jnp.matmul(P.mT, G.astype(jnp.float32), precision=precision)

    def up(precision):
        dot = lambda P, U: jnp.matmul(P, U, precision=precision)
        return lambda W, P, U: W + (dot(P, U) - 1e-4 * W).astype(W.dtype)

    def product(precision):
        return lambda P, U: jnp.matmul(P, U, precision=precision)

    row: dict = {
        "pass": {
            "down_ms": timed(lambda G: jnp.abs(G).max(), G, repeats=repeats)[0],
            "up_ms": timed(lambda W: 1.001 * W, W, repeats=repeats)[0],
        }
    }
    for name, precision in ARITHMETICS.items():
        try:
            down_ms, R = timed(down(precision), P, G, repeats=repeats)
            up_ms, _ = timed(up(precision), W, P, U, repeats=repeats)
            full = jax.jit(product(precision))(P[:1], U[:1])
            row[name] = {
                "down_ms": down_ms,
                "up_ms": up_ms,
                "down_error": error(R, exact["down"]),
                "up_error": error(full, exact["up"]),
            }
        except Exception as problem:  # of many types: not every compiler has every arithmetic
            row[name] = {"does not run": str(problem).splitlines()[0][:200]}
    if dtype == jnp.bfloat16:
        down_ms, R = timed(split_down, P, G, repeats=repeats)
        row["split"] = {"down_ms": down_ms, "down_error": error(R, exact["down"])}
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=lambda x: x.split(","), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    results: dict = {"environment": environment()}
    for size in args.sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            row = measure(*SIZES[size], dtype, args.repeats)
            results[f"{size}, {jnp.dtype(dtype).name}"] = row
            print(f"\n{size}, {jnp.dtype(dtype).name}: m, n, rank, layers = {SIZES[size]}")
            for name, figures in row.items():
                print(
                    f"  {name:18s}",
                    {
                        k: float(f"{v:.3g}") if k != "does not run" else v
                        for k, v in figures.items()
                    },
                    flush=True,
                )
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
