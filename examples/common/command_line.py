"""Settings common to all training examples, and the parser of the command line.

The settings of an example are a subclass of the dataclass `Run`; tyro turns its fields into flags.
A resumed run starts from the settings in its log. Invalid input raises a one-line ValueError.

Only `parse` needs tyro: benchmarks make settings in Python, on machines without it.
"""

import contextlib
import io
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import optax

from examples.common import run_log


try:
    import tyro
except ModuleNotFoundError:
    tyro = None


HIDDEN = tyro and tyro.conf.Suppress  # not a flag
POSITIONAL = tyro and tyro.conf.Positional


def shown_as(metavar: str, **options: Any) -> Any:
    """A flag with this placeholder of the value in --help."""
    return tyro and tyro.conf.arg(metavar=metavar, **options)


def one_of(names: Iterable[str]) -> Any:
    """A flag with these values, shown in --help."""
    return shown_as("{" + ",".join(names) + "}")


def unset(metavar: str | Iterable[str]) -> Any:
    """A flag with default None; its help text describes the default.

    Args:
        metavar: placeholder of the value in --help, or the possible values.
    """
    shown = metavar if isinstance(metavar, str) else "{" + ",".join(metavar) + "}"
    return shown_as(shown, help_behavior_hint="")


def flag(name: str) -> str:
    """The flag of a field: --save-every for save_every."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Run:
    """Settings that all runs have."""

    # Flags of one call; all other settings belong to the run and are in its log.
    ABOUT_THE_CALL: ClassVar[tuple[str, ...]] = ("out", "overwrite", "resume")
    # Settings that may differ when a run is resumed.
    CHANGEABLE: ClassVar[tuple[str, ...]] = ("save_every", "tensorboard")
    PATHS: ClassVar[tuple[str, ...]] = ()
    OPTIMIZERS: ClassVar[Mapping[str, Any]] = {}  # the first one is the default
    COUNTS: ClassVar[tuple[str, ...]] = ("refresh_every", "batch_size", "validate_every")  # >= 1

    optimizer: Annotated[str | None, unset("NAME")] = None
    """Optimizer. Default: natural_galore."""
    compare: Annotated[str | None, unset("NAME,NAME,...")] = None
    """Train once with each of these optimizers, instead of --optimizer, and compare the results."""
    lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate, after a linear warm-up. Default: tuned per optimizer."""
    rank: Annotated[int | None, unset("INT")] = None
    """Rank of the projection."""
    refresh_every: int = 50
    """Steps between two refreshes of a basis."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    batch_size: int = 16
    """Sequences per batch."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Annotated[Path | None, unset("FOLDER")] = None
    """Output folder. Default: a new folder in runs/."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""
    resume: bool = False
    """Continue the run in the folder --out from its checkpoint, with the same settings."""
    validate_every: int = 50
    """Steps between two validations."""
    save_every: int = 100
    """Steps between two checkpoints; one more is saved at the end and on Ctrl-C. 0: save none."""
    tensorboard: bool = False
    """Also write the log for TensorBoard, into the folder tensorboard of the output folder."""

    def check(self) -> None:
        """Raises a ValueError that names the first invalid argument."""
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
        for name, least in (
            *((name, 1) for name in self.COUNTS),
            ("rank", 1),
            ("seed", 0),
            ("save_every", 0),
        ):
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
        """Raises a ValueError if the flags of `ABOUT_THE_CALL` contradict each other."""
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite cannot be used together")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out, the folder of the run to continue")

    @property
    def optimizers(self) -> list[str]:
        """Names of the optimizers to train with."""
        if self.compare is not None:
            return self.compare.split(",")
        return [self.optimizer or next(iter(self.OPTIMIZERS))]

    def fill(self, name: str) -> dict[str, Any]:
        """Values of the settings that depend on the optimizer `name`."""
        return {"lr": self.OPTIMIZERS[name].learning_rate if self.lr is None else self.lr}

    def defaults(self) -> Self | None:
        """Settings that replace the defaults of flags not given; None: no change."""
        return None

    def runs(self) -> list[Self]:
        """One config per optimizer, with all settings that depend on the optimizer filled in."""
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
        """The optimizer of one of `runs`."""
        raise NotImplementedError

    def saved(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The settings of the run as JSON values."""
        without = (*self.ABOUT_THE_CALL, *without)
        settings = {k: v for k, v in asdict(self).items() if k not in without}
        return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run may not change."""
        return self.saved(without=self.CHANGEABLE)


Kind = TypeVar("Kind", bound=Run)
Settings = TypeVar("Settings")


def difference(begun: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first setting with different values, as "--flag before, not after"; None if equal."""
    for name in {**begun, **wanted}:
        before, after = begun.get(name), wanted.get(name)
        if before != after:
            return f"{flag(name)} {before}, not {after}"
    return None


