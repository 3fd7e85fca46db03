"""The settings of a run: what the command line can say, and what becomes of it."""

import contextlib
import io
import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import data
import jax.numpy as jnp
import llama
import optax
import report
import tyro

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


def one_of(names) -> Any:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Config:
    """Pre-train a Llama on text, byte by byte."""

    # The rest is about the run, and kept in its log.
    ABOUT_THE_CALL: ClassVar[tuple[str, ...]] = ("out", "overwrite", "resume")
    # On resuming: the text may move, but not change.
    CHANGEABLE: ClassVar[tuple[str, ...]] = ("text", "save_every", "prompt")

    size: Annotated[str, one_of(llama.CONFIGS)] = "tiny"
    """Size of the model."""
    optimizer: Annotated[str | None, one_of(OPTIMIZERS)] = None
    """Which optimizer; contrib_galore is Optax's own GaLore. Default: natural_galore."""
    compare: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME,...")] = None
    """Train each of these optimizers in turn instead, and draw them in one picture."""
    lr: float | None = None
    """Peak learning rate, after a linear warm-up and before a cosine decay to a tenth of it.
    Default: one that suits the optimizer."""
    rank: int | None = None
    """Rank of the projected gradients. Default: a quarter of the model's width."""
    refresh_every: int = 50
    """Steps between two refreshes of the projections."""
    residual: Annotated[str | None, one_of(RESIDUALS)] = None
    """What becomes of what the projections leave out. Default: whitened for natural_galore, none
    for galore, and none with --low-rank-gradients."""
    low_rank_gradients: bool = False
    """Take the gradients of projected weights as cores, never whole; refresh all at once."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    steps: int = 700
    """Number of training steps."""
    batch_size: int = 16
    """Sequences in a batch."""
    seq_len: int = 128
    """Bytes in a sequence."""
    seed: int = 0
    """Seed of the initial weights, of the batches, of the first projections and of the sample."""
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
    out: Path | None = None
    """Folder for log, checkpoint, figure and sample. Default: a new folder in runs/."""
    overwrite: bool = False
    """Replace the run that is in the folder already."""
    resume: bool = False
    """Continue the run in the folder --out where its checkpoint is, with the same settings."""
    validate_every: int = 50
    """Steps between two validations."""
    save_every: int = 100
    """Steps between two checkpoints; there is one at the end and at an interruption too."""

    def check(self) -> None:
        """Raises a ValueError that names the first argument that makes no sense."""
        if self.size not in llama.CONFIGS:
            raise ValueError(f"--size must be one of {', '.join(llama.CONFIGS)}, got {self.size!r}")
        if self.optimizer is not None and self.compare is not None:
            raise ValueError("--optimizer and --compare cannot be used together")
        names = self.optimizers
        for name in names:
            if name not in OPTIMIZERS:
                known = ", ".join(OPTIMIZERS)
                which = "--optimizer" if self.compare is None else "each name in --compare"
                raise ValueError(f"{which} must be one of {known}, got {name!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"--compare names an optimizer twice: {self.compare}")
        if self.scan and "contrib_galore" in names:
            raise ValueError("optimizer contrib_galore cannot project stacked layers (--scan)")
        ours = {*names} & {*PROJECTING}
        for name in ("residual", "low_rank_gradients"):
            if getattr(self, name) and not ours:
                raise ValueError(f"{flag(name)} is for {' and '.join(PROJECTING)}")
        if self.residual is not None and self.residual not in RESIDUALS:
            known = ", ".join(RESIDUALS)
            raise ValueError(f"--residual must be one of {known}, got {self.residual!r}")
        if self.residual not in (None, "none") and self.low_rank_gradients:
            raise ValueError("--residual needs whole gradients, --low-rank-gradients forms none")
        counts = ("refresh_every", "steps", "batch_size", "seq_len", "validate_every", "save_every")
        for name, least in (*((name, 1) for name in counts), ("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise ValueError(
                    f"{flag(name)} must be at least {least} and below 2**31, got {value}"
                )
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight-decay must not be negative, got {self.weight_decay}")
        if not self.prompt:
            raise ValueError("--prompt must not be empty")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite cannot be used together")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out, the folder of the run to continue")

    @property
    def optimizers(self) -> list[str]:
        if self.compare is not None:
            return self.compare.split(",")
        return [self.optimizer or "natural_galore"]

    @property
    def model(self) -> llama.LlamaConfig:
        return replace(
            llama.CONFIGS[self.size],
            vocabulary=data.VOCABULARY,
            scan=self.scan,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
        )

    def runs(self) -> list["Config"]:
        """One config for each optimizer, with everything filled in that depends on it."""
        return [
            replace(
                self,
                optimizer=name,
                compare=None,
                lr=OPTIMIZERS[name].learning_rate if self.lr is None else self.lr,
                rank=self.model.hidden // 4 if self.rank is None else self.rank,
                out=self.out / name if self.compare and self.out else self.out,
            )
            for name in self.optimizers
        ]

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of one of the `runs`."""
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.lr,
            warmup_steps=self.steps // 10,
            decay_steps=self.steps,
            end_value=self.lr / 10,
        )
        return OPTIMIZERS[self.optimizer].make(schedule, self)

    def saved(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The settings as JSON knows them."""
        without = (*self.ABOUT_THE_CALL, *without)
        settings = {k: v for k, v in asdict(self).items() if k not in without}
        return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}

    def fixed(self) -> dict[str, Any]:
        """Those that a resumed run must share with the run that it continues."""
        return self.saved(without=self.CHANGEABLE)


Kind = TypeVar("Kind", bound=Config)


def difference(begun: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first setting that is not the same in both, in words."""
    for name in {**begun, **wanted}:
        before, after = begun.get(name), wanted.get(name)
        if before != after:
            return f"{flag(name)} {before}, not {after}"
    return None


def begun_with(folder: Path, kind: type[Kind]) -> Kind:
    """The config that the run in `folder` began with, from its log."""
    try:
        settings = report.read_header(folder / "log.jsonl")["config"]
        text = settings["text"] and Path(settings["text"])
        return kind(**settings | {"text": text, "out": folder})
    except OSError as error:
        raise ValueError(f"{folder} holds no run to resume") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'log.jsonl'} is damaged or from another version: cannot resume"
        ) from error


