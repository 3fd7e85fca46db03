"""Compiles cases for TPUs in a process of its own and prints what the programs contain, as JSON.

python -m tests.helpers.tpu_worker CASE ...
"""

import dataclasses
import functools
import json
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

import natgalore_jax as natgalore
from benchmarks.common import tpu_compiler
from benchmarks.common.hlo import collectives
from benchmarks.common.tpu_compiler import Program
from benchmarks.memory.bench_tpu import mesh_of, training_step, update_step
from examples.common import llama
from examples.pretraining import llama_sharding, sharded
from natgalore_jax.reporting.memory_report import nbytes_on_tpu
from natgalore_jax.tree.cores import cores as cores_of


RANK, M, N = 16, 128, 720  # n is no multiple of 128, the width of a tile
LAYERS = 16
SHAPES = {"up": (LAYERS, M, N), "gate": (LAYERS, M, N), "down": (LAYERS, N, M), "norm": (M,)}
# Fewer optimisations: the same collectives and precisions in a fraction of the time.
OPTIONS = {"exec_time_optimization_effort": -1.0}
SETTINGS = {"refresh_every": 10, "weight_decay": 0.1}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "galore": lambda: natgalore.galore(1e-3, RANK, **SETTINGS),
    "natural_galore": lambda: natgalore.natural_galore(1e-3, RANK, **SETTINGS),
    "core": lambda: natgalore.natural_galore(1e-3, RANK, fisher="core", residual=None, **SETTINGS),
    "window": lambda: natgalore.natural_galore(
        1e-3, RANK, fisher="window", residual=None, **SETTINGS
    ),
    "quantized": lambda: natgalore.quantized(natgalore.galore(1e-3, RANK, **SETTINGS)),
    "offload": lambda: natgalore.offload(natgalore.galore(1e-3, RANK, **SETTINGS)),
    "cores": lambda: natgalore.galore(1e-3, RANK, stagger=False, **SETTINGS),
}
# Of arrays on one chip: tiles of (8, 128), shorter ones, vectors, and axes in every order.
PADDED = [
    *((r, 2736) for r in (1, 3, 4, 8, 16, 100)),
    *((2048, r) for r in (4, 100)),
    *((100, 100), (24, 100, 100), (3, 5, 7), (24, 342, 256), (2, 3, 130, 70), (5,), (2736,), ()),
]


def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


def facts(program: Program) -> dict[str, Any]:
    """What a program contains and needs."""
    text = program.text
    return {
        "precisions": sorted(set(re.findall(r"operand_precision=\{(\w+,\w+)\}", text))),
        "float64": bool(re.search(r"\b(f64|c128)\[", text)),
        "host": sorted(
            set(re.findall(r" (send|recv|infeed|outfeed)\(", text))
            | ({"host memory"} if "S(5)" in text else set())
        ),
        "unaliased": program.unaliased,
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "hot": [
            [x.kind, list(shape), x.times] for x in program.hot_collectives() for shape in x.shapes
        ],
        "moved": program.moved()["step"],
        "gathered": max(
            (
                math.prod(shape)
                for x in collectives(text)
                for shape in x.shapes
                if x.kind == "all-gather"
            ),
            default=0,
        ),
        "copied": sorted(map(json.loads, {*re.findall(r"= \w+(\[[\d,]+\])\S* copy\(", text)})),
    }


def update(name: str, topology: str) -> dict[str, Any]:
    """The update, and the bytes that `plan` counts for one chip's part of its arguments."""
    step = update_step(OPTIMIZERS[name](), shapes(), mesh_of(topology))
    part = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    planned = sum(nbytes_on_tpu(part(x)) for x in jax.tree.leaves(step.arguments))
    return facts(step.compile(options=OPTIONS)) | {"planned": planned}


