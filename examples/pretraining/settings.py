"""The settings of a run: what the command line can say, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax.numpy as jnp
import optax

import natgalore_jax as natgalore
from examples.common import command_line, data, llama
from examples.common.command_line import flag, one_of
from examples.pretraining import paper_presets


class Recipe(NamedTuple):
    """An optimizer as a function of its schedule and the config, and its usual learning rate."""

    learning_rate: float
    make: Callable[[optax.Schedule, "Config"], optax.GradientTransformation]


RESIDUALS = {"none": None, "isotropic": "isotropic", "whitened": "whitened", "fira": "fira"}
FISHERS = {"none": None, "core": "core", "window": "window"}


def given(**settings: Any) -> dict[str, Any]:
    """Those that are not None: where they are, an optimizer's own default counts."""
    return {name: value for name, value in settings.items() if value is not None}


def low_rank(recipe: Callable[..., optax.GradientTransformation]):
    """One of natgalore's recipes, with the settings of the config."""

    def make(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
        options = given(scale=config.scale, b2=config.b2)
        if config.fisher is not None and recipe is natgalore.natural_galore:
            options |= {"fisher": FISHERS[config.fisher]}
        if config.residual is not None:
            options |= {"residual": RESIDUALS[config.residual]}
        if config.low_rank_gradients:  # no whole gradient; a refresh of one costs as much as of all
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
    return optax.adamw(schedule, weight_decay=config.weight_decay, **given(b2=config.b2))


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
    "adamw": Recipe(2e-3, adamw),
    "contrib_galore": Recipe(5e-3, contrib_galore),
}


PROJECTING = ("natural_galore", "galore")  # natgalore's
FOR = {  # settings that not every optimizer has
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
    """Pre-train a Llama on text: on bytes, or on C4 by the tokens of T5."""

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

    preset: Annotated[str | None, one_of(paper_presets.PRESETS)] = None
    """The paper's numbers for this size, in place of the defaults: every flag but --dataset, --data
    and --tokenizer; what is given beside it counts. Natural GaLore is in the paper's form then."""
    dataset: Literal["text", "c4"] = "text"
    """What to train on: the bytes of --text, or C4, in order, each text ended and all packed."""
    data: Path | None = None
    """For c4: a folder with its shards, c4-train.*.json.gz and c4-validation.*.json.gz. Default:
    streamed from the Hub."""
    tokenizer: Path | None = None
    """For c4: T5's tokenizer.json, or its folder."""
    vocabulary: int | None = None
    """Tokens that the model has room for. Default: those that there are, in multiples of 128."""

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
    scale: float | None = None
    """Of the projected weights' updates. Default: 1."""
    fisher: Annotated[str | None, one_of(FISHERS)] = None
    """Natural GaLore's Fisher in the subspace: window is the paper's form, and costs more state
    than AdamW. Default: none."""
    b2: float | None = None
    """Adam's decay of second moments. Default: 0.95 for natural_galore, 0.999 for the others."""
    residual: Annotated[str | None, one_of(RESIDUALS)] = None
    """What becomes of what the projections leave out. Default: whitened for natural_galore, none
    for galore, and none with --low-rank-gradients."""
    low_rank_gradients: bool = False
    """Take the gradients of projected weights as cores, never whole; refresh all at once."""
    steps: int = 700
    """Number of training steps."""
    micro_batches: int = 1
    """Parts of a batch that are computed one after the other, to save memory."""
    seq_len: int = 128
    """Tokens in a sequence."""
    text: Path | None = None
    """A text file or a folder of them. Default: the sources of the Python standard library."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls; the weights are float32."""
    scan: bool = False
    """Stack the layers and scan over them: compiles faster when the model is deep."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    prompt: str | None = None
    """What the sample at the end begins with."""

    def check(self) -> None:
        """Raises a ValueError that names the first argument that makes no sense."""
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
                raise ValueError(f"{flag(name)} is for {' and '.join(having)}")
        if self.residual not in (None, "none") and self.low_rank_gradients:
            raise ValueError("--residual needs whole gradients, --low-rank-gradients forms none")
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
                raise ValueError(f"{flag(name)} is for --dataset {other}")
        if self.prompt == "":
            raise ValueError("--prompt must not be empty")

    @property
    def model(self) -> llama.LlamaConfig:
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
        unsaid = {k: v for k, v in published.items() if getattr(self, k) is None}
        prompt = PROMPTS[self.dataset] if self.prompt is None else self.prompt
        return super().fill(name) | {"rank": rank, "prompt": prompt} | unsaid

    def defaults(self) -> Self | None:
        """The numbers of the preset, for what the command line does not say."""
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