def in_one_line(box: str) -> str:
    """What tyro says first in a box about an error, and which flag it suggests.

    Example:
        >>> print(in_one_line('''
        ... ╭─ Unrecognized options ──────╮
        ... │ Unrecognized options:       │
        ... │ --rnk, 8                    │
        ... │ ─────────────────────────── │
        ... │ Perhaps you meant:          │
        ... │     --rank {None}|INT       │
        ... ╰─────────────────────────────╯'''.strip()))
        Unrecognized options: --rnk, 8; perhaps you meant --rank
    """
    lines = [line.strip("│| ") for line in box.splitlines()[1:-1]]
    parts = itertools.groupby(lines, lambda line: any(map(str.isalnum, line)))
    said = [" ".join(part) for written, part in parts if written] or ["see --help"]
    meant = re.search(r"^Perhaps you meant: (--[\w-]+)", "\n".join(said), re.MULTILINE)
    hint = f"; perhaps you meant {meant[1]}" if meant else ""
    return said[0].removeprefix("Error parsing ") + hint


def parse(kind: type[Kind], **options: Any) -> Kind:
    """The command line, as tyro reads it.

    Raises:
        ValueError: it cannot be read.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, **options)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise ValueError(in_one_line(said.getvalue())) from None


def from_command_line(kind: type[Kind] = Config) -> Kind:
    """Reads the command line; with --resume, what it leaves open is as the run began.

    Args:
        kind: of config, which says what there is to set.

    Raises:
        ValueError: something makes no sense, or contradicts the run that is to be resumed.
    """
    config = parse(kind, config=(tyro.conf.FlagCreatePairsOff,))
    config.check()
    if config.resume:
        begun = begun_with(config.out, kind)
        config = parse(kind, default=begun)
        if differs := difference(begun.fixed(), config.fixed()):
            raise ValueError(f"the run in {config.out} began with {differs}: leave the flag out")
        config.check()
    for run in config.runs():
        run.make_optimizer()  # natgalore checks its arguments too
    return config
