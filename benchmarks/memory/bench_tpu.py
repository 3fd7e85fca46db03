"""Does a training run fit on a TPU slice, what does it move, and how long does it compile?

Compiled for the TPU by its own compiler, on a machine without one: see
`benchmarks/common/tpu_compiler.py`. The program is the training step of the examples, a scanned
Llama with recomputed layers under FSDP over all chips, with donated weights and state.

    python -m benchmarks.memory.bench_tpu --topologies v5e:4x4 --models 7b --rank 1024 \
        --batch 16 --seq-len 2048                                              one question
    python -m benchmarks.memory.bench_tpu --out benchmarks/results/tpu.json    the table
    python -m benchmarks.memory.bench_tpu --update --models 350m               the update alone
    python -m benchmarks.memory.bench_tpu --update --models 350m --topologies v5e:2x4 --chips 1
    python -m benchmarks.memory.bench_tpu --shapes FILE --topologies v5e:2x4   of any shapes
    python -m benchmarks.memory.bench_tpu --pieces                             compile seconds

Bytes are those of one chip. Moved bytes are what a chip receives; `refresh` counts each loop of a
refresh once, that is one matrix of each shape. Compile seconds are processor time. Rows that are
already in --out are not measured again.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

import natgalore_jax as natgalore
from benchmarks.common import tpu_compiler
from benchmarks.common.environment import environment
from benchmarks.common.llama_step import llama_step
from benchmarks.common.methods import CORES, METHODS, RANKS, REFERENCE
from benchmarks.common.tpu_compiler import GIB, OutOfMemory, Program, compile_for_tpu
from examples.common import llama
from examples.pretraining import llama_sharding
from natgalore_jax.planning import model_shapes
from natgalore_jax.util import linalg, orthonormalise
from natgalore_jax.util.orthogonalize import polar
from natgalore_jax.util.text_tables import human_bytes, table


TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x4")
NAMES = {REFERENCE: "AdamW", "galore_cores": "galore, low-rank gradients"}
COMPARED = (REFERENCE, "galore", "natural_galore", "galore_cores")


def mesh_of(topology: str, chips: int | None = None) -> Mesh:
    """Data, FSDP and tensor axes over the first chips of a topology (all), all of them FSDP."""
    devices = np.array(tpu_compiler.devices_of(topology)[:chips]).reshape(1, -1, 1)
    return Mesh(devices, llama_sharding.AXES, axis_types=(AxisType.Auto,) * 3)


class Step(NamedTuple):
    """A program to compile.

    Attributes:
      f: a function of `arguments`; the first two, weights and state, are donated.
      arguments: trees of sharded shapes.
      out_shardings: of the results.
    """

    f: Callable[..., Any]
    arguments: list[Any]
    out_shardings: Any

    def compile(self, **settings: Any) -> Program:
        return compile_for_tpu(
            self.f,
            *self.arguments,
            donate_argnums=(0, 1),
            out_shardings=self.out_shardings,
            **settings,
        )


def training_step(
    tx: optax.GradientTransformation,
    low_rank_gradients: bool,
    config: llama.LlamaConfig,
    mesh: Mesh,
    batch: int,
    length: int,
) -> Step:
    """A training step of a scanned, recomputed Llama with bfloat16 activations."""
    tokens = NamedSharding(mesh, llama_sharding.BATCH)
    config = dataclasses.replace(
        config, scan=True, remat=True, dtype=jnp.bfloat16, activations=tokens
    )
    params = llama.abstract_params(config)
    shardings = llama_sharding.param_shardings(mesh, params)
    tx = natgalore.sharded(tx, shardings)
    state, state_shardings = state_of(tx, params, shardings)

    step = llama_step(tx, config, low_rank_gradients)
    shape = jax.ShapeDtypeStruct((batch, length + 1), np.int32, sharding=tokens)
    arguments = [tpu_compiler.with_shardings(params, shardings), state, shape]
    return Step(step, arguments, (shardings, state_shardings, NamedSharding(mesh, P())))


def update_step(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Step:
    """The update of weights of any shapes, each sharded on one axis, and its application."""
    shardings = jax.tree.map(lambda x: divided(x, mesh), params)
    tx = natgalore.sharded(tx, shardings)
    state, state_shardings = state_of(tx, params, shardings)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    sharded = tpu_compiler.with_shardings(params, shardings)
    return Step(step, [sharded, state, sharded], (shardings, state_shardings))


def divided(x: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """FSDP on the first axis of a matrix that the mesh divides, else on the last."""
    axes = [axis for axis in range(max(x.ndim - 2, 0), x.ndim) if x.shape[axis] % mesh.size == 0]
    return NamedSharding(mesh, P(*[None] * axes[0], "fsdp") if axes and x.ndim > 1 else P())


def state_of(tx: optax.GradientTransformation, params: Any, shardings: Any) -> tuple[Any, Any]:
    """The shapes of the state with their shardings, and the shardings."""
    state_shardings = natgalore.state_shardings(tx, params, shardings)
    state = jax.eval_shape(tx.init, params)
    return tpu_compiler.with_shardings(state, state_shardings), state_shardings


def row_of(step: Step, topology: str) -> dict[str, Any]:
    """The figures of one compiled step."""
    kinds = ("weights", "state", "batch")
    row: dict[str, Any] = dict(zip(kinds, map(bytes_of_shards, step.arguments), strict=True))
    try:
        return row | figures(step.compile(), topology)
    except OutOfMemory as error:
        return row | {"fits": False, "needed_by_compiler": error.needed}


def figures(program: Program, topology: str) -> dict[str, Any]:
    available = tpu_compiler.MEMORY[topology.split(":")[0]]
    moved = program.moved()
    return {
        "fits": program.peak <= available,
        "peak": program.peak,
        "arguments": program.arguments,
        "temporaries": program.temporaries + program.unaliased,
        "code": program.code,
        "moved": moved["step"],
        "moved_refresh": moved["refresh"],
        "compile_seconds": program.seconds,
    }


def bytes_of_shards(tree: Any) -> int:
    """Bytes of one device's shards, without padding."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


