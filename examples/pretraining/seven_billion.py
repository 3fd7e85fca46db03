"""Train all weights of Llama 7B on one GPU, in 24 GiB.

    python examples/pretraining/seven_billion.py --attention cudnn     200 steps on Python's sources
    python examples/pretraining/seven_billion.py --limit 20            in 20 GiB of the GPU's memory
    python examples/pretraining/seven_billion.py --dataset c4 --tokenizer t5-base  as in pretrain.py
    python examples/pretraining/seven_billion.py --size tiny --rank 32 --seq-len 64  on a laptop
    python examples/pretraining/seven_billion.py --help                everything else

AdamW with everything in bfloat16 needs 54 GB before the first activation. What is done here:

    weights      bfloat16 without a float32 copy; their sums are rounded at random
                 (`natgalore.stochastic_rounding`), so that small updates are not lost
    gradients    never m x n, but cores of r x n from the backward pass
                 (`natgalore.value_and_grad`), summed over the micro-batches of a batch
    state        moments and bases of those cores in 8 bits (`natgalore.quantized`)
    activations  of a layer, recomputed in the backward pass, of one micro-batch at a time
    updates      of a stack of eight layers at a time: a stack is one array

No layer-wise update, so gradients can be summed over micro-batches; the step is that of pretrain.py
and this file only says what is stored how. The allocator is given --limit and no more, so a step
that needs more fails; the log has `peak_bytes_in_use` beside each loss.
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
from examples.common.command_line import one_of
from examples.pretraining import pretrain, settings


VOCABULARY = 32_000
LAYERS_IN_A_STACK = 8
ROLES = ("linear", "square", "basis")


def galore_in_8_bits(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
    galore = settings.low_rank(natgalore.galore)(schedule, config)
    return optax.chain(
        natgalore.quantized(galore, ROLES, seed=config.seed),
        natgalore.stochastic_rounding(seed=config.seed),
    )


@dataclass(frozen=True)
class Config(settings.Config):
    """Train all weights of a Llama in as little memory as we can."""

    OPTIMIZERS: ClassVar = {"galore": settings.Recipe(1e-3, galore_in_8_bits)}
    CHANGEABLE: ClassVar = (*settings.Config.CHANGEABLE, "limit")

    optimizer: Annotated[str | None, one_of(OPTIMIZERS)] = None
    """GaLore in 8 bits, the only one here."""
    size: Annotated[str, one_of(llama.CONFIGS)] = "7b"
    """Size of the model."""
    limit: float = 24.0
    """GiB of the GPU's memory that JAX may take; 0 for three quarters of all, its default."""
    vocabulary: int | None = None
    """Tokens that the model has room for. Default: those of the tokenizer, in multiples of 128, and
    of bytes 32,000, as in the papers."""
    steps: int = 200
    """Number of training steps."""
    seq_len: int = 2048
    """Tokens in a sequence."""
    batch_size: int = 4
    """Sequences in a batch."""
    micro_batches: int = 4
    """Parts of a batch that are computed one after the other, to save memory."""
    rank: int | None = 256
    """Rank of the projected gradients."""
    refresh_every: int = 200
    """Steps between two refreshes of the projections."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and matmuls; the weights are bfloat16."""
    attention: Literal["xla", "cudnn"] = "xla"
    """What computes attention; cudnn is NVIDIA's, faster and smaller, for bfloat16 on its GPUs."""
    scan: bool = True
    remat: bool = True
    low_rank_gradients: bool = True
    save_every: int = 1000
    """Steps between two checkpoints, 15 GB at 7b; there is one at the end as well."""

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
    """Reads the command line, and sets JAX's memory before its devices start.

    Raises:
        ValueError: something makes no sense, or the GPU has less than --limit.
    """
    config = command_line.from_command_line(Config)
    if config.vocabulary is None and config.dataset == "text":
        config = replace(config, vocabulary=VOCABULARY)
    total = gpu_bytes()
    if config.limit and total:
        if config.limit * 2**30 > total:
            raise ValueError(f"--limit {config.limit:g} GiB, but the GPU has {total / 2**30:.1f}")
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{config.limit * 2**30 / total:.6f}"
    return config


def gpu_bytes() -> int:
    """The memory of the first of NVIDIA's GPUs that JAX would see; 0 where there is none."""
    if not shutil.which("nvidia-smi"):
        return 0
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(
        ["nvidia-smi", f"--id={first}", *query], capture_output=True, text=True, check=False
    )
    return int(said.stdout.strip()) * 2**20 if said.returncode == 0 else 0


def main() -> None:
    pretrain.run(from_command_line, pretrain.make_functions)


if __name__ == "__main__":
    main()
