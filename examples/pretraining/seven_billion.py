"""Train all weights of Llama 7B on one GPU, in 24 GiB.

    python examples/pretraining/seven_billion.py --attention cudnn     200 steps on Python's sources
    python examples/pretraining/seven_billion.py --limit 20            in 20 GiB of GPU memory
    python examples/pretraining/seven_billion.py --dataset c4 --tokenizer t5-base     on C4
    python examples/pretraining/seven_billion.py --size tiny --rank 32 --seq-len 64   on a laptop

AdamW with weights, gradients and moments in bfloat16 needs 54 GB without activations. Here:

    weights      bfloat16 without a float32 copy; updates are rounded stochastically
                 (natgalore.stochastic_rounding), so that small updates are not lost
    gradients    cores of r x n from the backward pass instead of m x n
                 (natgalore.value_and_grad), summed over micro-batches
    state        moments and bases of the cores in 8 bits (natgalore.quantized)
    activations  recomputed per layer in the backward pass, one micro-batch at a time
    updates      one stack of eight layers at a time, since a stack is one array

There is no layer-wise update, so gradients can be summed over micro-batches; the training step is
that of pretrain.py. JAX can allocate --limit GiB only, so a step that needs more fails. The log has
peak_bytes_in_use with each loss. A checkpoint needs 15 GB of disk space: --save-every 0 saves none.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import optax

import natgalore_jax as natgalore
from examples.common import command_line, llama
from examples.common.command_line import one_of, shown_as, unset
from examples.pretraining import pretrain, settings


VOCABULARY = 32_000
LAYERS_IN_A_STACK = 8
ROLES = ("linear", "square", "basis")


def galore_in_8_bits(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
    """GaLore with 8-bit state and stochastic rounding of the weights."""
    galore = settings.low_rank(natgalore.galore)(schedule, config)
    return optax.chain(
        natgalore.quantized(galore, ROLES, seed=config.seed),
        natgalore.stochastic_rounding(seed=config.seed),
    )


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of a run with little memory."""

    OPTIMIZERS: ClassVar = {"galore": settings.Recipe(1e-3, galore_in_8_bits)}
    CHANGEABLE: ClassVar = (*settings.Config.CHANGEABLE, "limit")

    optimizer: Annotated[str | None, unset(OPTIMIZERS)] = None
    """Optimizer: 8-bit GaLore is the only one in this example."""
    lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate, after linear warm-up (a tenth of the steps), before cosine decay to a
    tenth. Default: 0.001."""
    size: Annotated[str, one_of(llama.CONFIGS)] = "7b"
    """Model size: number of parameters (tiny: 0.9 million)."""
    limit: float = 24.0
    """GPU memory that JAX may allocate, in GiB; 0: JAX's default, three quarters of the memory."""
    vocabulary: Annotated[int | None, unset("INT")] = None
    """Vocabulary size of the model. Default: 32,000 for bytes, as in the papers; for c4 that of the
    tokenizer, rounded up to a multiple of 128."""
    steps: int = 200
    """Number of training steps."""
    seq_len: int = 2048
    """Tokens per sequence."""
    batch_size: int = 4
    """Sequences per batch."""
    micro_batches: int = 4
    """Micro-batches per batch, computed one after the other to save memory."""
    rank: Annotated[int | None, shown_as("INT")] = 256
    """Rank of the projection."""
    refresh_every: int = 200
    """Steps between two refreshes of the bases."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and matmuls; weights are bfloat16."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Implementation of attention; cudnn (NVIDIA GPUs, bfloat16) is faster and uses less memory."""
    scan: bool = True
    """Stack the layers and scan over them: deep models compile faster."""
    remat: bool = True
    """Recompute activations in the backward pass, to save memory."""
    low_rank_gradients: bool = True
    """Compute gradients of projected weights as cores, without forming full gradients."""
    save_every: int = 1000
    """Steps between two checkpoints (15 GB at 7b); one more is saved at the end and on Ctrl-C. 0:
    save none."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.limit < 2**20:
            raise ValueError(f"--limit must not be negative, got {self.limit}")

    @property
    def model(self) -> llama.LlamaConfig:
        model = super().model
        stacks = max(1, model.layers // LAYERS_IN_A_STACK)
        return replace(model, stacks=stacks, param_dtype=jnp.bfloat16, attention=self.attention)


def from_command_line() -> Config:
    """Reads the command line and sets JAX's memory limit before its devices are initialised.

    Raises:
        ValueError: an argument is invalid, or the GPU has less memory than --limit.
    """
    config = command_line.from_command_line(Config, __doc__)
    if config.vocabulary is None and config.dataset == "text":
        config = replace(config, vocabulary=VOCABULARY)
    total = gpu_bytes()
    if config.limit and total:
        if config.limit * 2**30 > total:
            raise ValueError(
                f"--limit is {config.limit:g} GiB, but the GPU has {total / 2**30:.1f} GiB"
            )
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{config.limit * 2**30 / total:.6f}"
    return config


def gpu_bytes() -> int:
    """Memory in bytes of the first NVIDIA GPU visible to JAX; 0 without one."""
    if not shutil.which("nvidia-smi"):
        return 0
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(
        ["nvidia-smi", f"--id={first}", *query], capture_output=True, text=True, check=False
    )
    return int(answer.stdout.strip()) * 2**20 if answer.returncode == 0 else 0


def main() -> None:
    pretrain.run(from_command_line, pretrain.make_functions)


if __name__ == "__main__":
    main()
