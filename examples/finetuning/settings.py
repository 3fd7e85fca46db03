"""Settings of a fine-tuning run and the optimizers it can use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import optax
import optax.contrib

import natgalore_jax as natgalore
from examples.common import command_line, llama
from examples.common.command_line import flag, shown_as, unset


@dataclass(frozen=True)
class Config(command_line.Run):
    """Settings of all fine-tuning runs."""

    CHANGEABLE: ClassVar = (*command_line.Run.CHANGEABLE, "model", "data")
    PATHS: ClassVar = ("model", "data")
    COUNTS: ClassVar = (*command_line.Run.COUNTS, "epochs", "steps", "max_length")

    model: Annotated[Path | None, unset("FOLDER")] = None
    """Folder with config.json, model.safetensors and tokenizer.json. Required."""
    data: Annotated[Path | None, unset("FOLDER")] = None
    """Folder with the records. Required."""
    skip_malformed: bool = False
    """Skip malformed records instead of stopping with an error."""
    rank: Annotated[int | None, shown_as("INT")] = 4
    """Rank of the projection, and of LoRA."""
    scale: Annotated[float | None, shown_as("FLOAT")] = 4.0
    """Factor on the updates of projected weights."""
    fisher: Literal["core", "window", "none"] = "core"
    """Fisher stage of natural_galore; window is the paper's form."""
    residual: Literal["none", "whitened"] = "none"
    """Residual of natural_galore; whitened orthogonalises the rest of each gradient."""
    freeze_embeddings: bool = False
    """Keep the embeddings fixed, as lora does; a head tied to them too."""
    epochs: int = 30
    """Passes over the training records."""
    steps: Annotated[int | None, unset("INT")] = None
    """Number of training steps. Default: --epochs passes over the records."""
    max_length: int = 512
    """Maximum tokens per record; longer records are truncated."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls; weights are float32."""

    def check(self) -> None:
        super().check()
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"--scale must be above 0 and finite, got {self.scale}")
        for name in ("model", "data"):
            path = getattr(self, name)
            if path is None and not self.resume:
                raise ValueError(f"{flag(name)} is required: {getattr(self, f'get_{name}')()}")

    def make_optimizer(self) -> optax.GradientTransformation:
        return self.OPTIMIZERS[self.optimizer].make(self.schedule(self.lr), self)

    def schedule(self, peak: float) -> optax.Schedule:
        """Linear warm-up over 6 % of the steps (as in RoBERTa), then linear decay to zero."""
        steps = self.steps or 100
        warmup = max(1, steps * 6 // 100)
        up = optax.linear_schedule(0.0, peak, warmup)
        return optax.join_schedules(
            [up, optax.linear_schedule(peak, 0.0, steps - warmup)], [warmup]
        )


class Recipe(NamedTuple):
    """An optimizer as a function of schedule and config, and its default learning rate."""

    learning_rate: float
    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]


def low_rank(schedule: optax.Schedule, config: Config, **settings: Any):
    """natural_galore with b2 = 0.999, as AdamW has here and the paper has."""
    scale = 4.0 if settings["residual"] is None else 1.0
    return natgalore.natural_galore(
        schedule,
        rank=config.rank,
        scale=scale if config.scale is None else config.scale,
        refresh_every=config.refresh_every,
        weight_decay=config.weight_decay,
        b2=0.999,
        seed=config.seed,
        **settings,
    )


def natural(schedule: optax.Schedule, config: Config) -> optax.GradientTransformation:
    """natural_galore with the Fisher stage and the residual of the config."""
    given = lambda name: None if name == "none" else name
    return low_rank(schedule, config, fisher=given(config.fisher), residual=given(config.residual))


def adamw(schedule: optax.Schedule, config: Config) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=config.weight_decay)


def with_head(
    tx: optax.GradientTransformation, head: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`head` for the module `classifier`, `tx` for all other weights."""
    labels = lambda params: {name: "head" if name == "classifier" else "rest" for name in params}
    return optax.partition({"head": head, "rest": tx}, labels)


def muon(schedule: optax.Schedule, config: Config) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, AdamW for the rest, at one rate (arXiv 2502.16982)."""
    return optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=llama.muon_dimension_numbers,
        consistent_rms=0.2,
    )


def optimizers(**learning_rates: float) -> dict[str, Recipe]:
    """The optimizers with default learning rates by name."""
    makers = {
        "natural_galore": natural,
        "galore": partial(low_rank, fisher=None, residual=None),
        "adamw": adamw,
        "lora": adamw,
        "muon": muon,
    }
    return {name: Recipe(learning_rates[name], make) for name, make in makers.items()}
