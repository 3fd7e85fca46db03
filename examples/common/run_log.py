"""The log of a run: one JSON object per line, first the header, then one record per logged step."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from natgalore_jax.reporting import memory_report


def version(package: str) -> str | None:
    """Installed version of a package; None for a checkout that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Machine, devices and package versions, for the header of a log."""
    packages = ("natgalore_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def nbytes(tree: Any) -> int:
    """Bytes of the arrays in a tree, 4-bit ones packed; ShapeDtypeStructs count as arrays."""
    return sum(map(memory_report.nbytes, jax.tree.leaves(tree)))


def peak_bytes() -> dict[str, int]:
    """Peak and limit of the first device's memory in bytes; empty on backends without counters."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = ("peak_bytes_in_use", "bytes_limit")
    return {name: stats[name] for name in names if name in stats}


class Run(NamedTuple):
    """Contents of a log.

    Attributes:
        header: config, environment, data, number of parameters, bytes of optimizer state.
        records: step, tokens, seconds, train_loss, tokens_per_second; at validations also
            validation_loss and metrics by name. Losses are in nats per token or per record. On a
            GPU also peak_bytes_in_use and bytes_limit.
    """

    header: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the optimizer."""
        return self.header["config"]["optimizer"]

    def losses(self, kind: str) -> tuple[list[int], list[float]]:
        """Tokens and losses of the records that have `kind`: train_loss or validation_loss."""
        measured = [record for record in self.records if kind in record]
        return [record["tokens"] for record in measured], [record[kind] for record in measured]

    def metrics(self) -> dict[str, float]:
        """Metrics of the last validation."""
        return next((r["metrics"] for r in reversed(self.records) if "metrics" in r), {})

    def tokens_per_second(self) -> float:
        """Mean training speed, without the first step (warm-up)."""
        records = [record for record in self.records if "train_loss" in record]
        tokens, seconds = 0, 0.0
        for before, record in itertools.pairwise(records):
            n = record["tokens"] - before["tokens"]
            tokens += n
            seconds += n / record["tokens_per_second"]
        return tokens / seconds if tokens else records[0]["tokens_per_second"]


@contextlib.contextmanager
def tensorboard(folder: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes the numbers of a record for TensorBoard.

    Args:
        folder: of the event files.
        step: of the checkpoint that the run continues from, 0 for a new run; TensorBoard hides
            later steps that an interrupted run has written.
    """
    from tensorboardX import SummaryWriter

    def write(record: dict[str, Any]) -> None:
        numbers = record | record.get("metrics", {})
        for name in numbers.keys() - {"step", "metrics"}:
            writer.add_scalar(name, numbers[name], record["step"])

    purge = {"purge_step": step + 1} if step else {}
    with SummaryWriter(str(folder), **purge) as writer:
        yield write


def read_header(log: Path) -> dict[str, Any]:
    """Reads the first line of a log."""
    with log.open() as lines:
        return json.loads(lines.readline())


def read(log: Path) -> Run:
    """Reads the log of a run."""
    header, *records = map(json.loads, log.read_text().splitlines())
    return Run(header, records)
