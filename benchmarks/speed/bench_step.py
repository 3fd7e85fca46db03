"""What does an optimizer's update cost, without a refresh and at its slowest?

Only the update is timed: gradients, state and weights in, weights and state out, donated. The
methods take turns, step by step, on one set of random gradients, so that disturbances affect all
alike; compare times within one tree only. All steps after step 0 form one refresh period. `hot` is
the time of a step without refresh: the lower quartile, since by default half of the steps refresh a
matrix or two. `refreshes` is the sum of all time above that. Bytes are the compiled program's.

    python benchmarks/speed/bench_step.py [--out benchmarks/results/step.json]
    python benchmarks/speed/bench_step.py --trees tiny --methods galore,adamw    a quick run
    python benchmarks/speed/bench_step.py --scaling    over widths, ranks and depths

A tree is a size of examples/common/llama.py, optionally with another number of layers, as in
350m/4; its layers are separate (unrolled) or stacked (scanned). Results are written as they come.
Trees that --out already holds for the same settings and machine are not measured again.
"""

import argparse
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.common.environment import environment
from benchmarks.common.methods import METHODS, RANKS, REFERENCE, UNROLLED_ONLY
from examples.common import llama


class Stepper:
    """One method on one tree: its compiled update, weights and state."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        def update(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        abstract = jax.eval_shape(tx.init, params)
        program = jax.jit(update, donate_argnums=(0, 1))
        start = time.perf_counter()
        lowered = program.lower(params, abstract, params)
        self.trace_seconds = time.perf_counter() - start
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.weights = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        self.state = jax.jit(tx.init)(self.weights)
        self.times: list[float] = []

    def step(self, grads: Any) -> None:
        start = time.perf_counter()
        self.weights, self.state = self.program(self.weights, self.state, grads)
        jax.block_until_ready((self.weights, self.state))
        self.times.append(time.perf_counter() - start)

    def facts(self) -> dict[str, float]:
        memory = self.program.memory_analysis()
        return {
            "trace_seconds": round(self.trace_seconds, 2),
            "compile_seconds": round(self.compile_seconds, 2),
            "temp_bytes": memory.temp_size_in_bytes,
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(self.state)),
        }

    def figures(self, every: int) -> dict[str, float]:
        period = self.times[-every:]
        hot = statistics.quantiles(period, n=4)[0]
        return {
            "steps": len(self.times),
            "hot_ms": 1e3 * hot,
            "median_ms": 1e3 * statistics.median(period),
            "mean_ms": 1e3 * statistics.mean(period),
            "slowest_ms": 1e3 * max(period),
            "refreshes_ms": 1e3 * sum(t - hot for t in period if t > 1.1 * hot),
            "first_ms": 1e3 * self.times[0],
        }


def params_of(tree: str, scan: bool, dtype: Any) -> tuple[Any, int]:
    """The shapes of a tree's weights, and the rank for its size."""
    size, _, layers = tree.partition("/")
    config = llama.CONFIGS[size]
    config = replace(config, scan=scan, layers=int(layers) if layers else config.layers)
    shapes = llama.abstract_params(config)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes), RANKS[size]


def random_like(params: Any) -> Any:
    """Normally distributed gradients with the shapes and dtypes of the weights."""

    @jax.jit
    def one(key, x):
        return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)

    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(
        [one(k, jnp.zeros(x.shape, x.dtype)) for k, x in zip(keys, leaves, strict=True)]
    )


def measure(row: dict[str, Any], params: Any, rank: int, args, save: Callable[[], None]) -> None:
    """Times all methods on one tree, in turns."""
    methods = row.setdefault("methods", {})
    grads, steppers = random_like(params), {}
    for name in args.methods:
        if row["scan"] and name in UNROLLED_ONLY:
            continue
        try:
            tx = METHODS[name](rank, args.refresh_every, args.weight_decay)
            steppers[name] = Stepper(tx, params)
            methods[name] = steppers[name].facts()
        except Exception as error:  # of many types, from a compiler or a method
            methods[name] = {"does not run": str(error).splitlines()[0]}
        save()
    gc.collect()  # collecting the compiler's garbage takes 0.2 s, which must not fall in a step
    gc.freeze()
    for turn in range(1 + args.refresh_every):
        for stepper in list(steppers.values())[:: 1 if turn % 2 else -1]:
            stepper.step(grads)
    for name, stepper in steppers.items():
        methods[name] |= stepper.figures(args.refresh_every)
    save()


