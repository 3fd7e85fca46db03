"""Settings of a fine-tuning run and the optimizers it can use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import optax

import natgalore_jax as natgalore
from examples.common import command_line
from examples.common.command_line import flag


@dataclass(frozen=True)
class Config(command_line.Run):
    """Fine-tune a model."""

    CHANGEABLE: ClassVar = (*command_line.Run.CHANGEABLE, "model", "data")
    PATHS: ClassVar = ("model", "data")
    COUNTS: ClassVar = (*command_line.Run.COUNTS, "epochs", "steps", "max_length")

    model: Path | None = None
    """Folder with config.json, model.safetensors and tokenizer.json."""
    data: Path | None = None
    """Folder with the records."""
    skip_malformed: bool = False
    """Leave out records that cannot be read, instead of refusing them."""
    rank: int | None = 4
    """Rank of the projected gradients, and of LoRA."""
    scale: float = 4.0
    """Of the projected weights' updates."""
    fisher: Literal["core", "window", "none"] = "core"
    """Natural GaLore's Fisher: core, or window as in the paper."""
    epochs: int = 30
    """Times that each record is seen."""
    steps: int | None = None
    """Training steps, in place of --epochs."""
    max_length: int = 512
    """Tokens of a record at most; what is longer is cut off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls; the weights are float32."""

    def check(self) -> None:
        super().check()
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"--scale must be above 0 and finite, got {self.scale}")
        for name in ("model", "data"):
            path = getattr(self, name)
            if path is None and not self.resume:  # which knows it
                raise ValueError(f"{flag(name)} is needed: {getattr(self, f'get_{name}')()}")

    def make_optimizer(self) -> optax.GradientTransformation:
        return self.OPTIMIZERS[self.optimizer].make(self.schedule(), self)

    def schedule(self) -> optax.Schedule:
        """Up within 6 % of the steps, as for RoBERTa, and down to zero, both in a line."""
        steps = self.steps or 100
        warmup = max(1, steps * 6 // 100)
        up = optax.linear_schedule(0.0, self.lr, warmup)
        return optax.join_schedules(
            [up, optax.linear_schedule(self.lr, 0.0, steps - warmup)], [warmup]
        )


class Recipe(NamedTuple):
    """An optimizer as a function of its schedule and the config, and its usual learning rate."""

    learning_rate: float
    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]


def low_rank(schedule: optax.Schedule, config: Config, **settings: Any):
    return natgalore.natural_galore(
        schedule,
        rank=config.rank,
        scale=config.scale,
        refresh_every=config.refresh_every,
        weight_decay=config.weight_decay,
        residual=None,
        seed=config.seed,
        **settings,
    )


def natural(schedule: optax.Schedule, config: Config) -> optax.GradientTransformation:
    fisher = None if config.fisher == "none" else config.fisher
    return low_rank(schedule, config, fisher=fisher)


def adamw(schedule: optax.Schedule, config: Config) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=config.weight_decay)


def optimizers(**learning_rates: float) -> dict[str, Recipe]:
    """The four, at these learning rates."""
    makers = {
        "natural_galore": natural,
        "galore": partial(low_rank, fisher=None),
        "adamw": adamw,
        "lora": adamw,
    }
    return {name: Recipe(learning_rates[name], make) for name, make in makers.items()}
