"""What does a refresh cost the steps that do not refresh, and what does a root cost?

Three questions that fixed the engine's scheme, answered on whatever device JAX finds:

1. `scheme`: N unrolled leaves, each projected, moved by Adam's moments and lifted. How much
   slower is a step on which nothing is due when the refresh sits behind one `lax.cond` per
   leaf, one `fori_loop` with traced bounds per leaf, or one outer `lax.cond`, or a loop of no
   turn or one, around either?
2. `root`: (L + λI)^(-1/2) by eigh against the coupled Newton-Schulz iteration, batched.
3. `orth`: Householder QR of an m x r sketch against shifted Cholesky QR.

Timings are medians; compare them within one run only.

    python benchmarks/speed/bench_refresh.py [--quick] [--out benchmarks/results/refresh.json]
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.common.environment import environment
from natgalore_jax.util.linalg import (
    cholesky_qr,
    householder_qr,
    newton_schulz,
    newton_schulz_scales,
)


SKETCHES = ((1024, 128), (1024, 256), (2048, 512), (4096, 1024))
HIGHEST = lax.Precision.HIGHEST
dot = functools.partial(jnp.matmul, precision=HIGHEST)


def refresh(G, P, mu, nu):
    """One turn of block power iteration, and the moments carried over."""
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
    """A loop of no turn or one: unlike a conditional's, its carry stays in place."""

    def scheme(Gs, states, lo, hi):
        turns = (lo < hi).astype(jnp.int32)
        return lax.fori_loop(0, turns, lambda _, s: inner(Gs, s, lo, hi), states)

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


def eigh_root(A):
    w, V = jnp.linalg.eigh(A)
    return dot(V * w[..., None, :] ** -0.5, V.mT)


def timed(f, *args, repeats):
    f = jax.jit(f).lower(*args).compile()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def bench_root(r, batch, repeats, damping=0.1):
    condition = r * (1 + 1 / damping)
    Q = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (batch, r, r)))[0]
    spectrum = 1.0 / jnp.arange(1, r + 1) ** 2
    A = dot(Q * spectrum, Q.mT) + damping * spectrum.mean() * jnp.eye(r)
    exact = dot(Q * (spectrum + damping * spectrum.mean()) ** -0.5, Q.mT)
    row = {"turns": len(newton_schulz_scales(condition))}
    roots = {"newton_schulz": lambda A: newton_schulz(A, condition)[1], "eigh": eigh_root}
    for name, f in roots.items():
        row[f"{name}_ms"] = timed(f, A, repeats=repeats)
        error = jnp.linalg.norm(f(A) - exact) / jnp.linalg.norm(exact)
        row[f"{name}_error"] = float(error)
    print(f"root r={r} batch={batch}", {k: float(f"{v:.3g}") for k, v in row.items()}, flush=True)
    return row


def bench_orth(m, r, repeats):
    Y = jax.random.normal(jax.random.key(2), (m, r))
    row = {
        "householder_ms": timed(householder_qr, Y, repeats=repeats),
        "cholesky_ms": timed(cholesky_qr, Y, repeats=repeats),
    }
    print(f"orth {m}x{r}", {k: round(v, 3) for k, v in row.items()}, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small size, for a laptop")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    parser.add_argument(
        "--only", choices=("scheme", "root", "orth"), help="one question of the three"
    )
    args = parser.parse_args()
    quick = args.quick
    results = {"environment": environment()}

    def save():
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")

    shape, rank = ((64, 96), 16) if quick else ((1024, 2736), 128)
    asked = lambda question: args.only in (None, question)
    for leaves in ((8,) if quick else (50, 224)) if asked("scheme") else ():
        results[f"scheme N={leaves} {shape} r={rank}"] = bench_scheme(
            leaves, shape, rank, 6 if quick else 20
        )
        save()
    for r, batch in (
        (((32, 2),) if quick else itertools.product((128, 256, 512), (1, 24)))
        if asked("root")
        else ()
    ):
        results[f"root r={r} batch={batch}"] = bench_root(r, batch, 4 if quick else 8)
        save()
    for m, r in (((256, 32),) if quick else SKETCHES) if asked("orth") else ():
        results[f"orth {m}x{r}"] = bench_orth(m, r, 4 if quick else 8)
        save()


if __name__ == "__main__":
    main()