def begun_with(folder: Path, kind: type[Kind]) -> Kind:
    """The config that the run in `folder` was started with, from its log.

    Raises:
        ValueError: the folder has no run, or its log cannot be read.
    """
    try:
        settings = run_log.read_header(folder / "log.jsonl")["config"]
        paths = {k: settings[k] and Path(settings[k]) for k in kind.PATHS}
        return kind(**settings | paths | {"out": folder})
    except OSError as error:
        raise ValueError(f"{folder} has no run to resume") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'log.jsonl'} is damaged or from another version: cannot resume"
        ) from error


def in_one_line(error: Exception) -> str:
    """The message of an error, at most 1000 characters."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return textwrap.shorten(str(error), 1000)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exits with one line of error and status 2 on a ValueError or OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        print("error:", in_one_line(error), file=sys.stderr)
        sys.exit(2)


def first_error(box: str) -> str:
    """First error in the box that tyro prints, and the flag that it suggests.

    Example:
        >>> print(first_error('''
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
    messages = [" ".join(part) for written, part in parts if written] or ["see --help"]
    meant = re.search(r"^Perhaps you meant: (--[\w-]+)", "\n".join(messages), re.MULTILINE)
    hint = f"; perhaps you meant {meant[1]}" if meant else ""
    return messages[0].removeprefix("Error parsing ") + hint


def parse(kind: type[Settings], **options: Any) -> Settings:
    """Parses the command line with tyro.

    Raises:
        ModuleNotFoundError: tyro is not installed.
        ValueError: an argument is unknown or has the wrong type.
    """
    if tyro is None:
        raise ModuleNotFoundError("tyro parses the command line: pip install tyro", name="tyro")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, **options)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise ValueError(first_error(box.getvalue())) from None


@dataclass(frozen=True)
class Output:
    """Settings of a script that fills a folder."""

    out: Path
    """Output folder; existing files are overwritten."""


def fill_folder(fill: Callable[[Path], None], default: str, description: str | None) -> None:
    """The main program of a script whose only flag is --out, the folder that `fill` fills."""
    with one_line_errors():
        out = parse(Output, default=Output(Path(default)), description=description).out
        fill(out)
    print(f"output folder: {out}")


def from_command_line(kind: type[Kind], description: str | None = None) -> Kind:
    """Reads and checks the command line.

    Flags that are not given have the values of `Run.defaults`, or with --resume those of the run.

    Args:
        kind: the class of settings.
        description: text at the top of --help; by default the docstring of `kind`.

    Raises:
        ValueError: an argument is invalid, or contradicts the run that is resumed.
    """
    config = parse(kind, description=description)
    config.check_call()
    if config.resume:
        begun = begun_with(config.out, kind)
        config = parse(kind, default=begun)
        if differs := difference(begun.fixed(), config.fixed()):
            raise ValueError(f"the run in {config.out} has {differs}: leave the flag out")
    elif defaults := config.defaults():
        config = parse(kind, default=defaults)
    config.check()
    for run in config.runs():
        run.make_optimizer()  # natgalore checks its own arguments
    return config
