"""Where does the time of an update without refresh go?

Prints the operations of one update on the device, longest first.

    python benchmarks/speed/profile_step.py --tree 350m --method galore
    python benchmarks/speed/profile_step.py --tree tiny --method adamw    a quick run

On GPUs command buffers hide the names of operations; XLA_FLAGS=--xla_gpu_enable_command_buffer=
disables them. Trees are named as in bench_step.py.
"""

import argparse
import collections
import gzip
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp

from benchmarks.common.methods import METHODS
from benchmarks.speed.bench_step import Stepper, params_of, random_like


def operations(folder: str) -> collections.Counter[str]:
    """Microseconds of each operation in the trace in `folder`."""
    (trace,) = pathlib.Path(folder).glob("**/*.trace.json.gz")
    taken: collections.Counter[str] = collections.Counter()
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            taken[f"{event['args']['hlo_op']}  {event['name'][:60]}"] += event["dur"]
    return taken


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", default="350m")
    parser.add_argument("--method", choices=METHODS, default="galore")
    parser.add_argument("--layers", choices=["unrolled", "scanned"], default="scanned")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--top", type=int, default=40, help="operations to show")
    args = parser.parse_args()
    params, rank = params_of(args.tree, args.layers == "scanned", jnp.dtype(args.dtype))
    grads = random_like(params)
    # The refreshes at the start of this long period end before the traced steps.
    stepper = Stepper(METHODS[args.method](rank, 10_000, args.weight_decay), params)
    for _ in range(3):
        stepper.step(grads)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(args.steps):
                stepper.step(grads)
        taken = operations(folder)
    print(f"{sum(taken.values()) / args.steps / 1e3:.3f} ms a step on the device")
    for name, microseconds in taken.most_common(args.top):
        print(f"{microseconds / args.steps / 1e3:9.3f}  {name}")


if __name__ == "__main__":
    main()
