"""Pre-train the Llama of pretrain.py on many devices: data, fully sharded or tensor parallel.

    python examples/pretraining/sharded.py           on all GPUs or TPUs, or eight simulated devices
    python examples/pretraining/sharded.py --mesh 2,2,2    data x fsdp x tensor; -1: the rest
    python examples/pretraining/sharded.py --mesh 8,1,1 --zero  whole weights, sharded state
    python examples/pretraining/sharded.py --help               everything else, as for pretrain.py

With --distributed each host of a cluster or TPU slice runs the same line; --out then names a folder
that all of them see. A run goes on on another mesh as well, and one of pretrain.py does: the same
numbers, but for the order of sums. On the same mesh it goes on to the same bits.

This file only says how arrays lie. The model is pretrain.py's and knows of no mesh but where the
embedded tokens lie; `natgalore.state_shardings` tells how the optimizer's state does. Its
`zero_axis` is fsdp, or a weight whose rows lie there would have its moments on every device.
"""

import math
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import tyro
from jax.sharding import NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from examples.common import command_line, run_display
from examples.common.training_loop import TrainState
from examples.pretraining import llama_sharding, pretrain, settings


@dataclass(frozen=True)
class Config(settings.Config):
    """Pre-train a Llama on text, on bytes or C4, on many devices."""

    ABOUT_THE_CALL: ClassVar = (*settings.Config.ABOUT_THE_CALL, "distributed")
    CHANGEABLE: ClassVar = (*settings.Config.CHANGEABLE, "mesh", "zero", "devices")

    mesh: Annotated[str, tyro.conf.arg(metavar="DATA,FSDP,TENSOR")] = "1,-1,1"
    """Sizes of the mesh's axes; one of them may be -1, for what is left. Default: all fsdp."""
    zero: bool = False
    """Shard the optimizer's state of replicated weights over the axis data (ZeRO-1)."""
    devices: int = 8
    """CPU devices to simulate where there is no GPU or TPU."""
    distributed: bool = False
    """Find the other processes of this cluster or TPU slice, and train with them."""

    def check(self) -> None:
        super().check()
        if not 1 <= self.devices < 2**10:
            raise ValueError(f"--devices must be at least 1 and below 2**10, got {self.devices}")
        sizes = self.mesh.split(",")
        whole = [n for n in sizes if n.isdecimal() and int(n) > 0]
        if len(sizes) != len(llama_sharding.AXES) or len(whole) + sizes.count("-1") != len(sizes):
            raise ValueError(f"--mesh must be three sizes, as in 2,2,2 or 1,-1,1, got {self.mesh}")
        if sizes.count("-1") > 1:
            raise ValueError(f"--mesh can have one -1, got {self.mesh}")

    def make_mesh(self) -> jax.sharding.Mesh:
        """The mesh; starts JAX's devices.

        Raises:
            ValueError: it does not fit them, or the batch does not fit it.
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
    """Reads the command line and starts the devices.

    Raises:
        ValueError: something makes no sense, or does not fit them.
    """
    config = command_line.from_command_line(Config)
    if config.devices != jax.config.jax_num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.devices)
    if config.distributed:
        jax.distributed.initialize()
    config.make_mesh()
    if jax.process_count() > 1 and config.out is None:
        raise ValueError("several processes need --out, a folder that all of them see")
    if jax.process_index() > 0:  # the first one speaks for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return config


def make_functions(config: Config) -> pretrain.Functions:
    """The functions of a run, with their arrays sharded."""
    mesh = config.make_mesh()
    whole, batch = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), llama_sharding.BATCH))
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
    mine = TrainState(*map(bytes_per_device, abstract, state))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return pretrain.Functions(
        init=jax.jit(functions.init, out_shardings=state),
        train_step=jax.jit(
            functions.train_step,
            in_shardings=(state, batch),
            out_shardings=(state, whole),
            donate_argnums=0,
        ),
        validation_loss=jax.jit(
            functions.validation_loss, in_shardings=(params, batch), out_shardings=whole
        ),
        # Each process draws the whole batch and keeps the rows of its devices.
        place=lambda tokens: jax.make_array_from_process_local_data(batch, tokens, tokens.shape),
        about=(
            f", {sizes}: a device holds {run_display.megabytes(mine.params)} of weights "
            f"and {run_display.megabytes(mine.opt_state)} of optimizer state"
        ),
    )


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays on each of the devices they are sharded over."""
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def main() -> None:
    pretrain.run(from_command_line, make_functions)


if __name__ == "__main__":
    main()
