"""This library's own `sharded`, on Flax NNX's Llama of examples/ with its sharding rules."""

from typing import Any

import jax
import optax
from flax import nnx

import natgalore_jax as natgalore
from examples.common import llama
from examples.pretraining import llama_sharding

from .case import (
    BATCH,
    INNER,
    LAYERS,
    LENGTH,
    REFRESH_EVERY,
    STEPS,
    VOCABULARY,
    WIDTH,
    bytes_of,
    compile_seconds,
)


LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP 8": {"mesh": (1, 8, 1)},
    "FSDP 4 x TP 2": {"mesh": (1, 4, 2)},
    "ZeRO-1 over 8": {"mesh": (8, 1, 1), "zero_axis": "data"},
    "FSDP 8, unrolled": {"mesh": (1, 8, 1), "scan": False},
}
SETTINGS = {"rank": 0.25, "refresh_every": REFRESH_EVERY, "weight_decay": 0.1}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "natural_galore": lambda: natgalore.natural_galore(2.5e-3, **SETTINGS),
    "galore": lambda: natgalore.galore(2.5e-3, **SETTINGS),
}


def run(optimizer: str, layout: str, checkpoint: bool) -> dict[str, Any]:
    del checkpoint  # tests/integration has those of this library
    settings = {"scan": True} | LAYOUTS[layout]
    scan = settings.pop("scan")
    mesh = llama_sharding.make_mesh(settings.pop("mesh"))
    config = llama.LlamaConfig(
        WIDTH, INNER, heads=4, layers=LAYERS, vocabulary=VOCABULARY, scan=scan, kv_heads=2
    )
    structure = llama.structure(config)
    init = lambda: nnx.to_pure_dict(nnx.state(llama.Llama(config, nnx.Rngs(0)), nnx.Param))
    shardings = llama_sharding.param_shardings(mesh, jax.eval_shape(init))
    params = jax.jit(init, out_shardings=shardings)()
    tx = natgalore.sharded(OPTIMIZERS[optimizer](), shardings, **settings)

    @jax.jit
    def step(params, state, tokens):
        loss_fn = lambda params: llama.next_token_loss(nnx.merge(structure, params), tokens)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    with jax.set_mesh(mesh), compile_seconds() as seconds:
        state = jax.jit(tx.init)(params)
        for i in range(STEPS):
            tokens = jax.random.randint(jax.random.key(i), (BATCH, LENGTH + 1), 0, VOCABULARY)
            params, state, loss = step(params, state, tokens)
            losses.append(float(loss))
    return {**bytes_of(state), "losses": losses, **seconds}
