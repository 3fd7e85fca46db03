"""What does a training step cost under each optimizer, in time, memory and communication?

A Llama in bfloat16 with float32 weights, scanned and recomputed layers, on random tokens, in
several layouts of all devices of a host, or on the mesh of --mesh:

    data   weights and state replicated; the only layout on one device
    fsdp   weights and state sharded
    zero   weights replicated, optimizer state sharded (ZeRO-1)

The methods of a layout take turns, step by step, so that disturbances affect all alike; compare
times within one layout only. Step 0, which refreshes all bases, is reported separately. With
--steps equal to --refresh-every the later steps include each later refresh once. With --steps 0
nothing is run; memory and communication of the compiled program are reported.

Methods whose name ends in `_unrolled`, and `contrib_galore`, run on separate layers. Methods whose
name ends in `_cores` take their gradients from `natgalore.value_and_grad` and refresh all bases at
once.

    python benchmarks/speed/bench_train.py --size 350m [--out benchmarks/results/train-350m.json]
    python benchmarks/speed/bench_train.py --layouts fsdp,zero,data    on several devices
    python benchmarks/speed/bench_train.py --methods adamw,galore_cores --micro-batches 8
    python benchmarks/speed/bench_train.py --size tiny --seq-len 16 --steps 3    a quick run

Each layout runs in its own process. Results are written as they come. Methods that --out already
holds for the same settings and machine are not measured again; --minutes limits the time.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import natgalore_jax as natgalore
from benchmarks.common.environment import environment
from benchmarks.common.hlo import collectives
from benchmarks.common.methods import CORES, METHODS, RANKS, REFERENCE, UNROLLED_ONLY
from examples.common import llama
from examples.pretraining import llama_sharding


LAYOUTS = {  # mesh, and the axis that shards otherwise replicated state
    "data": ("-1,1,1", None),
    "fsdp": ("1,-1,1", "fsdp"),
    "zero": ("-1,1,1", "data"),
}
UNROLLED = "_unrolled"  # at the end of a method's name
ABOUT = ("size", "rank", "seq_len", "batch_per_device", "micro_batches", "refresh_every")
ABOUT += ("remat", "dtype")


class Program(NamedTuple):
    """A compiled step, the initialiser of its state, and facts about the compiled program."""

    init: Any
    step: Any
    facts: dict[str, Any]


def is_unrolled(method: str) -> bool:
    return method.endswith(UNROLLED) or method in UNROLLED_ONLY


def make_optimizer(method: str, rank: int, refresh_every: int) -> optax.GradientTransformation:
    return METHODS[method.removesuffix(UNROLLED)](rank, refresh_every, 0.1)


def compile_step(method: str, mesh: jax.sharding.Mesh, zero_axis: str | None, args) -> Program:
    """The compiled step of a method on a mesh, with its memory and communication."""
    batch, whole = NamedSharding(mesh, batch_spec(args)), NamedSharding(mesh, PartitionSpec())
    config = replace(
        llama.CONFIGS[args.size],
        scan=not is_unrolled(method),
        remat=args.remat,
        dtype=jnp.dtype(args.dtype),
        activations=NamedSharding(mesh, llama_sharding.BATCH),
    )
    structure = llama.structure(config)

    def weights(key):
        return nnx.to_pure_dict(nnx.state(llama.Llama(config, nnx.Rngs(key)), nnx.Param))

    params = jax.eval_shape(weights, jax.random.key(0))
    shardings = llama_sharding.param_shardings(mesh, params)
    tx = make_optimizer(method, args.rank, args.refresh_every)
    tx = natgalore.sharded(tx, shardings, zero_axis=zero_axis)

    def init(key):
        params = weights(key)
        return params, tx.init(params)

    def loss_fn(params, tokens):
        return llama.next_token_loss(nnx.merge(structure, params), tokens)

    if method.removesuffix(UNROLLED).endswith(CORES):
        gradients = natgalore.value_and_grad(
            loss_fn, tx, micro_batches=args.micro_batches, on_fallback="error"
        )
    else:
        gradients = whole_gradients(loss_fn, args.micro_batches)

    def step(state, tokens):
        params, opt_state = state
        (loss, grads), opt_state = gradients(params, opt_state, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    state = (shardings, natgalore.state_shardings(tx, params, shardings, zero_axis=zero_axis))
    init = jax.jit(init, out_shardings=state)
    step = jax.jit(
        step, in_shardings=(state, batch), out_shardings=(state, whole), donate_argnums=0
    )
    tokens = jax.ShapeDtypeStruct(batch_shape(mesh, args), np.int32)
    start = time.perf_counter()
    compiled = step.lower(jax.eval_shape(init, jax.random.key(0)), tokens).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    facts = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "collectives": count(compiled.as_text()),
    }
    return Program(init, compiled, facts)


def whole_gradients(loss_fn: Callable[..., Any], micro_batches: int) -> Callable[..., Any]:
    """`natgalore.value_and_grad` with sums of full gradients."""
    gradients = jax.value_and_grad(loss_fn)

    def of(params, opt_state, tokens):
        if micro_batches == 1:
            return gradients(params, tokens), opt_state
        add = lambda total, part: (jax.tree.map(jnp.add, total, gradients(params, part)), None)
        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros([]), params))
        total, _ = jax.lax.scan(add, zeros, tokens)
        return jax.tree.map(lambda x: x / micro_batches, total), opt_state

    return of


def batch_shape(mesh: jax.sharding.Mesh, args) -> tuple[int, ...]:
    """Shape of the tokens, with a leading axis if there are several micro-batches."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    one = rows * args.batch_per_device, args.seq_len + 1
    return one if args.micro_batches == 1 else (args.micro_batches, *one)


