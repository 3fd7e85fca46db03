"""Settings of a pre-training run and the optimizers it can use."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax.numpy as jnp
import optax

import natgalore_jax as natgalore
from examples.common import command_line, data, llama
from examples.common.command_line import flag, one_of, unset
from examples.pretraining import paper_presets


class Recipe(NamedTuple):
    """An optimizer as a function of schedule and config, and its default learning rate."""

    learning_rate: float
    make: Callable[[optax.Schedule, "Config"], optax.GradientTransformation]


RESIDUALS = {"none": None, "isotropic": "isotropic", "whitened": "whitened"}
FISHERS = {"none": None, "core": "core", "window": "window"}


def given(**settings: Any) -> dict[str, Any]:
    """The settings that are not None; for the others the optimizer's own default applies."""
    return {name: value for name, value in settings.items() if value is not None}


def low_rank(recipe: Callable[..., optax.GradientTransformation]):
    """An optimizer of natgalore with the settings of the config."""

    def make(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
        options = given(scale=config.scale, b2=config.b2)
        if config.fisher is not None and recipe is natgalore.natural_galore:
            options |= {"fisher": FISHERS[config.fisher]}
        if config.residual is not None:
            options |= {"residual": RESIDUALS[config.residual]}
        if config.low_rank_gradients:  # no full gradient; one refresh costs as much as all
            options |= {"residual": None, "stagger": False}
        return recipe(
            schedule,
            rank=config.rank,
            refresh_every=config.refresh_every,
            weight_decay=config.weight_decay,
            seed=config.seed,
            **options,
        )

    return make


def adamw(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
    """Optax's AdamW."""
    return optax.adamw(schedule, weight_decay=config.weight_decay, **given(b2=config.b2))


def contrib_galore(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
    """Optax's own GaLore, on the same matrices that natgalore projects."""
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
    "adamw": Recipe(2e-3, adamw),
    "contrib_galore": Recipe(5e-3, contrib_galore),
}


PROJECTING = ("natural_galore", "galore")  # natgalore's optimizers
FOR = {  # optimizers that have a setting
    "residual": PROJECTING,
    "low_rank_gradients": PROJECTING,
    "scale": PROJECTING,
    "fisher": ("natural_galore",),
    "b2": (*PROJECTING, "adamw"),
}
FOR_C4 = ("data", "tokenizer")
PROMPTS = {"text": "def ", "c4": "The weather today"}


@dataclass(frozen=True)
class Config(command_line.Run):
    """Settings of a pre-training run."""

    PATHS: ClassVar = ("text", "data", "tokenizer")
    CHANGEABLE: ClassVar = (*command_line.Run.CHANGEABLE, *PATHS, "prompt", "micro_batches")
    OPTIMIZERS: ClassVar = OPTIMIZERS
    COUNTS: ClassVar = (
        *command_line.Run.COUNTS,
        "steps",
        "seq_len",
        "micro_batches",
        "vocabulary",
    )

    preset: Annotated[str | None, unset(paper_presets.PRESETS)] = None
    """Settings of the paper for this model size (paper_presets.py), including the paper's form of
    natural_galore. Flags given beside it take precedence."""
    dataset: Literal["text", "c4"] = "text"
    """Training data: the bytes of --text, or C4."""
    data: Annotated[Path | None, unset("FOLDER")] = None
    """For c4: folder with c4-train.*.json.gz and c4-validation.*.json.gz. Default: stream C4 from
    the Hub."""
    tokenizer: Annotated[Path | None, unset("PATH")] = None
    """For c4: T5's tokenizer.json, or its folder. Required."""
    vocabulary: Annotated[int | None, unset("INT")] = None
    """Vocabulary size of the model. Default: that of the tokenizer (256 for bytes), rounded up to a
    multiple of 128."""

    optimizer: Annotated[str | None, unset(OPTIMIZERS)] = None
    """Optimizer; contrib_galore is Optax's own GaLore. Default: natural_galore."""
    lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate, after linear warm-up (a tenth of the steps), before cosine decay to a
    tenth. Default: 0.005 for natural_galore and contrib_galore, 0.0025 for galore, 0.002 for
    adamw."""
    rank: Annotated[int | None, unset("INT")] = None
    """Rank of the projection. Default: a quarter of the model's width."""
    seed: int = 0
    """Seed of initial weights, batches, initial bases and generated text."""
    out: Annotated[Path | None, unset("FOLDER")] = None
    """Output folder for log, checkpoint, figure and sample. Default: a new folder in runs/."""
    size: Annotated[str, one_of(llama.CONFIGS)] = "tiny"
    """Model size: number of parameters (tiny: 0.9 million)."""
    scale: Annotated[float | None, unset("FLOAT")] = None
    """Factor on the updates of projected weights. Default: 1."""
    fisher: Annotated[str | None, unset(FISHERS)] = None
    """Fisher stage of natural_galore; window is the paper's form and needs more state than AdamW.
    Default: none."""
    b2: Annotated[float | None, unset("FLOAT")] = None
    """Adam's decay of second moments. Default: 0.95 for natural_galore, 0.999 for the others."""
    residual: Annotated[str | None, unset(RESIDUALS)] = None
    """Treatment of the gradient outside the subspace. Default: whitened for natural_galore, none
    for galore, none with --low-rank-gradients."""
    low_rank_gradients: bool = False
    """Compute gradients of projected weights as cores, without forming full gradients; all bases
    are then refreshed at the same step."""
    steps: int = 700
    """Number of training steps."""
    micro_batches: int = 1
    """Micro-batches per batch, computed one after the other to save memory."""
    seq_len: int = 128
    """Tokens per sequence."""
    text: Annotated[Path | None, unset("PATH")] = None
    """A text file, or a folder of text files. Default: the source code of Python's standard
    library."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls; weights are float32."""
    scan: bool = False
    """Stack the layers and scan over them: deep models compile faster."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    prompt: Annotated[str | None, unset("TEXT")] = None
    """Beginning of the generated sample. Default: "def " for text, "The weather today" for c4."""

    def check(self) -> None:
        """Raises a ValueError that names the first invalid argument."""
        for name, known in (
            ("preset", paper_presets.PRESETS),
            ("size", llama.CONFIGS),
            ("fisher", FISHERS),
            ("residual", RESIDUALS),
        ):
            if (value := getattr(self, name)) is not None and value not in known:
                raise ValueError(f"{flag(name)} must be one of {', '.join(known)}, got {value!r}")
        super().check()
        if self.scan and "contrib_galore" in self.optimizers:
            raise ValueError("optimizer contrib_galore cannot project stacked layers (--scan)")
        for name, having in FOR.items():
            is_given = getattr(self, name) not in (None, False)
            if is_given and not {*self.optimizers} & {*having}:
                raise ValueError(f"{flag(name)} applies only to {' and '.join(having)}")
        if self.residual not in (None, "none") and self.low_rank_gradients:
            raise ValueError("--residual needs full gradients: drop --low-rank-gradients")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"--scale must be above 0 and finite, got {self.scale}")
        if self.b2 is not None and not 0 <= self.b2 < 1:
            raise ValueError(f"--b2 must be at least 0 and below 1, got {self.b2}")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"--batch-size must be a multiple of --micro-batches, {self.micro_batches}, "
                f"got {self.batch_size}"
            )
        for name in ("text",) if self.dataset == "c4" else FOR_C4:
            if getattr(self, name) is not None:
                other = "text" if self.dataset == "c4" else "c4"
                raise ValueError(f"{flag(name)} applies only to --dataset {other}")
        if self.prompt == "":
            raise ValueError("--prompt must not be empty")

    @property
    def model(self) -> llama.LlamaConfig:
        """Shape of the model."""
        return replace(
            llama.CONFIGS[self.size],
            vocabulary=self.vocabulary or data.VOCABULARY,
            scan=self.scan,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
        )

    def fill(self, name: str) -> dict[str, Any]:
        rank = self.model.hidden // 4 if self.rank is None else self.rank
        published = paper_presets.OPTIMIZERS.get(name, {}) if self.preset else {}
        remaining = {k: v for k, v in published.items() if getattr(self, k) is None}
        prompt = PROMPTS[self.dataset] if self.prompt is None else self.prompt
        return super().fill(name) | {"rank": rank, "prompt": prompt} | remaining

    def defaults(self) -> Self | None:
        """The settings of --preset."""
        numbers = paper_presets.PRESETS.get(self.preset or "")
        return numbers and type(self)(**numbers)

    def make_optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.lr,
            warmup_steps=self.steps // 10,
            decay_steps=self.steps,
            end_value=self.lr / 10,
        )
        return self.OPTIMIZERS[self.optimizer].make(schedule, self)
