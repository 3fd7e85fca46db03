"""Compilation for TPUs on a machine without one, by libtpu of the package index.

    pip install "natgalore_jax[tpu-compile]"

The compiled program is the one that a TPU runs: its memory, collectives and refusals are those of
the device. Nothing is run. libtpu must be loaded in a process whose JAX runs on the CPU, with
:data:`ENVIRONMENT` set before.
"""

import importlib.metadata
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from benchmarks.common.hlo import Collective, collectives


# Without these names libtpu waits for a metadata server and writes warnings.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
GIB = 2**30
# Memory of one chip as the compiler counts it, by the name of a topology.
MEMORY = {"v5e": 15.75 * GIB, "v6e": 31.25 * GIB, "v5p": 95.74 * GIB}


def use_tpu_compiler() -> None:
    """Sets :data:`ENVIRONMENT`, before the first use of JAX's devices."""
    os.environ.update(ENVIRONMENT)
    os.environ.pop("XLA_FLAGS", None)  # of XLA:CPU; libtpu refuses flags that it does not know
    jax.config.update("jax_platforms", "cpu")


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as `"v5e:2x4"` or `"v5p:2x2x1"`, to compile for.

    Raises:
      ValueError: if libtpu is not installed or does not know the topology.
    """
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # several types, by the cause
        raise ValueError(f"no TPU compiler for {topology!r}: {error}") from None


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      seconds: processor time of the compilation, all threads.
      arguments, temporaries, code: bytes on one device; arguments include donated ones.
      unaliased: bytes of outputs that are not in the memory of a donated argument.
      text: the optimised HLO.
    """

    seconds: float
    arguments: int
    temporaries: int
    code: int
    unaliased: int
    text: str

    @property
    def peak(self) -> int:
        """Bytes that one device needs to run the program."""
        return self.arguments + self.temporaries + self.unaliased + self.code

    def moved(self) -> dict[str, float]:
        """Bytes that one device receives: on every step, and when each loop of a refresh runs once.

        A step without a due matrix runs no refresh.
        """
        found = collectives(self.text)
        of = lambda hot: sum(x.received * x.times for x in found if x.hot == hot)
        return {"step": of(True), "refresh": of(False)}

    def hot_collectives(self) -> list[Collective]:
        return [x for x in collectives(self.text) if x.hot]


class OutOfMemory(ValueError):
    """The compiler's refusal of a program that does not fit.

    Attributes:
      needed: bytes that it counts.
    """

    def __init__(self, message: str):
        super().__init__(message)
        found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
        units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        self.needed = float(found[1]) * units[found[2]] if found else None


def compile_for_tpu(
    f: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **jit: Any
) -> Program:
    """Compiles `f` for the devices in the shardings of `args`.

    Args:
      f: a function, or a jitted one.
      *args: trees of `jax.ShapeDtypeStruct` with shardings on devices of :func:`devices_of`.
      options: of the compiler, such as `{"exec_time_optimization_effort": -1.0}`.
      **jit: arguments of `jax.jit` for a function that is not jitted.

    Raises:
      OutOfMemory: if the program does not fit in a device's memory.
    """
    jitted = f if hasattr(f, "trace") else jax.jit(f, **jit)
    lowered = jitted.trace(*args).lower(lowering_platforms=("tpu",))
    start = time.process_time()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(str(error)) from None
        raise
    seconds = time.process_time() - start
    memory = compiled.memory_analysis()
    return Program(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        unaliased=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        text=compiled.as_text(),
    )


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree, each with its sharding."""
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(shape, tree, shardings)


def bytes_on_device(tree: Any, device: Any = None) -> int:
    """Bytes that one device needs for sharded shapes, by the compiler: with padding.

    Args:
      tree: of `jax.ShapeDtypeStruct` with shardings.
      device: of a single-device sharding, for shapes without one.
    """
    if device is not None:
        sharding = jax.sharding.SingleDeviceSharding(device)
        tree = with_shardings(tree, jax.tree.map(lambda _: sharding, tree))
    return compile_for_tpu(lambda tree: tree, tree, donate_argnums=0).arguments


def hosts_of(devices: Sequence[Any]) -> int:
    """The number of hosts of a slice."""
    return len({device.process_index for device in devices})


def version() -> str:
    """The version of libtpu."""
    return importlib.metadata.version("libtpu")
