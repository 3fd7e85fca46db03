"""nanodo's own train step (Linen, `nn.with_partitioning`) with examples/trainers/nanodo.patch.

nanodo's data loader and metric writers import TensorFlow; they are not used here, so that empty
modules stand in for them.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import types
import unittest.mock
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from .case import (
    BATCH,
    INNER,
    LAYERS,
    LENGTH,
    STEPS,
    VOCABULARY,
    WIDTH,
    bytes_of,
    compile_seconds,
    equal,
)


PATCH = Path(__file__).parents[3] / "examples/trainers/nanodo.patch"
LAYOUTS = ("FSDP 8",)
UNUSED = ("tensorflow", "tensorflow_datasets", "clu.metric_writers", "clu.periodic_actions")


def patched_copy(folder: Path) -> None:
    """nanodo with the recipe's patch, first on sys.path."""
    (source,) = importlib.util.find_spec("nanodo").submodule_search_locations
    shutil.copytree(source, folder / "nanodo")
    subprocess.run(["patch", "-p1", "-s", "-i", PATCH], cwd=folder, check=True)
    sys.path.insert(0, str(folder))


def run(optimizer: str, layout: str, checkpoint: bool) -> dict[str, Any]:
    del layout  # nanodo has one mesh axis
    folder = Path(tempfile.mkdtemp())
    patched_copy(folder)
    with unittest.mock.patch.dict(sys.modules, {name: types.ModuleType(name) for name in UNUSED}):
        from nanodo import model_factory, train
        from nanodo.configs import default

    c = default.get_config()
    c.batch_size = BATCH
    c.model.update(D=WIDTH, H=4, L=LENGTH, N=LAYERS, F=INNER, dtype="float32")
    c.opt.update(
        optimizer=optimizer,
        warmup_steps=1,
        num_train_steps=STEPS,
    )
    model, get_loss_fn = model_factory.get_model_and_loss(c, VOCABULARY)

    def new_trainer(mesh: Mesh):
        shardings, state = train._init_train_state(c, model, rng=jax.random.PRNGKey(0), mesh=mesh)
        return train.Trainer(
            c=c, state=state, mesh=mesh, shardings=shardings, get_loss_fn=get_loss_fn
        )

    def opt_state(trainer: Any) -> Any:
        state = trainer.state.opt_state  # of MultiSteps, whose sums are no optimizer state
        return state.inner_opt_state

    rng = np.random.default_rng(0)
    mesh = Mesh(jax.devices(), ("data",))
    losses = []
    with compile_seconds() as seconds:
        trainer = new_trainer(mesh)
        for step in range(STEPS):
            tokens = rng.integers(1, VOCABULARY, (BATCH, LENGTH), dtype=np.int32)
            losses.append(float(trainer.do_step(step, tokens)["train_loss"]))
    result = {**bytes_of(opt_state(trainer)), "losses": losses, **seconds}
    if checkpoint:
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        saver.save(folder / "checkpoint", trainer.state)
        for name, devices in (("same", jax.devices()), ("other", jax.devices()[:4])):
            fresh = new_trainer(Mesh(devices, ("data",))).state
            arguments = ocp.checkpoint_utils.construct_restore_args(fresh)
            restored = saver.restore(folder / "checkpoint", item=fresh, restore_args=arguments)
            result[f"restored on the {name} mesh"] = equal(trainer.state, restored)
    shutil.rmtree(folder)
    return result
