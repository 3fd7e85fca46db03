"""MaxText's own models in full size on a mesh of eight devices: shapes and shardings, no arrays."""

import math
import tempfile
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from .maxtext import LAYOUTS as MESHES, TOY, patched_copy


LAYOUTS = {
    "Llama 3 8B, FSDP 8": ("llama3-8b", "FSDP 8"),
    "Llama 3 8B, FSDP 4 x TP 2": ("llama3-8b", "FSDP 4 x TP 2"),
    "Gemma 2 2B, FSDP 8": ("gemma2-2b", "FSDP 8"),
    "Mixtral 8x7B, FSDP 8": ("mixtral-8x7b", "FSDP 8"),
    "DeepSeek-V2 16B, FSDP 8": ("deepseek2-16b", "FSDP 8"),
}
SIZES = ("head_dim", "vocab_size", "max_target_length")  # of the model, not of the toy


def run(optimizer: str, layout: str, checkpoint: bool) -> dict[str, Any]:
    del checkpoint
    model, mesh_name = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        patched_copy(Path(folder), linen=False)
        import maxtext
        from maxtext.common import train_state_nnx
        from maxtext.configs import pyconfig
        from maxtext.utils import maxtext_utils, model_creation_utils, train_utils

        own = {k: v for k, v in TOY.items() if not k.startswith("base_") and k not in SIZES}
        config = pyconfig.initialize(
            ["", str(Path(maxtext.__file__).parent / "configs/base.yml")],
            **own,
            **MESHES[mesh_name],
            model_name=model,
            opt_type=optimizer,
            enable_checkpointing=False,
            per_device_batch_size=1,
            steps=1,
        )
        mesh = maxtext_utils.get_mesh_from_config(config, None)
        create, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh, None)
        _, tx = train_utils.create_training_optimizer(config, abstract, mesh)

        def init():
            model = create()
            return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

        state, _, shardings = maxtext_utils.get_abstract_state(config, mesh, init, True)
    arrays = list(
        zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(shardings.optimizer), strict=True)
    )
    size = lambda shape, x: math.prod(shape) * x.dtype.itemsize
    return {
        "total_bytes": sum(size(x.shape, x) for x, _ in arrays),
        "device_bytes": sum(size(s.shard_shape(x.shape), x) for x, s in arrays),
        "arrays": len(arrays),
    }
