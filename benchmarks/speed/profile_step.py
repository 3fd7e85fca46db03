"""Where does the time of an update without refresh go, or of one with all refreshes?

Prints the operations of one update on the device, longest first, their number and sum by kind, and
what no update of this form can avoid: one pass over gradients, weights and state (read, and all but
the gradients written) at the speed of a copy of 1 GB on the same device.

    python benchmarks/speed/profile_step.py --tree 350m --method galore [--out profile.json]
    python benchmarks/speed/profile_step.py --tree 350m --refresh-every 1    with all refreshes
    python benchmarks/speed/profile_step.py --tree tiny --method adamw       a quick run

On GPUs command buffers hide the names of operations; XLA_FLAGS=--xla_gpu_enable_command_buffer=
disables them. Trees are named as in bench_step.py.
"""

import argparse
import collections
import gzip
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.common.environment import environment
from benchmarks.common.methods import METHODS
from benchmarks.speed.bench_step import Stepper, params_of, random_like


KINDS = {  # words in the name of a kernel
    "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "dot"),
    "copy": ("memcpy", "memset", "copy", "transpose"),
    "reduction": ("reduc",),
}


class Operation(NamedTuple):
    """Kernels of one HLO operation: how often they ran, and microseconds in all."""

    times: int
    taken: float


def operations(folder: str) -> dict[str, Operation]:
    """The operations in the trace in `folder`."""
    (trace,) = pathlib.Path(folder).glob("**/*.trace.json.gz")
    found: dict[str, Operation] = {}
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            name = f"{event['args']['hlo_op']}  {event['name'][:60]}"
            times, taken = found.get(name, (0, 0.0))
            found[name] = Operation(times + 1, taken + event["dur"])
    return found


def kind(name: str) -> str:
    words = name.lower()
    return next((of for of, parts in KINDS.items() if any(x in words for x in parts)), "other")


def copy_speed() -> float:
    """Bytes read and written per second by a pass over an array of 1 GB."""
    x = jnp.zeros(2**28, jnp.float32)
    f = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        x = jax.block_until_ready(f(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times[2:])


def unavoidable_bytes(stepper: Stepper, grads: Any) -> int:
    """Gradients read once; weights and state read and written once."""
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    return size(grads) + 2 * size((stepper.weights, stepper.state))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", default="350m")
    parser.add_argument("--method", choices=METHODS, default="galore")
    parser.add_argument("--layers", choices=["unrolled", "scanned"], default="scanned")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--refresh-every", type=int, default=10_000, help="1: on every step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--top", type=int, default=40, help="operations to show")
    parser.add_argument("--out", type=pathlib.Path, help="add the figures to this JSON file")
    parser.add_argument("--hlo", type=pathlib.Path, help="write the compiled program here")
    args = parser.parse_args()
    params, rank = params_of(args.tree, args.layers == "scanned", jnp.dtype(args.dtype))
    grads, speed = random_like(params), copy_speed()
    # The refreshes at the start of a long period end before the traced steps.
    stepper = Stepper(METHODS[args.method](rank, args.refresh_every, args.weight_decay), params)
    if args.hlo:
        args.hlo.write_text(stepper.program.as_text())
    for _ in range(3):
        stepper.step(grads)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(args.steps):
                stepper.step(grads)
        found = operations(folder)
    a_step = lambda x: x / args.steps
    kinds: collections.Counter[str] = collections.Counter()
    for name, operation in found.items():
        kinds[kind(name)] += operation.taken
    least = unavoidable_bytes(stepper, grads)
    row = {
        "device_ms": a_step(sum(x.taken for x in found.values())) / 1e3,
        "kernels": a_step(sum(x.times for x in found.values())),
        "by_kind_ms": {of: a_step(taken) / 1e3 for of, taken in kinds.items()},
        "unavoidable_bytes": least,
        "unavoidable_ms": 1e3 * least / speed,
        "copy_bytes_per_second": speed,
        "temp_bytes": stepper.program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": stepper.compile_seconds,
        "operations_ms": {
            name: [a_step(x.times), a_step(x.taken) / 1e3]
            for name, x in sorted(found.items(), key=lambda item: -item[1].taken)[: args.top]
        },
    }
    for name, value in row.items():
        if name != "operations_ms":
            print(f"{name}: {value}")
    for name, (times, ms) in row["operations_ms"].items():
        print(f"{ms:9.3f} {times:7.1f} x  {name}")
    if args.out:
        results = json.loads(args.out.read_text()) if args.out.exists() else {}
        results["environment"] = environment()
        title = (args.tree, args.layers, args.dtype, args.method)
        title += ("all refreshed",) if args.refresh_every == 1 else ()
        results.setdefault("updates", {})[", ".join(title)] = row
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
