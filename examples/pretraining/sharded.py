"""Pre-train a Llama on many devices with data, fully sharded (FSDP) or tensor parallelism.

    python examples/pretraining/sharded.py                  all GPUs or TPUs, else 8 simulated CPUs
    python examples/pretraining/sharded.py --mesh 2,2,2     data x fsdp x tensor; -1: the remainder
    python examples/pretraining/sharded.py --mesh 8,1,1 --zero    replicated weights, sharded state
    python examples/pretraining/sharded.py --out runs/mine --resume    continue, on any mesh

Model, training loop and all other flags are those of pretrain.py, and so are the numbers, up to the
order of sums. A checkpoint can be resumed on another mesh, and a checkpoint of pretrain.py too; on
the same mesh the run continues to the same bits. With --distributed, each host of a cluster or TPU
slice runs the same command; --out is then a folder that all hosts share.

This file defines shardings only. The optimizer state gets its shardings from
natgalore.state_shardings, with zero_axis="fsdp": otherwise the moments of a weight whose rows are
sharded over fsdp would be replicated.
"""

import math
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from examples.common import command_line, run_display
from examples.common.command_line import shown_as
from examples.common.training_loop import TrainState
from examples.pretraining import llama_sharding, pretrain, settings


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of a run on many devices."""

    ABOUT_THE_CALL: ClassVar = (*settings.Config.ABOUT_THE_CALL, "distributed")
    CHANGEABLE: ClassVar = (*settings.Config.CHANGEABLE, "mesh", "zero", "devices")

    mesh: Annotated[str, shown_as("DATA,FSDP,TENSOR")] = "1,-1,1"
    """Sizes of the mesh axes; one size may be -1 and is computed from the others."""
    zero: bool = False
    """Shard the optimizer state of replicated weights over the data axis (ZeRO-1)."""
    devices: int = 8
    """Number of simulated CPU devices, if there is no GPU or TPU."""
    distributed: bool = False
    """Train with the other processes of the cluster or TPU slice (jax.distributed.initialize)."""

    def check(self) -> None:
        super().check()
        if not 1 <= self.devices < 2**10:
            raise ValueError(f"--devices must be at least 1 and below 2**10, got {self.devices}")
        sizes = self.mesh.split(",")
        positive = [n for n in sizes if n.isdecimal() and int(n) > 0]
        axes = len(llama_sharding.AXES)
        if len(sizes) != axes or len(positive) + sizes.count("-1") != axes:
            raise ValueError(f"--mesh must be three sizes, e.g. 2,2,2 or 1,-1,1, got {self.mesh}")
        if sizes.count("-1") > 1:
            raise ValueError(f"--mesh can have only one -1, got {self.mesh}")

    def make_mesh(self) -> jax.sharding.Mesh:
        """The mesh; initialises JAX's devices.

        Raises:
            ValueError: the mesh does not match the devices, or the batch is not divisible.
        """
        mesh = llama_sharding.make_mesh([int(n) for n in self.mesh.split(",")])
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        if self.batch_size % parts:
            raise ValueError(
                f"--batch-size must be a multiple of data x fsdp, {parts}, got {self.batch_size}"
            )
        if self.batch_size // self.micro_batches % parts:
            raise ValueError(
                f"a micro-batch must be a multiple of data x fsdp, {parts}, "
                f"got {self.batch_size // self.micro_batches} sequences: lower --micro-batches"
            )
        return mesh


def from_command_line() -> Config:
    """Reads the command line and initialises the devices.

    Raises:
        ValueError: an argument is invalid, or does not match the devices.
    """
    config = command_line.from_command_line(Config, __doc__)
    if config.devices != jax.config.jax_num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.devices)
    if config.distributed:
        jax.distributed.initialize()
    config.make_mesh()
    if jax.process_count() > 1 and config.out is None:
        raise ValueError("several processes need --out, a folder that all of them share")
    if jax.process_index() > 0:  # only process 0 prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return config


def make_functions(config: Config) -> pretrain.Functions:
    """The functions of a run, with sharded arrays."""
    mesh = config.make_mesh()
    specs = (PartitionSpec(), llama_sharding.BATCH)
    replicated, batch = (NamedSharding(mesh, spec) for spec in specs)
    functions = pretrain.make_functions(config, activations=batch)
    abstract = jax.eval_shape(functions.init, jax.random.key(config.seed))
    params = llama_sharding.param_shardings(mesh, abstract.params)
    opt_state = natgalore.state_shardings(
        config.make_optimizer(),
        abstract.params,
        params,
        zero_axis=("fsdp", "data") if config.zero else "fsdp",
    )
    state = TrainState(params, opt_state)
    per_device = TrainState(*map(bytes_per_device, abstract, state))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return pretrain.Functions(
        init=jax.jit(functions.init, out_shardings=state),
        train_step=jax.jit(
            functions.train_step,
            in_shardings=(state, batch),
            out_shardings=(state, replicated),
            donate_argnums=0,
        ),
        validation_loss=jax.jit(
            functions.validation_loss, in_shardings=(params, batch), out_shardings=replicated
        ),
        # Each process draws the full batch and keeps the rows of its devices.
        place=lambda tokens: jax.make_array_from_process_local_data(batch, tokens, tokens.shape),
        about=(
            f", {sizes}, per device {run_display.megabytes(per_device.params)} of weights "
            f"and {run_display.megabytes(per_device.opt_state)} of optimizer state"
        ),
    )


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of a sharded tree on each device."""
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def main() -> None:
    pretrain.run(from_command_line, make_functions)


if __name__ == "__main__":
    main()
