"""What does a conditional refresh cost the steps that do not refresh?

N unrolled leaves, each projected, updated by Adam's moments and projected back. A refresh stands
behind one `lax.cond` per leaf, one `fori_loop` with traced bounds per leaf, or either of these
inside one outer `lax.cond` or a `fori_loop` of zero or one iteration. Times are medians; compare
them within one run only.

    python benchmarks/speed/bench_refresh.py [--quick] [--out runs/refresh.json]
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.common.environment import environment


dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def refresh(G, P, mu, nu):
    """One step of block power iteration; the moments are rotated to the new basis."""
    new, _ = jnp.linalg.qr(dot(G, dot(G.mT, P)))
    C = dot(new.mT, P)
    return new, dot(C, mu), dot(C * C, nu)


def cond_per_leaf(Gs, states, lo, hi):
    return [
        lax.cond((lo <= i) & (i < hi), lambda G, s: refresh(G, *s), lambda G, s: s, G, s)
        for i, (G, s) in enumerate(zip(Gs, states, strict=True))
    ]


def loop_per_leaf(Gs, states, lo, hi):
    return [
        lax.fori_loop(
            jnp.maximum(lo, i), jnp.minimum(hi, i + 1), lambda _, s, G=G: refresh(G, *s), s
        )
        for i, (G, s) in enumerate(zip(Gs, states, strict=True))
    ]


def outer(inner):
    def scheme(Gs, states, lo, hi):
        return lax.cond(lo < hi, inner, lambda Gs, states, lo, hi: states, Gs, states, lo, hi)

    return scheme


def outer_loop(inner):
    """A loop of zero or one iteration: unlike a conditional's, its carry stays in place."""

    def scheme(Gs, states, lo, hi):
        iterations = (lo < hi).astype(jnp.int32)
        return lax.fori_loop(0, iterations, lambda _, s: inner(Gs, s, lo, hi), states)

    return scheme


SCHEMES = {
    "never": lambda Gs, states, lo, hi: states,
    "cond per leaf": cond_per_leaf,
    "fori_loop per leaf": loop_per_leaf,
    "outer cond, cond per leaf": outer(cond_per_leaf),
    "outer cond, fori_loop per leaf": outer(loop_per_leaf),
    "outer fori_loop, cond per leaf": outer_loop(cond_per_leaf),
    "outer fori_loop, fori_loop per leaf": outer_loop(loop_per_leaf),
}


def step(scheme, Gs, states, lo, hi):
    updates, new = [], []
    for G, (P, mu, nu) in zip(Gs, scheme(Gs, states, lo, hi), strict=True):
        R = dot(P.mT, G)
        mu, nu = 0.9 * mu + 0.1 * R, 0.999 * nu + 0.001 * R * R
        updates.append(dot(P, mu / (jnp.sqrt(nu) + 1e-8)))
        new.append((P, mu, nu))
    return updates, new


def bench_scheme(leaves, shape, rank, repeats):
    m, n = shape
    keys = jax.random.split(jax.random.key(0), leaves)
    Gs = [jax.random.normal(k, (m, n)) for k in keys]
    rows = {}
    for name, scheme in SCHEMES.items():
        fresh = lambda: [
            (jnp.eye(m, rank), jnp.zeros((rank, n)), jnp.zeros((rank, n))) for _ in range(leaves)
        ]
        states, zero = fresh(), jnp.int32(0)
        start = time.perf_counter()
        program = (
            jax.jit(functools.partial(step, scheme), donate_argnums=1)
            .lower(Gs, states, zero, zero)
            .compile()
        )
        compile_s = time.perf_counter() - start
        memory = program.memory_analysis()

        def run(lo, hi):
            nonlocal states
            times = []
            for _ in range(repeats):
                jax.block_until_ready(states)
                start = time.perf_counter()
                updates, states = program(Gs, states, jnp.int32(lo), jnp.int32(hi))  # noqa: B023
                jax.block_until_ready((updates, states))
                times.append(time.perf_counter() - start)
            return 1e3 * statistics.median(times[2:])

        rows[name] = {
            "hot_ms": run(0, 0),
            "one_due_ms": run(3, 4) if name != "never" else None,
            "all_due_ms": run(0, leaves) if name != "never" else None,
            "compile_s": compile_s,
            "temp_MB": memory.temp_size_in_bytes / 1e6,
            "alias_MB": memory.alias_size_in_bytes / 1e6,
        }
        print(
            f"N={leaves:4d} {name:32s}",
            {k: v and round(v, 2) for k, v in rows[name].items()},
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small size, for a laptop")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    results = {"environment": environment()}
    shape, rank, repeats = ((64, 96), 16, 6) if args.quick else ((1024, 2736), 128, 20)
    for leaves in (8,) if args.quick else (50, 224):
        results[f"N={leaves} {shape} r={rank}"] = bench_scheme(leaves, shape, rank, repeats)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
