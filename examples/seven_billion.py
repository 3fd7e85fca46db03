"""Train all weights of Llama 7B on one GPU, in 24 GiB.

    python examples/seven_billion.py                    200 steps on Python's sources
    python examples/seven_billion.py --limit 20         in 20 GiB of the GPU's memory
    python examples/seven_billion.py --size tiny --rank 32    the same path, a minute on a laptop
    python examples/seven_billion.py --help             everything else, as for pretrain.py

AdamW with everything in bfloat16 needs 54 GB before the first activation. What is done here:

    weights      bfloat16 without a float32 copy; their sums are rounded at random
                 (`natgalore.stochastic_rounding`), so that small updates are not lost
    gradients    never m x n, but cores of r x n from the backward pass
                 (`natgalore.value_and_grad`), summed over the sequences of a batch
    state        moments and bases of those cores in 8 bits (`natgalore.quantized`)
    activations  of a layer, recomputed in the backward pass, one sequence at a time
    updates      of a stack of eight layers at a time: a stack is one array

No layer-wise update, so gradients can be summed over sequences, and the step is an ordinary one:
gradients, `tx.update`, `optax.apply_updates`. The allocator is given --limit and no more, so a step
that needs more fails; the log has `peak_bytes_in_use` beside each loss.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import command_line
import jax
import jax.numpy as jnp
import llama
import optax
import pretrain
import settings
from command_line import one_of
from flax import nnx
from loop import TrainState

import natgalore_jax as natgalore


VOCABULARY = 32_000  # as in the papers, though a byte needs 256 of them
LAYERS_IN_A_STACK = 8
ROLES = ("linear", "square", "basis")


def galore_in_8_bits(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
    galore = natgalore.galore(
        schedule,
        rank=config.rank,
        refresh_every=config.refresh_every,
        weight_decay=config.weight_decay,
        seed=config.seed,
        stagger=False,  # a refresh costs its passes for one matrix as for all
    )
    return optax.chain(
        natgalore.quantized(galore, ROLES, seed=config.seed),
        natgalore.stochastic_rounding(seed=config.seed),
    )


@dataclass(frozen=True)
class Config(settings.Config):
    """Train all weights of a Llama in as little memory as we can, byte by byte."""

    OPTIMIZERS: ClassVar = {"galore": settings.Recipe(1e-3, galore_in_8_bits)}
    CHANGEABLE: ClassVar = (*settings.Config.CHANGEABLE, "limit")

    optimizer: Annotated[str | None, one_of(OPTIMIZERS)] = None
    """GaLore in 8 bits, the only one here."""
    size: Annotated[str, one_of(llama.CONFIGS)] = "7b"
    """Size of the model."""
    limit: float = 24.0
    """GiB of the GPU's memory that JAX may take; 0 for all."""
    steps: int = 200
    """Number of training steps."""
    seq_len: int = 2048
    """Bytes in a sequence."""
    batch_size: int = 4
    """Sequences in a batch; they pass one after the other."""
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
        return replace(
            model,
            vocabulary=VOCABULARY,
            scan=True,
            stacks=max(1, model.layers // LAYERS_IN_A_STACK),
            remat=True,
            param_dtype=jnp.bfloat16,
            attention=self.attention,
        )


def from_command_line() -> Config:
    """Reads the command line, and sets JAX's memory before its devices start.

    Raises:
        ValueError: something makes no sense, or the GPU has less than --limit.
    """
    config = command_line.from_command_line(Config)
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


def make_functions(config: Config) -> pretrain.Functions:
    """The functions of a run."""
    structure = llama.structure(config.model)
    tx = config.make_optimizer()

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return llama.next_token_loss(nnx.merge(structure, params), tokens)

    gradients = natgalore.value_and_grad(
        loss_fn, tx, micro_batches=config.batch_size, on_fallback="error"
    )
    apart = lambda tokens: tokens[:, None]  # each sequence a micro-batch

    @jax.jit
    def init(key):
        model = llama.Llama(config.model, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(params, tx.init(params))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, tokens):
        (loss, grads), opt_state = gradients(state.params, state.opt_state, apart(tokens))
        updates, opt_state = tx.update(grads, opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    @jax.jit
    def validation_loss(params, tokens):
        return jax.lax.map(partial(loss_fn, params), apart(tokens)).mean()

    return pretrain.Functions(init, train_step, validation_loss)


def main() -> None:
    pretrain.run(from_command_line, make_functions)


if __name__ == "__main__":
    main()
