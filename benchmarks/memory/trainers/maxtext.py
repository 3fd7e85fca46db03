"""MaxText's own train_loop, with examples/trainers/maxtext.patch applied to a copy of it.

Needs `pip install maxtext==0.2.5` without its pinned dependencies, see bench_trainers.py. The
layouts whose name begins with "Linen" need the last commit with a Linen model (e591f30 of
AI-Hypercomputer/maxtext): its `src/maxtext` is read from the folder in MAXTEXT_LINEN.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

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


PATCH = Path(__file__).parents[3] / "examples/trainers/maxtext.patch"
FSDP = {"ici_fsdp_parallelism": 8}
LINEN = {"enable_nnx": False, "pure_nnx": False, "pure_nnx_decoder": False}
TOY = {
    "run_name": "toy",
    "base_num_decoder_layers": LAYERS,
    "base_emb_dim": WIDTH,
    "base_mlp_dim": INNER,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_target_length": LENGTH,
    "learning_rate_schedule_steps": STEPS,
    "dataset_type": "synthetic",
    "dtype": "float32",
    "hardware": "cpu",
    "attention": "dot_product",
    "sharding_tolerance": 1.0,
    "jax_cache_dir": "",
    "async_checkpointing": False,
    "skip_jax_distributed_system": True,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "enable_tensorboard": False,
    "log_config": False,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP 8": FSDP,
    "FSDP 4 x TP 2": {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2},
    "ZeRO-1 over 8": {
        "ici_fsdp_parallelism": 1,
        "ici_data_parallelism": 8,
        "shard_optimizer_over_data": True,
    },
    "FSDP 8, unscanned": {**FSDP, "scan_layers": False},
    "Pipeline 2 x FSDP 4": {
        "ici_pipeline_parallelism": 2,
        "ici_fsdp_parallelism": 4,
        "num_layers_per_pipeline_stage": LAYERS // 2,
        "num_pipeline_microbatches": 2,
    },
    "FSDP 8, Explicit axes": {**FSDP, "shard_mode": "explicit"},
    "FSDP 8, 2 micro-batches": {**FSDP, "gradient_accumulation_steps": 2},
    "FSDP 8, spikes skipped": {**FSDP, "skip_step_on_spikes": True},
    "Linen, FSDP 8": {**LINEN, **FSDP},
    "Linen, FSDP 4 x TP 2": {**LINEN, "ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2},
}


def patched_copy(folder: Path, linen: bool) -> None:
    """MaxText with the recipe's patch, first on sys.path."""
    if linen:
        source = Path(os.environ["MAXTEXT_LINEN"])
    else:
        source = Path(importlib.util.find_spec("maxtext").origin).parent
    shutil.copytree(source, folder / "maxtext", ignore=shutil.ignore_patterns("assets", "m3"))
    subprocess.run(["patch", "-p1", "-s", "-i", PATCH], cwd=folder, check=True)
    sys.path.insert(0, str(folder))


def run(optimizer: str, layout: str, checkpoint: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        patched_copy(Path(folder), layout.startswith("Linen"))
        import maxtext
        from maxtext.configs import pyconfig
        from maxtext.trainers.pre_train import train
        from maxtext.utils import train_utils

        base = Path(maxtext.__file__).parent / "configs/base.yml"

        def config(steps: int, **settings: Any):
            return pyconfig.initialize(
                ["", str(base)],
                **TOY,
                opt_type=optimizer,
                base_output_directory=f"{folder}/out",
                enable_checkpointing=checkpoint,
                per_device_batch_size=BATCH // jax.device_count(),
                steps=steps,
                **settings,
            )

        settings = LAYOUTS[layout]
        metrics = Path(folder) / "metrics.jsonl"
        with compile_seconds() as seconds:
            state = train.train_loop(config(STEPS, metrics_file=str(metrics), **settings), None)
        trained = optimizer_state(state)
        losses = [json.loads(line)["learning/loss"] for line in metrics.read_text().splitlines()]
        result = {**bytes_of(trained), "losses": losses, **seconds}
        if checkpoint:
            other = {**settings, "ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2}
            for name, mesh in (("same", settings), ("other", other)):
                *_, state = train_utils.setup_train_loop(config(STEPS + 1, **mesh), None)
                result[f"restored on the {name} mesh"] = equal(trained, optimizer_state(state))
        return result


def optimizer_state(state: Any) -> Any:
    """The optimizer's state in MaxText's train state, of NNX or Linen."""
    return state.opt_state if hasattr(state, "opt_state") else state.optimizer.opt_state
