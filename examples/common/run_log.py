"""The log of a run: one JSON object a line, first the header, then one record per logged step."""

import importlib.metadata
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax


def version(package: str) -> str | None:
    """Its version, or None of a package that runs from a checkout without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """The machine and the versions that a result was measured with."""
    packages = ("natgalore_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def nbytes(tree: Any) -> int:
    """Bytes of the arrays in a tree, abstract ones too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak_bytes() -> dict[str, int]:
    """What the first device has had in use at most, where its allocator tells."""
    said = jax.local_devices()[0].memory_stats() or {}
    names = ("peak_bytes_in_use", "bytes_limit")
    return {name: said[name] for name in names if name in said}


class Run(NamedTuple):
    """A log, read back.

    Attributes:
        header: config, environment, data, number of parameters, bytes of state.
        records: step, tokens, seconds, train_loss, tokens_per_second, and where it was measured
            validation_loss and, of a task that has others, metrics by their names; losses in nats
            per token or per record. On a GPU its peak_bytes_in_use, and its bytes_limit.
    """

    header: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.header["config"]["optimizer"]

    def losses(self, kind: str) -> tuple[list[int], list[float]]:
        """Tokens seen and values of `train_loss` or `validation_loss`."""
        measured = [record for record in self.records if kind in record]
        return [record["tokens"] for record in measured], [record[kind] for record in measured]

    def metrics(self) -> dict[str, float]:
        """Those measured last."""
        return next((r["metrics"] for r in reversed(self.records) if "metrics" in r), {})

    def tokens_per_second(self) -> float:
        """Mean speed of training, without its first step, which warms up."""
        records = [record for record in self.records if "train_loss" in record]
        tokens, seconds = 0, 0.0
        for before, record in itertools.pairwise(records):
            n = record["tokens"] - before["tokens"]
            tokens += n
            seconds += n / record["tokens_per_second"]
        return tokens / seconds if tokens else records[0]["tokens_per_second"]


def read_header(log: Path) -> dict[str, Any]:
    """Reads the first line of a log."""
    with log.open() as lines:
        return json.loads(lines.readline())


def read(log: Path) -> Run:
    """Reads the log of a run."""
    header, *records = map(json.loads, log.read_text().splitlines())
    return Run(header, records)