def pieces(topology: str, sizes: list[tuple[int, int, int]]) -> Iterator[tuple[str, Program]]:
    """The parts of an update of one m x n matrix at rank r on one chip."""
    sharding = SingleDeviceSharding(tpu_compiler.devices_of(topology)[0])
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    for m, n, r in sizes:
        G, basis, core = shape(m, n), shape(m, r), shape(r, n)
        functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            **{
                f"PᵀG, {precision}": (
                    lambda P, G, precision=precision: jnp.matmul(P.T, G, precision=precision),
                    (basis, G),
                )
                for precision in ("default", "high", "highest")
            },
            "P U, high": (linalg.product, (basis, core)),
            "G (Gᵀ P), highest": (lambda G, P: linalg.matmul(G, linalg.matmul(G.T, P)), (G, basis)),
            "G (Gᵀ P), by blocks": (linalg.gram_product, (G, basis)),
            "QR by panels": (orthonormalise.panel_qr, (basis,)),
            "three Newton-Schulz steps": (polar, (G,)),
        }
        if r <= 512:  # minutes beyond
            functions["QR"] = (orthonormalise.householder_qr, (basis,))
        for name, (f, arguments) in functions.items():
            yield f"{m} x {n}, r {r}: {name}", compile_for_tpu(f, *arguments)


def advice(rows: dict[str, dict[str, Any]]) -> str:
    """What to change if a run does not fit."""
    fitting = [NAMES.get(name, name) for name, row in rows.items() if row["fits"]]
    return (
        f"fit: {', '.join(fitting) or 'none of these'}; else weights in bfloat16 "
        "(--param-dtype), a lower --rank or --batch, or more chips"
    )


