"""What a run needs to go on after it was stopped, bit by bit: its checkpoint and its log.

    log.jsonl               one JSON object a line
    checkpoints/400/state   params and optimizer state after step 400, by Orbax
    checkpoints/400/notes   what they belong to, and how much of the log was written by then

Orbax keeps any pytree, the nodes of natgalore's states included, and restores it into the
structure that `jax.eval_shape(init, key)` describes; a checkpoint appears whole or not at all.
What Orbax does not keep is empty arrays, which Optax's own GaLore has: they are saved as one zero.

Arrays may be sharded, over the devices of several processes too: each process writes its part into
a folder that all of them see, the first one the log, and arrays come back sharded as `like` says,
on another mesh than they were saved from if it does.
"""

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from examples.common import command_line
from natgalore_jax.subspace.engine import FORMAT_VERSION


FORMAT = 1  # of the notes


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: steps taken.
        losses: of the steps since the last record of the log.
        seconds: spent so far.
        log_size: bytes of the log; what a crash left behind them is cut off.
        position: where the next batch begins, as JSON, if that is no function of the step.
    """

    step: int = 0
    losses: Sequence[float] = ()
    seconds: float = 0.0
    log_size: int = 0
    position: Any = None


def holds_run(folder: Path) -> bool:
    return (folder / "log.jsonl").exists() or (folder / "checkpoints").exists()


def holds_checkpoint(folder: Path) -> bool:
    return any(step.name.isdigit() for step in (folder / "checkpoints").glob("*"))


def free_folder(name: str, *, overwrite: bool) -> Path:
    """The first of runs/name, runs/name-2, … without a run, or with --overwrite runs/name."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(f for f in (Path("runs", n) for n in names) if overwrite or not holds_run(f))


def refuse_used(folders: list[Path], *, overwrite: bool) -> None:
    """Raises an OSError if a folder is none, or holds a run that is not to be overwritten."""
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        if holds_run(folder) and not overwrite:
            raise FileExistsError(
                f"{folder} holds a run: choose another --out, or --resume it or --overwrite it"
            )


def clear(folders: list[Path]) -> None:
    """Makes the folders, with no run in them.

    Raises:
        OSError: a folder cannot be made.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "loss.png", "sample.txt"):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "model"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)


class Checkpoints:
    """The checkpoints of one run: saves them, keeps the newest, and restores it.

    Args:
        config: of the run.
        sha256: digest of the text.
    """

    def __init__(self, config: command_line.Run, sha256: str):
        self.folder = config.out
        self.belongs_to = {
            "format": FORMAT,
            "natgalore_state": FORMAT_VERSION,
            "config": config.fixed(),
            "text": sha256,
        }
        self.manager = ocp.CheckpointManager(
            (config.out / "checkpoints").absolute(),
            # The next step reuses the memory of the state: it must be written before.
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception: object):
        self.manager.close()

    def save(self, state: Any, progress: Progress) -> None:
        """Saves both, in place of what was saved before.

        Raises:
            OSError: they cannot be written; what was saved before is still there.
        """
        notes = {"belongs_to": self.belongs_to, "progress": progress._asdict()}
        state = jax.tree.map(lambda x: x if x.size else np.zeros(1, x.dtype), state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
        )
        try:
            self.manager.save(progress.step, args=items)
        except Exception as error:  # of many types: a full disk is a ValueError
            raise OSError(
                f"the checkpoint of step {progress.step} cannot be written: {error}"
            ) from error

    def restore(self, like: Any) -> tuple[Any, Progress] | None:
        """The newest state, in the structure of the abstract `like`; None where there is none.

        Its arrays lie as those of `like` say; where they say nothing, on the first device.

        Raises:
            ValueError: it cannot be read, or belongs to something else.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        stored = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape if x.size else (1,), x.dtype, sharding=x.sharding or first
            ),
            like,
        )
        try:
            notes = ocp.args.Composite(notes=ocp.args.JsonRestore())
            notes = self.manager.restore(step, args=notes).notes
            self.check(notes["belongs_to"])
            progress = Progress(**notes["progress"])
            state = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
            state = self.manager.restore(step, args=state).state
            empty = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
            return jax.tree.map(lambda x, y: x if y.size else empty(y), state, like), progress
        except WrongCheckpoint:
            raise
        except Exception as error:  # of many types: a file is missing, cut short, or not JSON
            raise ValueError(f"the checkpoint in {self.folder} is damaged") from error

    def check(self, belongs_to: dict[str, Any]) -> None:
        """Raises unless the notes are those of this run."""
        for name, what in (("format", "notes"), ("natgalore_state", "optimizer states")):
            if (version := belongs_to[name]) != (ours := self.belongs_to[name]):
                raise WrongCheckpoint(
                    f"the checkpoint in {self.folder} is of another version: "
                    f"its {what} have format {version}, these examples read {ours}"
                )
        if differs := command_line.difference(belongs_to["config"], self.belongs_to["config"]):
            raise WrongCheckpoint(f"the checkpoint in {self.folder} is of another run: {differs}")
        if belongs_to["text"] != self.belongs_to["text"]:
            raise WrongCheckpoint(f"the text is not the one that the run in {self.folder} read")

    def open_log(self, progress: Progress) -> TextIO:
        """Opens the log to write on from where it was, or anew at the start.

        Raises:
            OSError, ValueError: it cannot be written to, or is not all there.
        """
        if jax.process_index() > 0:
            return open(os.devnull, "w")
        log = self.folder / "log.jsonl"
        if progress.step == 0:
            return log.open("w", buffering=1)
        if log.stat().st_size < progress.log_size:
            raise ValueError(f"{log} is shorter than when the checkpoint was saved")
        file = log.open("r+", buffering=1)
        file.seek(progress.log_size)
        file.truncate()
        return file


class WrongCheckpoint(ValueError):
    """A checkpoint that is sound and belongs to something else."""
