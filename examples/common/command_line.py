"""What every run here can be told, and how the command line is read: to one line of error.

An example's settings are a dataclass below `Run`; tyro makes flags of its fields. A run that is
resumed begins with the settings in its log.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import optax
import tyro

from examples.common import run_log


def one_of(names) -> Any:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Run:
    """The settings that all runs have."""

    # The rest is about the run, and kept in its log.
    ABOUT_THE_CALL: ClassVar[tuple[str, ...]] = ("out", "overwrite", "resume")
    # On resuming: where data lies may change, but not what it is.
    CHANGEABLE: ClassVar[tuple[str, ...]] = ("save_every",)
    PATHS: ClassVar[tuple[str, ...]] = ()
    OPTIMIZERS: ClassVar[Mapping[str, Any]] = {}  # the first one is the default
    COUNTS: ClassVar[tuple[str, ...]] = (
        "refresh_every",
        "batch_size",
        "validate_every",
        "save_every",
    )

    optimizer: str | None = None
    """Which optimizer. Default: natural_galore."""
    compare: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME,...")] = None
    """Train with each of these optimizers in turn instead, and show them side by side."""
    lr: float | None = None
    """Peak learning rate, after a linear warm-up. Default: one that suits the optimizer."""
    rank: int | None = None
    """Rank of the projected gradients."""
    refresh_every: int = 50
    """Steps between two refreshes of the projections."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    batch_size: int = 16
    """Sequences in a batch."""
    seed: int = 0
    """Seed of all that is drawn."""
    out: Path | None = None
    """Folder for all that a run leaves. Default: a new folder in runs/."""
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
        if self.optimizer is not None and self.compare is not None:
            raise ValueError("--optimizer and --compare cannot be used together")
        names = self.optimizers
        for name in names:
            if name not in self.OPTIMIZERS:
                known = ", ".join(self.OPTIMIZERS)
                which = "--optimizer" if self.compare is None else "each name in --compare"
                raise ValueError(f"{which} must be one of {known}, got {name!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"--compare names an optimizer twice: {self.compare}")
        for name, least in (*((name, 1) for name in self.COUNTS), ("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise ValueError(
                    f"{flag(name)} must be at least {least} and below 2**31, got {value}"
                )
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight-decay must not be negative, got {self.weight_decay}")

    def check_call(self) -> None:
        """The same of the flags about this call, which must make sense before all others do."""
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite cannot be used together")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out, the folder of the run to continue")

    @property
    def optimizers(self) -> list[str]:
        if self.compare is not None:
            return self.compare.split(",")
        return [self.optimizer or next(iter(self.OPTIMIZERS))]

    def fill(self, name: str) -> dict[str, Any]:
        """What the settings become that depend on the optimizer `name`."""
        return {"lr": self.OPTIMIZERS[name].learning_rate if self.lr is None else self.lr}

    def defaults(self) -> Self | None:
        """What the settings that are not given are, if not what they are by default."""
        return None

    def runs(self) -> list[Self]:
        """One config for each optimizer, with everything filled in that depends on it."""
        return [
            replace(
                self,
                optimizer=name,
                compare=None,
                out=self.out / name if self.compare and self.out else self.out,
                **self.fill(name),
            )
            for name in self.optimizers
        ]

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of one of the `runs`."""
        raise NotImplementedError

    def saved(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The settings as JSON knows them."""
        without = (*self.ABOUT_THE_CALL, *without)
        settings = {k: v for k, v in asdict(self).items() if k not in without}
        return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}

    def fixed(self) -> dict[str, Any]:
        """Those that a resumed run must share with the run that it continues."""
        return self.saved(without=self.CHANGEABLE)


Kind = TypeVar("Kind", bound=Run)


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
        settings = run_log.read_header(folder / "log.jsonl")["config"]
        paths = {k: settings[k] and Path(settings[k]) for k in kind.PATHS}
        return kind(**settings | paths | {"out": folder})
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


def from_command_line(kind: type[Kind]) -> Kind:
    """Reads the command line; what it leaves open is as its `defaults` are.

    With --resume it is as the run began.

    Args:
        kind: of config, which says what there is to set.

    Raises:
        ValueError: something makes no sense, or contradicts the run that is to be resumed.
    """
    config = parse(kind)
    config.check_call()
    if config.resume:
        begun = begun_with(config.out, kind)
        config = parse(kind, default=begun)
        if differs := difference(begun.fixed(), config.fixed()):
            raise ValueError(f"the run in {config.out} began with {differs}: leave the flag out")
    elif defaults := config.defaults():
        config = parse(kind, default=defaults)
    config.check()
    for run in config.runs():
        run.make_optimizer()  # natgalore checks its arguments too
    return config
