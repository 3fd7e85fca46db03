"""The environment that every results file records."""

import importlib.metadata
import os
import platform

import jax


def environment() -> dict[str, str | int]:
    """Device, host and versions, as plain JSON values."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        "host": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **versions,
    }
