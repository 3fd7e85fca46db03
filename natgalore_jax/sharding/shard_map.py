"""Arrays that vary between devices inside `jax.shard_map`.

Manual data parallelism keeps weights and state equal on all devices. Gradients differ between
devices and must be reduced before an update. Where the state varies too, for example with one model
per device, no reduction is needed.

Types contain the axes of variation with `check_vma=True`, the default. With `check_vma=False`, and
in `jax.pmap`, they do not, and unreduced gradients let the weights of the devices diverge.
"""

from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import Array, PyTree

from ..tree.cores import is_core
from ..tree.leaf_spec import path_name


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes along which the values of `x` may differ between devices."""
    return jax.typeof(x).manual_axis_type.varying


def varying_as(x: Array, other: Any) -> Array:
    """`x`, cast to vary along the axes along which `other` varies."""
    axes = sorted(varying_axes(other) - varying_axes(x))
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def check_reduced(updates: PyTree, counters: PyTree) -> None:
    """Raises if a gradient differs between devices that share the state of its leaf.

    Args:
      updates: the gradients.
      counters: a tree of the same structure, with one state array, or Core, per leaf.

    Raises:
      ValueError: names the leaf and the axes.
    """

    def check(path, G, counter):
        axes = varying_axes(G) - varying_axes(counter.value if is_core(counter) else counter)
        if axes:
            raise ValueError(
                f"the gradient of `{path_name(path)}` differs between devices along "
                f"{_quoted(axes)} and its state does not: reduce the gradients first "
                "(jax.lax.pmean)."
            )

    jax.tree_util.tree_map_with_path(check, updates, counters)


def _quoted(axes: Collection[str]) -> str:
    return ", ".join(f"'{axis}'" for axis in sorted(axes))
