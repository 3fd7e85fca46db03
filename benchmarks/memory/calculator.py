"""Which bytes does the memory calculator of the documentation show?

Counts them with `natgalore.plan` and `natgalore.state_shardings`, for the paper's Llamas and from
shapes alone. The build of the site writes them into `javascripts/memory-data.js`.

    python -m benchmarks.memory.calculator        prints the script
"""

import json
import math
from collections.abc import Iterable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh

import natgalore_jax as natgalore
from examples.pretraining import llama_sharding
from natgalore_jax.planning import model_shapes


DEVICES = (1, 2, 4, 8, 16)
FRACTIONS = (16, 8, 4, 2)  # ranks are these parts of the width
DTYPES = {"bfloat16": 8, "float32": 32}  # of weights: the bits that one plan of each rank counts


def script() -> str:
    """The numbers as a JavaScript file."""
    return f"const MEMORY = {json.dumps(counted(), separators=(',', ':'))};\n"


def counted(sizes: Iterable[str] = tuple(model_shapes.LLAMA)) -> dict[str, Any]:
    """Bytes on one of `DEVICES` devices, by model, rank, dtype of weights and bits of the state.

    Weights and full gradients are sharded over the devices (FSDP) as in
    `examples/pretraining/sharded.py`, the state as `state_shardings` does it, cores as moments.
    """
    return {"devices": DEVICES, "models": {size: model(size) for size in sizes}}


def model(size: str) -> dict[str, Any]:
    """The numbers of one model: lists have an entry for each of `DEVICES`."""
    params = {dtype: model_shapes.llama(size, dtype) for dtype in DTYPES}
    places = [placement(params["float32"], n) for n in DEVICES]
    each = lambda tree, trees: [on_device(tree, shardings) for shardings in trees]
    ranks = {
        model_shapes.LLAMA[size].hidden // k: {"gradients": {}, "state": {}} for k in FRACTIONS
    }
    for rank, numbers in ranks.items():
        for dtype, bits in DTYPES.items():
            planned = natgalore.plan(params[dtype], rank=rank, bits=bits)
            tx = planned.optimizer(1.0)
            numbers["state"][bits] = state(tx, params[dtype], places)
            numbers["gradients"][dtype] = cores(planned, params[dtype], places)
            assert numbers["state"][bits][0] == planned.bytes["state"]
            assert numbers["gradients"][dtype][0] == planned.bytes["gradients"]
    return {
        "weights": {dtype: each(tree, places) for dtype, tree in params.items()},
        "ranks": ranks,
        "adamw": {
            dtype: {
                bits: state(natgalore.quantized(tx) if bits == 8 else tx, tree, places)
                for bits in DTYPES.values()
            }
            for dtype, tree in params.items()
            for tx in [optax.adamw(1.0)]
        },
    }


def placement(params: Any, devices: int) -> Any:
    """Shardings of the params on a mesh that need not exist."""
    return llama_sharding.param_shardings(
        AbstractMesh((1, devices, 1), llama_sharding.AXES), params
    )


def on_device(tree: Any, shardings: Any) -> int:
    """Bytes of the arrays of a tree on one device."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def state(tx: optax.GradientTransformation, params: Any, places: list[Any]) -> list[int]:
    """Bytes of the state of `tx` on one device."""
    arrays = jax.eval_shape(tx.init, params)
    shard = lambda x: natgalore.state_shardings(tx, params, x)
    return [on_device(arrays, shard(shardings)) for shardings in places]


def cores(planned: Any, params: Any, places: list[Any]) -> list[int]:
    """Bytes of the gradients of `natgalore.value_and_grad` on one device."""
    tx = natgalore.galore(1.0, planned.rank)
    moments = lambda tree: jax.tree.leaves(tree[0].inner_state[1].mu)
    shapes = [x.shape for x in moments(jax.eval_shape(tx.init, params))]

    def count(shardings: Any) -> int:
        sharded = moments(natgalore.state_shardings(tx, params, shardings))
        return sum(
            row.gradients * math.prod(s.shard_shape(shape)) // math.prod(shape)
            for row, shape, s in zip(planned.rows, shapes, sharded, strict=True)
        )

    return [count(shardings) for shardings in places]


if __name__ == "__main__":
    print(script())