def batch_spec(args) -> PartitionSpec:
    return (
        llama_sharding.BATCH
        if args.micro_batches == 1
        else PartitionSpec(None, *llama_sharding.BATCH)
    )


def count(program: str) -> dict[str, dict[str, dict[str, int]]]:
    """Collectives by when they run and kind: how many, and bytes that a device receives.

    Those of a refresh are of one that meets each of its branches and loops once.
    """
    table: Any = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
    for one in collectives(program):
        row = table["every step" if one.hot else "refresh"][one.kind]
        row.update({"count": one.times, "bytes": round(one.times * one.received)})
    return table


def peak_bytes() -> int | None:
    """Peak of any device's allocator so far, or None if the platform reports none."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((x["peak_bytes_in_use"] for x in stats if x), default=None)


def bytes_in_use() -> int:
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((x["bytes_in_use"] for x in stats if x), default=0)


def measure(name: str, args, results: dict[str, Any], save) -> None:
    """Compiles all methods for one layout, runs step 0 of each, then times them in turns."""
    shape, zero_axis = LAYOUTS.get(name, (args.mesh, "fsdp"))
    mesh = llama_sharding.make_mesh([int(n) for n in shape.split(",")])
    results["mesh"], results["zero_axis"] = dict(mesh.shape), zero_axis
    methods = results.setdefault("methods", {})
    programs = {}
    for method in args.methods:
        try:
            programs[method] = compile_step(method, mesh, zero_axis, args)
            methods[method] = programs[method].facts
        except Exception as error:  # of many types, from a compiler or a method
            methods[method] = {"does not run": str(error).splitlines()[0]}
        save()
    if not args.steps:
        return

    tokens = np.random.default_rng(0).integers(
        llama.CONFIGS[args.size].vocabulary, size=batch_shape(mesh, args)
    )
    per_step = tokens.size // (args.seq_len + 1) * args.seq_len
    tokens = jax.device_put(tokens.astype(np.int32), NamedSharding(mesh, batch_spec(args)))
    states = {}

    def step(method: str) -> float:
        start = time.perf_counter()
        states[method], loss = programs[method].step(states[method], tokens)
        methods[method]["loss"] = float(loss)
        jax.block_until_ready(states[method])
        return time.perf_counter() - start

    # The allocator's peak only grows: measure methods in the order of their memory.
    holds = lambda method: (
        programs[method].facts["argument_bytes"] + (programs[method].facts["temp_bytes"])
    )
    slow_last = lambda method: (method == "contrib_galore", holds(method))
    for method in sorted(programs, key=slow_last):
        before, others = peak_bytes(), bytes_in_use()
        try:
            states[method] = programs[method].init(jax.random.key(0))
            methods[method]["first_step_seconds"] = step(method)
        except jax.errors.JaxRuntimeError as error:
            states.pop(method, None)
            methods[method]["does not run"] = str(error).splitlines()[0]
        after = peak_bytes()
        rose = after is not None and before is not None and after > before
        methods[method]["peak_bytes"] = after - others if rose else None
        save()

    times: dict[str, list[float]] = {method: [] for method in states}

    def record() -> None:
        for method, taken in times.items():
            if taken:
                methods[method] |= {
                    "steps": len(taken),
                    "median_step_seconds": statistics.median(taken),
                    "mean_step_seconds": statistics.mean(taken),
                    "slowest_step_seconds": max(taken),
                    "tokens_per_second": per_step / statistics.median(taken),
                }
        save()

    for turn in range(args.steps):
        if time.time() > args.until:
            break
        for method in states if turn % 2 else reversed(states):
            times[method].append(step(method))
        if turn % 20 == 19:
            record()
    record()


def show(results: dict[str, Any]) -> None:
    """Prints a table for each layout; sizes are of one device."""
    number = lambda x, unit=1.0, form=",.1f": "-" if x is None else format(x / unit, form)
    for name, layout in results["layouts"].items():
        sizes = " x ".join(f"{axis} {size}" for axis, size in layout["mesh"].items())
        failures = []
        table = Table(
            *("method", "tokens/s", "to adamw", "step ms", "mean", "slowest", "step 0"),
            *("args MB", "temp MB", "peak MB", "moves MB", "at a refresh", "compile s"),
            title=f"{name}: {sizes}",
        )
        for method, row in layout["methods"].items():
            if "does not run" in row:
                failures.append(f"{method} does not run: {row['does not run']}")
                continue
            reference = REFERENCE + UNROLLED * is_unrolled(method)
            adamw = layout["methods"].get(reference, {})
            speed, other = row.get("tokens_per_second"), adamw.get("tokens_per_second")
            moved = {
                when: sum(x["bytes"] for x in row["collectives"].get(when, {}).values())
                for when in ("every step", "refresh")
            }
            table.add_row(
                method,
                number(speed, form=",.0f"),
                number(speed and other and speed / other, form=".3f"),
                number(row.get("median_step_seconds"), 1e-3),
                number(row.get("mean_step_seconds"), 1e-3),
                number(row.get("slowest_step_seconds"), 1e-3),
                number(row.get("first_step_seconds"), 1e-3),
                number(row["argument_bytes"], 1e6),
                number(row["temp_bytes"], 1e6),
                number(row.get("peak_bytes"), 1e6),
                number(moved["every step"], 1e6),
                number(moved["refresh"], 1e6),
                number(row["compile_seconds"]),
            )
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        print(*failures, "", sep="\n")


def read(args) -> dict[str, Any]:
    """The results in --out if they have the same settings, else empty results."""
    settings = {name: getattr(args, name) for name in ABOUT}
    if args.out.exists():
        results = json.loads(args.out.read_text())
        if results["settings"] == settings:
            return results
    return {"environment": {}, "settings": settings, "layouts": {}}


def is_done(layout: dict[str, Any], args) -> bool:
    rows = [layout.get("methods", {}).get(method) for method in args.methods]
    enough = lambda row: "does not run" in row or row.get("steps", 0) >= args.steps
    return all(row is not None and enough(row) for row in rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=RANKS, default="350m")
    parser.add_argument("--methods", type=lambda x: x.split(","), default=list(METHODS)[:3])
    parser.add_argument("--layouts", type=lambda x: x.split(","), default=["data"])
    parser.add_argument("--mesh", help="instead of layouts: data,fsdp,tensor")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-per-device", type=int, default=8, help="sequences")
    parser.add_argument(
        "--micro-batches", type=int, default=1, help="number of such batches summed in a step"
    )
    parser.add_argument("--rank", type=int, help="by default GaLore's of this size")
    parser.add_argument("--refresh-every", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", help="of activations and matmuls")
    parser.add_argument(
        "--remat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute each layer backwards",
    )
    parser.add_argument("--devices", type=int, help="CPU devices to simulate")
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after this time")
    parser.add_argument("--out", type=pathlib.Path, default="runs/train.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in a process
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rank = args.rank or RANKS[args.size]
    named = {method.removesuffix(UNROLLED) for method in args.methods}
    if unknown := [*named - {*METHODS}, *{*args.layouts} - {*LAYOUTS}]:
        parser.error(f"neither method nor layout: {', '.join(unknown)}")
    if args.mesh:
        args.layouts = [args.mesh]
    args.until = args.until or time.time() + 60 * args.minutes
    results = read(args)
    if args.one:
        if args.devices:
            jax.config.update("jax_num_cpu_devices", args.devices)
        if results["environment"] != environment():
            results |= {"environment": environment(), "layouts": {}}
        (name,) = args.layouts
        save = lambda: args.out.write_text(json.dumps(results, indent=1) + "\n")
        measure(name, args, results["layouts"].setdefault(name, {}), save)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # XLA's threads, by default one for each simulated device. Two collectives at once need more on
    # few cores, or each waits for devices whose threads wait in the other.
    threads = {"NPROC": str(8 * args.devices)} if args.devices else {}
    for name in args.layouts:
        if time.time() < args.until and not is_done(results["layouts"].get(name, {}), args):
            which = ["--mesh", name] if args.mesh else ["--layouts", name]
            again = [sys.executable, __file__, *sys.argv[1:], *which, "--one"]
            again += ["--until", str(args.until)]
            subprocess.run(again, check=False, env=os.environ | threads)
    show(read(args))


if __name__ == "__main__":
    main()
