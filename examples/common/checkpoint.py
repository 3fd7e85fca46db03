"""Checkpoint and log of a run, from which it resumes bit for bit.

    log.jsonl               one JSON object per line
    checkpoints/400/state   params and optimizer state after step 400, written by Orbax
    checkpoints/400/notes   config, digest of the data, progress, size of the log at that step

Orbax saves any pytree, natgalore's state nodes included, and restores it into the structure that
`jax.eval_shape(init, key)` gives. A checkpoint directory appears only once it is complete. Orbax
cannot save empty arrays, which Optax's own GaLore has: they are saved as one zero.

Arrays may be sharded over the devices of several processes. Each process writes its shards into a
folder that all processes share, and process 0 writes the log. Arrays are restored with the
shardings of the target, which may be on another mesh than the saved ones.
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

from examples.common import command_line, run_log
from natgalore_jax.subspace.state import FORMAT_VERSION


FORMAT = 1  # version of the notes
LARGE = 10**9  # bytes; a run that writes more announces it


class Progress(NamedTuple):
    """Progress of a run.

    Attributes:
        step: steps taken.
        losses: losses of the steps since the last record of the log.
        seconds: wall time so far.
        log_size: bytes of the log; later bytes, from a crash, are cut off on resuming.
        position: position of the next batch in the data, as JSON; None if the step determines it.
    """

    step: int = 0
    losses: Sequence[float] = ()
    seconds: float = 0.0
    log_size: int = 0
    position: Any = None


def holds_run(folder: Path) -> bool:
    """Whether the folder has a log or checkpoints."""
    return (folder / "log.jsonl").exists() or (folder / "checkpoints").exists()


def holds_checkpoint(folder: Path) -> bool:
    """Whether the folder has a complete checkpoint."""
    return any(step.name.isdigit() for step in (folder / "checkpoints").glob("*"))


def free_folder(name: str, *, overwrite: bool) -> Path:
    """The first of runs/name, runs/name-2, … that has no run; runs/name with --overwrite."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(f for f in (Path("runs", n) for n in names) if overwrite or not holds_run(f))


def refuse_used(folders: list[Path], *, overwrite: bool) -> None:
    """Raises an OSError if a path is not a folder, or has a run and `overwrite` is false."""
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        if holds_run(folder) and not overwrite:
            raise FileExistsError(
                f"{folder} already has a run: choose another --out, --resume it or --overwrite it"
            )


def clear(folders: list[Path]) -> None:
    """Creates the folders and deletes earlier runs in them.

    Raises:
        OSError: a folder cannot be created.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "loss.png", "sample.txt"):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "model", "tensorboard"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)


def disk_notice(config: command_line.Run, state: Any, model: Any = None) -> str | None:
    """Announcement of large files: their size and place, or None for less than 1 GB.

    Args:
        config: settings of the run; `save_every` 0 means no checkpoint.
        state: the state that a checkpoint contains; shapes suffice.
        model: weights that the run exports to the folder `model` at its end; shapes suffice.
    """
    size = lambda tree: f"{run_log.nbytes(tree) / 1e9:.1f} GB"
    parts, total = [], 0
    if config.save_every:
        total += run_log.nbytes(state)
        parts.append(
            f"{size(state)} per checkpoint in {config.out / 'checkpoints'}, saved every "
            f"{config.save_every:,} steps and at the end (only the newest is kept; twice the space "
            "while it replaces the previous one; --save-every 0 saves none)"
        )
    if model is not None:
        total += run_log.nbytes(model)
        parts.append(f"{size(model)} of weights in {config.out / 'model'} at the end")
    return f"disk space: {'; '.join(parts)}" if total > LARGE else None


class Checkpoints:
    """The checkpoints of one run: saves them, keeps the newest, and restores it.

    Args:
        config: settings of the run.
        sha256: digest of the data.
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
            # Synchronous: the next step donates the buffers of the state.
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception: object):
        self.manager.close()

    def save(self, state: Any, progress: Progress) -> None:
        """Saves a checkpoint, then deletes the previous one.

        Raises:
            OSError: the checkpoint cannot be written; the previous one is kept.
        """
        notes = {"belongs_to": self.belongs_to, "progress": progress._asdict()}
        state = jax.tree.map(lambda x: x if x.size else np.zeros(1, x.dtype), state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
        )
        try:
            self.manager.save(progress.step, args=items)
        except Exception as error:  # the type varies: a full disk is a ValueError
            raise OSError(
                f"the checkpoint of step {progress.step} cannot be written: {error}"
            ) from error

    def restore(self, target: Any) -> tuple[Any, Progress] | None:
        """The newest state and its progress, or None without a checkpoint.

        Args:
            target: structure, shapes, dtypes and shardings of the state. Arrays without a sharding
                are restored to the first device.

        Raises:
            ValueError: the checkpoint cannot be read, or belongs to another run.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        stored = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape if x.size else (1,), x.dtype, sharding=x.sharding or first
            ),
            target,
        )
        try:
            notes = ocp.args.Composite(notes=ocp.args.JsonRestore())
            notes = self.manager.restore(step, args=notes).notes
            self.check(notes["belongs_to"])
            progress = Progress(**notes["progress"])
            state = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
            state = self.manager.restore(step, args=state).state
            empty = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
            return jax.tree.map(lambda x, y: x if y.size else empty(y), state, target), progress
        except WrongCheckpoint:
            raise
        except Exception as error:  # the type varies: missing, truncated or invalid file
            raise ValueError(f"the checkpoint in {self.folder} is damaged") from error

    def check(self, belongs_to: dict[str, Any]) -> None:
        """Raises WrongCheckpoint unless the notes are those of this run."""
        for name, what in (("format", "notes"), ("natgalore_state", "optimizer states")):
            if (version := belongs_to[name]) != (ours := self.belongs_to[name]):
                raise WrongCheckpoint(
                    f"the checkpoint in {self.folder} is from another version: "
                    f"its {what} have format {version}, these examples read format {ours}"
                )
        if differs := command_line.difference(belongs_to["config"], self.belongs_to["config"]):
            raise WrongCheckpoint(
                f"the checkpoint in {self.folder} belongs to another run: {differs}"
            )
        if belongs_to["text"] != self.belongs_to["text"]:
            raise WrongCheckpoint(f"the data differ from the data of the run in {self.folder}")

    def open_log(self, progress: Progress) -> TextIO:
        """Opens the log at the position of `progress`; at step 0, an empty log.

        Raises:
            OSError: the log cannot be written.
            ValueError: the log is shorter than at the checkpoint.
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
    """A valid checkpoint that belongs to another run or version."""
