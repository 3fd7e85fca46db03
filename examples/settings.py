"""The settings of a run: what the command line can say, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import command_line
import data
import jax.numpy as jnp
import llama
import optax
from command_line import flag, one_of

import natgalore_jax as natgalore


class Recipe(NamedTuple):
    """An optimizer as a function of its schedule and the config, and its usual learning rate."""

    learning_rate: float
    make: Callable[[optax.Schedule, "Config"], optax.GradientTransformation]


RESIDUALS = {"none": None, "isotropic": "isotropic", "whitened": "whitened", "fira": "fira"}


def low_rank(recipe: Callable[..., optax.GradientTransformation]):
    """One of natgalore's recipes, with the settings of the config."""

    def make(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
        given = {} if config.residual is None else {"residual": RESIDUALS[config.residual]}
        if config.low_rank_gradients:  # no whole gradient; a refresh of one costs as much as of all
            given = {"residual": None, "stagger": False}
        return recipe(
            schedule,
            rank=config.rank,
            refresh_every=config.refresh_every,
            weight_decay=config.weight_decay,
            seed=config.seed,
            **given,
        )

    return make


def contrib_galore(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
    """Optax's own GaLore, on the matrices that natgalore projects: those of the layers."""
    return optax.contrib.galore(
        schedule,
        rank=config.rank,
        update_proj_gap=config.refresh_every,
        weight_decay=config.weight_decay,
        weight_dimension_numbers=llama.galore_dimension_numbers,
    )


OPTIMIZERS = {
    "natural_galore": Recipe(5e-3, low_rank(natgalore.natural_galore)),
    "galore": Recipe(2.5e-3, low_rank(natgalore.galore)),
    "adamw": Recipe(2e-3, lambda schedule, c: optax.adamw(schedule, weight_decay=c.weight_decay)),
    "contrib_galore": Recipe(5e-3, contrib_galore),
}


PROJECTING = ("natural_galore", "galore")  # natgalore's


@dataclass(frozen=True)
class Config(command_line.Run):
    """Pre-train a Llama on text, byte by byte."""

    CHANGEABLE: ClassVar = (*command_line.Run.CHANGEABLE, "text", "prompt")
    PATHS: ClassVar = ("text",)
    OPTIMIZERS: ClassVar = OPTIMIZERS
    COUNTS: ClassVar = (*command_line.Run.COUNTS, "steps", "seq_len")

    optimizer: Annotated[str | None, one_of(OPTIMIZERS)] = None
    """Which optimizer; contrib_galore is Optax's own GaLore. Default: natural_galore."""
    lr: float | None = None
    """Peak learning rate, after a linear warm-up and before a cosine decay to a tenth of it.
    Default: one that suits the optimizer."""
    rank: int | None = None
    """Rank of the projected gradients. Default: a quarter of the model's width."""
    seed: int = 0
    """Seed of the initial weights, of the batches, of the first projections and of the sample."""
    out: Path | None = None
    """Folder for log, checkpoint, figure and sample. Default: a new folder in runs/."""
    size: Annotated[str, one_of(llama.CONFIGS)] = "tiny"
    """Size of the model."""
    residual: Annotated[str | None, one_of(RESIDUALS)] = None
    """What becomes of what the projections leave out. Default: whitened for natural_galore, none
    for galore, and none with --low-rank-gradients."""
    low_rank_gradients: bool = False
    """Take the gradients of projected weights as cores, never whole; refresh all at once."""
    steps: int = 700
    """Number of training steps."""
    seq_len: int = 128
    """Bytes in a sequence."""
    text: Path | None = None
    """A text file or a folder of them. Default: the sources of the Python standard library."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls; the weights are float32."""
    scan: bool = False
    """Stack the layers and scan over them: compiles faster when the model is deep."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    prompt: str = "def "
    """What the sample at the end begins with."""

    def check(self) -> None:
        """Raises a ValueError that names the first argument that makes no sense."""
        if self.size not in llama.CONFIGS:
            raise ValueError(f"--size must be one of {', '.join(llama.CONFIGS)}, got {self.size!r}")
        super().check()
        if self.scan and "contrib_galore" in self.optimizers:
            raise ValueError("optimizer contrib_galore cannot project stacked layers (--scan)")
        ours = {*self.optimizers} & {*PROJECTING}
        for name in ("residual", "low_rank_gradients"):
            if getattr(self, name) and not ours:
                raise ValueError(f"{flag(name)} is for {' and '.join(PROJECTING)}")
        if self.residual is not None and self.residual not in RESIDUALS:
            known = ", ".join(RESIDUALS)
            raise ValueError(f"--residual must be one of {known}, got {self.residual!r}")
        if self.residual not in (None, "none") and self.low_rank_gradients:
            raise ValueError("--residual needs whole gradients, --low-rank-gradients forms none")
        if not self.prompt:
            raise ValueError("--prompt must not be empty")

    @property
    def model(self) -> llama.LlamaConfig:
        return replace(
            llama.CONFIGS[self.size],
            vocabulary=data.VOCABULARY,
            scan=self.scan,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
        )

    def fill(self, name: str) -> dict[str, Any]:
        rank = self.model.hidden // 4 if self.rank is None else self.rank
        return super().fill(name) | {"rank": rank}

    def make_optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.lr,
            warmup_steps=self.steps // 10,
            decay_steps=self.steps,
            end_value=self.lr / 10,
        )
        return self.OPTIMIZERS[self.optimizer].make(schedule, self)
