"""Sharding of a Llama on a mesh of data x fsdp x tensor: batch, weights and activations.

    data     replicas of the model, each with its own rows of the batch
    fsdp     rows of the batch too; weights are sharded and gathered layer by layer
    tensor   each device computes some attention heads and a slice of the MLP's inner width

A matrix is sharded over fsdp on the axis of the residual stream and over tensor on the other axis,
so a layer needs two reductions over tensor (Megatron, arXiv 1909.08053). The mesh axes are Auto:
the model is written for one device, and the compiler partitions the computation.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P


AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
RULES = {  # mesh axes of a weight's last axes, by its name
    r"embed/embedding": ("fsdp", "tensor"),
    r"(query|key|value|gate|up)/kernel": ("fsdp", "tensor"),
    r"(out|down)/kernel": ("tensor", "fsdp"),
    r"head/kernel": ("fsdp", "tensor"),
    r"norm/scale": (None,),
}


def make_mesh(shape: Sequence[int]) -> Mesh:
    """A mesh of all devices; one size may be -1 and is computed from the others.

    Raises:
        ValueError: the shape does not match the number of devices.
    """
    devices, known = jax.device_count(), math.prod(n for n in shape if n != -1)
    sizes = tuple(devices // known if n == -1 else n for n in shape)
    if math.prod(sizes) != devices:
        raise ValueError(f"a mesh of {' x '.join(map(str, shape))} does not fit {devices} devices")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of each weight by its name; an axis that is not divisible is replicated."""

    def sharding(path, weight):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        (last,) = [axes for rule, axes in RULES.items() if re.search(f"{rule}$", name)]
        axes = (*[None] * (weight.ndim - len(last)), *last)
        divisible = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, weight.shape, strict=True)
        ]
        while divisible and divisible[-1] is None:  # JAX's own form: avoids a second compilation
            divisible.pop()
        return NamedSharding(mesh, P(*divisible))

    return jax.tree_util.tree_map_with_path(sharding, params)