def one_chip(name: str, topology: str) -> dict[str, Any]:
    """The update on one chip, and the bytes that `plan` counts."""
    params, recipe = shapes(), getattr(natgalore, name)
    program = update_step(OPTIMIZERS[name](), params, mesh_of(topology, 1)).compile(options=OPTIONS)
    settings = {"bits": 32, "low_rank_gradients": False, "refresh_every": 10}
    planned = natgalore.plan(params, rank=RANK, recipe=recipe, tpu=True, **settings)
    return facts(program) | {"planned": sum(planned.bytes.values())}


def layouts(name: str, topology: str) -> dict[str, Any]:
    """The update of weights of which a chip has 342 columns or rows, no multiple of 8."""
    shape = lambda *shape: jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32)
    params = {"up": shape(1024, 2736), "down": shape(2736, 1024)}
    tx = getattr(natgalore, name)(1e-3, 256, **SETTINGS)
    return facts(update_step(tx, params, mesh_of(topology)).compile(options=OPTIONS))


def training(name: str, topology: str) -> dict[str, Any]:
    mesh = mesh_of(topology)
    config = llama.CONFIGS["tiny"]
    step = training_step(OPTIMIZERS[name](), name == "cores", config, mesh, mesh.size, 128)
    return facts(step.compile(options=OPTIONS))


def peak(topology: str) -> dict[str, Any]:
    """The training step of a Llama 60m on one chip, and the bytes that `plan` counts.

    With all optimisations: without them temporaries are larger.
    """
    config, rank, mesh = llama.CONFIGS["60m"], 128, mesh_of(topology, 1)
    params = llama.abstract_params(dataclasses.replace(config, scan=True))
    found = {}
    for name in ("adamw", "galore", "natural_galore"):
        recipe = getattr(natgalore, name, None)
        tx = recipe(1e-3, rank, weight_decay=0.1) if recipe else optax.adamw(1e-3)
        step = training_step(tx, False, config, mesh, 1, 1024)
        found[name] = facts(step.compile())
        if recipe:
            settings = {"bits": 32, "low_rank_gradients": False, "tpu": True}
            planned = natgalore.plan(params, rank=rank, recipe=recipe, **settings)
            cores = [nbytes_on_tpu(core.value) for core in cores_of(step.arguments[1])]
            found[name] |= {
                "planned": planned.bytes,
                "tokens": nbytes_on_tpu(step.arguments[2]),
                "cores": sum(cores) // 2,  # of two moments
            }
    return found


def example(topology: str) -> dict[str, Any]:
    """The training step of `make train ACCELERATOR=tpu ARGS="--dtype bfloat16 --scan"`."""
    mesh = mesh_of(topology)
    llama_sharding.make_mesh = lambda shape: mesh
    (config,) = sharded.Config(dtype="bfloat16", scan=True, vocabulary=256).runs()
    functions = sharded.make_functions(config)
    state = jax.eval_shape(functions.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32)
    step = functions.train_step
    return facts(tpu_compiler.compile_for_tpu(step, state, tokens, options=OPTIONS))


def padding(topology: str) -> list[tuple[str, int, int]]:
    """Shapes with their bytes by the compiler and by `nbytes_on_tpu`."""
    sharding = SingleDeviceSharding(tpu_compiler.devices_of(topology)[0])
    rows = []
    for shape in PADDED:
        for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
            x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            program = tpu_compiler.compile_for_tpu(lambda x: x, x, donate_argnums=0)
            rows.append((f"{x.dtype}{shape}", program.arguments, nbytes_on_tpu(x)))
    return rows


def run(case: str) -> Any:
    kind, *arguments = case.split("/")
    functions = {
        "update": update,
        "one_chip": one_chip,
        "layouts": layouts,
        "training": training,
        "peak": peak,
        "example": example,
        "padding": padding,
    }
    return functools.partial(functions[kind], *arguments)()


if __name__ == "__main__":
    tpu_compiler.use_tpu_compiler()
    print(json.dumps({case: run(case) for case in sys.argv[1:]}))