def cells(rows: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The printed table of one run."""
    kinds = ("weights", "state", "temporaries", "code", "peak", "moved", "moved_refresh")
    head = ("optimizer", "fits", *(kind.replace("_", ", ") for kind in kinds), "compile, s")
    text = lambda row, kind: human_bytes(round(row[kind])) if kind in row else ""
    return [
        head,
        *(
            (
                NAMES.get(name, name),
                "yes" if row["fits"] else "no",
                *(text(row, kind) for kind in kinds),
                f"{row['compile_seconds']:.0f}" if "compile_seconds" in row else "",
            )
            for name, row in rows.items()
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",")
    parser.add_argument("--topologies", type=words, default=TOPOLOGIES)
    parser.add_argument("--chips", type=int, help="the first chips of a topology; default: all")
    parser.add_argument("--models", type=words, default=("350m", "1b", "7b"))
    parser.add_argument("--update", action="store_true", help="the update without the model")
    parser.add_argument("--shapes", nargs="+", help="files of shapes: implies --update")
    parser.add_argument("--methods", type=words, default=COMPARED, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rank", type=int, help="default: the paper's")
    parser.add_argument("--batch", type=int, help="sequences per step; default: one per chip")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--param-dtype", default="float32")
    parser.add_argument("--pieces", action="store_true", help="parts of an update instead")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    tpu_compiler.use_tpu_compiler()
    results: dict[str, Any] = {"runs": []}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    results["environment"] = environment() | {"libtpu": tpu_compiler.version()}

    def save():
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")

    if args.pieces:
        results["pieces"] = {}
        for name, program in pieces(args.topologies[0], [(1024, 2736, 256), (2048, 5461, 512)]):
            results["pieces"][name] = {"compile_seconds": program.seconds, "code": program.code}
            code = human_bytes(program.code)
            print(f"{name:45} {program.seconds:6.1f} s, code {code}", flush=True)
            save()
        return
    shapes = model_shapes.read_shapes(args.shapes, args.param_dtype) if args.shapes else None
    for topology in args.topologies:
        mesh = mesh_of(topology, args.chips)
        batch = args.batch or mesh.size
        for model in ["shapes"] if args.shapes else args.models:
            rank = args.rank or RANKS.get(model, 128)
            key = {
                "topology": f"{args.chips} of {topology}" if args.chips else topology,
                "model": model,
                "rank": rank,
                "tokens": 0 if args.update or args.shapes else batch * args.seq_len,
                "param_dtype": args.param_dtype,
            }
            found = [run for run in results["runs"] if key.items() <= run.items()]
            run = found[0] if found else {**key, "methods": {}}
            if not found:
                results["runs"].append(run)
            for method in args.methods:
                if method in run["methods"]:
                    continue
                tx = METHODS[method](rank, 200, 0.1)
                if args.update or args.shapes:
                    params = shapes or model_shapes.llama(model, args.param_dtype)
                    step = update_step(tx, params, mesh)
                else:
                    dtype = jnp.dtype(args.param_dtype)
                    config = dataclasses.replace(llama.CONFIGS[model], param_dtype=dtype)
                    low_rank = method.endswith(CORES)
                    step = training_step(tx, low_rank, config, mesh, batch, args.seq_len)
                run["methods"][method] = row_of(step, topology)
                save()
            available = tpu_compiler.MEMORY[topology.split(":")[0]] / GIB
            print(
                f"\n{topology}, {mesh.size} chips of {available:.2f} GiB: {model}, rank {rank}, "
                + (f"{key['tokens']:,} tokens a step\n" if key["tokens"] else "update alone\n")
            )
            print(table(cells(run["methods"]), len(cells(run["methods"])[0]) - 2))
            if not all(row["fits"] for row in run["methods"].values()):
                print(advice(run["methods"]))


if __name__ == "__main__":
    main()
