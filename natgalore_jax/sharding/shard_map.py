"""Inside `jax.shard_map`: whether an array is the same on all devices, as its type says.

Data parallelism by hand keeps weights and state the same everywhere, so gradients, which are each
device's own, must be reduced before an update. Where the state is each device's own too, a model
on each device say, there is nothing to reduce.

Types say it with `check_vma=True`, the default; with False, and in `jax.pmap`, they are silent,
and unreduced gradients let the devices' weights drift apart.
"""

from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import Array, PyTree

from ..tree.leaf_spec import is_core, path_name


def varying(x: Any) -> frozenset[str]:
    """The mesh's axes along which devices may hold different values of `x`."""
    return jax.typeof(x).manual_axis_type.varying


def varying_as(x: Array, like: Any) -> Array:
    """`x`, which may then become different along the axes along which `like` is."""
    axes = sorted(varying(like) - varying(x))
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def check_reduced(updates: PyTree, counters: PyTree) -> None:
    """Raises if a gradient differs between devices that share the state of its leaf.

    Args:
      updates: the gradients.
      counters: a tree like it of an array, or Core, of each leaf's state.

    Raises:
      ValueError: the message names the leaf and the axes.
    """

    def check(path, G, kept):
        axes = varying(G) - varying(kept.value if is_core(kept) else kept)
        if axes:
            raise ValueError(
                f"the gradient of `{path_name(path)}` differs along {_named(axes)}, its state does "
                "not: reduce the gradients first (jax.lax.pmean)."
            )

    jax.tree_util.tree_map_with_path(check, updates, counters)


def _named(axes: Collection[str]) -> str:
    return ", ".join(f"'{axis}'" for axis in sorted(axes))