def show(row: dict[str, Any]) -> None:
    reference = row["methods"].get(REFERENCE, {}).get("hot_ms")
    about = f"rank {row['rank']}, {row['layers']}, {row['dtype']}, weight decay {row['decay']}"
    print(f"\n{row['tree']}, {about}")
    print(
        f"{'':22s} {'hot ms':>8s} {'/ ' + REFERENCE:>8s} {'mean ms':>8s} {'slowest/median':>15s} "
        f"{'refreshes ms':>13s} {'compile s':>10s} {'temp MB':>8s} {'state MB':>9s}"
    )
    for name, of in row["methods"].items():
        if "hot_ms" not in of:
            print(f"{name:22s} {of.get('does not run', 'not measured')}")
            continue
        ratio = of["hot_ms"] / reference if reference else float("nan")
        print(
            f"{name:22s} {of['hot_ms']:8.2f} {ratio:8.2f} {of['mean_ms']:8.2f} "
            f"{of['slowest_ms'] / of['median_ms']:15.2f} "
            f"{of['refreshes_ms']:13.1f} {of['compile_seconds']:10.1f} "
            f"{of['temp_bytes'] / 1e6:8.1f} {of['state_bytes'] / 1e6:9.1f}",
            flush=True,
        )


SCALING = {  # one stack of square matrices: width, rank and layers
    "width": [(width, 128, 4) for width in (512, 1024, 2048, 4096, 8192)],
    "rank": [(2048, rank, 4) for rank in (64, 128, 256, 512, 1024)],
    "layers": [(1024, 128, layers) for layers in (4, 10, 20, 40, 80)],
}


def scaling(args, save: Callable[[], None], results: dict[str, Any]) -> None:
    """Steps and refreshes of galore and natural_galore over growing problems."""
    for along, points in SCALING.items():
        rows = results["scaling"].setdefault(along, [])
        for width, rank, layers in points[len(rows) :]:
            shape = (layers, width, width)
            params = {"layers": {"up": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}}
            row: dict[str, Any] = {"width": width, "rank": rank, "layers": layers, "scan": True}
            measure(row, params, rank, args, lambda: None)
            rows.append(row)
            save()
            times = {name: f"{of['hot_ms']:.2f} ms" for name, of in row["methods"].items()}
            print(f"width {width}, rank {rank}, {layers} layers: {times}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda x: x.split(",")
    parser.add_argument("--trees", type=words, default=["60m", "350m/4"])
    parser.add_argument("--methods", type=words, default=list(METHODS))
    parser.add_argument("--layers", choices=["unrolled", "scanned", "both"], default="both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument(
        "--refresh-every", type=int, default=200, help="also the number of steps after step 0"
    )
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument(
        "--scaling", action="store_true", help="measure over sizes instead of trees"
    )
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"no method {unknown[0]!r}: choose from {', '.join(METHODS)}")
    about: dict[str, Any] = {"environment": environment(), "refresh_every": args.refresh_every}
    results: dict[str, Any] = about | {"trees": [], "scaling": {}}
    if args.out and args.out.exists():
        recorded = json.loads(args.out.read_text())
        same = all(recorded.get(key) == value for key, value in about.items())
        results = recorded if same else results

    def save():
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")

    if args.scaling:
        args.methods = [m for m in args.methods if m in ("adamw", "galore", "natural_galore")]
        scaling(args, save, results)
        return
    both = lambda choice, first, second: [first, second] if choice == "both" else [choice]
    for tree in args.trees:
        for layers in both(args.layers, "unrolled", "scanned"):
            for dtype in both(args.dtype, "float32", "bfloat16"):
                of = {"tree": tree, "layers": layers, "dtype": dtype, "decay": args.weight_decay}
                if any(of.items() <= row.items() for row in results["trees"]):
                    continue
                params, rank = params_of(tree, layers == "scanned", jnp.dtype(dtype))
                row = of | {"rank": rank, "scan": layers == "scanned"}
                measure(row, params, rank, args, lambda: None)
                results["trees"].append(row)
                save()
                show(row)


if __name__ == "__main__":
    main()
