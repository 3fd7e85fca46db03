"""Levanter's own Trainer (haliax arrays) with the recipe of examples/trainers/levanter.py."""

import tempfile
from typing import Any

import haliax as hax
import jax
from haliax import Axis
from levanter import checkpoint as checkpoints
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.optim.config import AdamConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from levanter.utils.mesh import MeshConfig

from examples.trainers.levanter import NaturalGaLoreConfig

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
    equal,
)


LAYOUTS = {
    "FSDP 8": MeshConfig(axes={"data": 8, "model": 1}),
    "FSDP 4 x TP 2": MeshConfig(axes={"data": 4, "model": 2}),
}
OPTIMIZERS = {
    "adamw": AdamConfig(),
    "natural_galore": NaturalGaLoreConfig(rank=0.25, refresh_every=REFRESH_EVERY),
}
MODEL = LlamaConfig(
    max_seq_len=LENGTH,
    hidden_dim=WIDTH,
    intermediate_dim=INNER,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    gradient_checkpointing=False,
)


def run(optimizer: str, layout: str, checkpoint: bool) -> dict[str, Any]:
    def trainer_on(layout: str) -> Trainer:
        config = TrainerConfig(
            id="toy",
            mesh=LAYOUTS[layout],
            train_batch_size=BATCH,
            num_train_steps=STEPS,
            require_accelerator=False,
            tracker=NoopConfig(),
            log_jaxprs=False,
            log_xla_hlo=False,
            load_checkpoint=False,
        )
        loss = lambda model, example, *, key=None: model.compute_next_token_loss(example, key=key)
        return Trainer(config, OPTIMIZERS[optimizer].build(STEPS), loss)

    def initial_state(trainer: Trainer):
        build = lambda: MODEL.build(Axis("vocab", VOCABULARY), key=jax.random.key(1))
        return trainer.initial_state(jax.random.PRNGKey(0), model_init=build)

    tokens_axes = (Axis("batch", BATCH), Axis("position", LENGTH))
    with trainer_on(layout) as trainer, compile_seconds() as seconds:
        state = initial_state(trainer)
        at_init = bytes_of(state.opt_state)
        losses = []
        for step in range(STEPS):
            tokens = hax.random.randint(jax.random.key(step), tokens_axes, 0, VOCABULARY)
            info = trainer.train_step(state, hax.vmap(LmExample.causal, "batch")(tokens))
            state = info.state
            losses.append(float(info.loss))
    result = {**bytes_of(state.opt_state), "losses": losses, **seconds}
    assert {**result, **at_init} == result, "the state is sharded otherwise after a step"
    if checkpoint:
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save_checkpoint(state.opt_state, STEPS, folder)
            for name, other in (("same", layout), ("other", "FSDP 4 x TP 2")):
                with trainer_on(other) as trainer:
                    fresh = initial_state(trainer).opt_state
                    mapping, mesh = trainer.parameter_axis_mapping, trainer.device_mesh
                    restored = checkpoints.load_checkpoint(
                        fresh, folder, axis_mapping=mapping, mesh=mesh
                    )
                result[f"restored on the {name} mesh"] = equal(state.opt_state, restored)
    return result
