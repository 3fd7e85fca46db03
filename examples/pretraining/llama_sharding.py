"""How a Llama lies on a mesh of data x fsdp x tensor: batch, weights and activations.

    data     copies of the model, each on its own part of the batch
    fsdp     the same, but each keeps a part of every weight only and gathers a layer's in turn
    tensor   each computes a part of every layer: some heads, some of the width inside the MLP

A matrix is sharded over fsdp on the side of the residual stream and over tensor on the other, so
that a layer needs two sums over tensor (Megatron, arXiv:1909.08053). The axes of the mesh are Auto:
the model is written as for one device, and the compiler places what it computes.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P


AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
RULES = {  # the last axes of a weight, by its name
    r"embed/embedding": ("fsdp", "tensor"),
    r"(query|key|value|gate|up)/kernel": ("fsdp", "tensor"),
    r"(out|down)/kernel": ("tensor", "fsdp"),
    r"head/kernel": ("fsdp", "tensor"),
    r"norm/scale": (None,),
}


def make_mesh(shape: Sequence[int]) -> Mesh:
    """All devices as a mesh of this shape, in which one -1 stands for what is left.

    Raises:
        ValueError: the shape does not fit the devices.
    """
    devices, known = jax.device_count(), math.prod(n for n in shape if n != -1)
    sizes = tuple(devices // known if n == -1 else n for n in shape)
    if math.prod(sizes) != devices:
        raise ValueError(f"a mesh of {' x '.join(map(str, shape))} does not fit {devices} devices")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of each weight, by its name; an axis that does not divide it leaves it whole."""

    def lies(path, weight):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        (last,) = [axes for rule, axes in RULES.items() if re.search(f"{rule}$", name)]
        axes = (*[None] * (weight.ndim - len(last)), *last)
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, weight.shape, strict=True)
        ]
        while fits and fits[-1] is None:  # JAX's own spelling, which compiles once
            fits.pop()
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(lies, params)
