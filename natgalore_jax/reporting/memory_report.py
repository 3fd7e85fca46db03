"""Bytes of an optimizer's state, in total and per leaf, counted from its shapes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from ..subspace.state import bases_in
from ..tree.cores import Basis, Core
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import path_name
from ..tree.state_roles import owner
from ..util.text_tables import human_bytes, table
from ..util.tpu_tiles import bits_of, smallest_tiling


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Result of :func:`memory_report`, in bytes; prints as a table.

    Attributes:
      total: bytes of the state, by optimizer.
      projected: bytes of the state of those leaves that at least one of the optimizers projects.
    """

    total: dict[str, int]
    projected: dict[str, int]

    def __str__(self) -> str:
        first = next(iter(self.total))
        head = ("optimizer", "state", f"/ {first}", "projected leaves", f"/ {first}")
        body = [
            (
                name,
                human_bytes(self.total[name]),
                _ratio(self.total[name], self.total[first]),
                human_bytes(self.projected[name]),
                _ratio(self.projected[name], self.projected[first]),
            )
            for name in self.total
        ]
        return table([head, *body], numbers=4)


def memory_report(
    params: PyTree, optimizers: Mapping[str, optax.GradientTransformation]
) -> MemoryReport:
    """Counts the bytes of state of several Optax transformations.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`, of any size: nothing is allocated.
      optimizers: transformations by name; the table's ratios are to the first.

    Returns:
      A :class:`MemoryReport`; `print` it.

    Raises:
      TypeError: if `optimizers` is no mapping, or stands before the params.
      ValueError: if `optimizers` is empty.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((256, 64), jnp.float32)}}
      >>> galore = natgalore.galore(1.0, rank=16)
      >>> report = memory_report(params, {"adamw": optax.adamw(1.0), "galore": galore})
      >>> report.projected["adamw"], report.projected["galore"]  # 2·64·256·4, (64 + 2·256)·16·4 + 8
      (131072, 36872)
    """
    if not isinstance(optimizers, Mapping) or isinstance(params, optax.GradientTransformation):
        raise TypeError("memory_report takes the params, then a mapping from names to optimizers.")
    if not optimizers:
        raise ValueError("`optimizers` must name at least one transformation, got none.")
    states = {name: jax.eval_shape(tx.init, params) for name, tx in optimizers.items()}
    projected = {P.spec.name for state in states.values() for P in bases_in(state)}
    by_optimizer = {name: bytes_by_leaf(state, params) for name, state in states.items()}
    return MemoryReport(
        total={name: sum(map(nbytes, jax.tree.leaves(state))) for name, state in states.items()},
        projected={
            name: sum(leaf_bytes[path] for path in projected)
            for name, leaf_bytes in by_optimizer.items()
        },
    )


def bytes_by_leaf(
    state: PyTree, params: PyTree, size: Callable[[Any], int] | None = None
) -> dict[str, int]:
    """Bytes of `state` per leaf of `params`, by the leaf's name; `size` counts one array.

    A Core or Basis carries the path of its leaf. Any other array belongs to the leaf whose path is
    the end of the array's own path, less the fields of a quantized array.
    """
    state, params, size = unbox(state), unbox(params), size or nbytes
    names = {path: path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    counted = dict.fromkeys(names.values(), 0)
    has_spec = lambda x: isinstance(x, Core | Basis)
    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=has_spec):
        leaf = node.spec.path if has_spec(node) else owner(path, names)
        if leaf is not None:
            counted[names[leaf]] += sum(map(size, jax.tree.leaves(node)))
    return counted


def nbytes(x: Any) -> int:
    """Bytes of an array or shape, packed: two 4-bit or four 2-bit numbers share a byte.

    Example:
      >>> [nbytes(jax.ShapeDtypeStruct((3, 5), dtype)) for dtype in ("float32", "int4")]
      [60, 8]
    """
    return -(-math.prod(x.shape) * bits_of(x.dtype) // 8)


def nbytes_on_tpu(x: Any) -> int:
    """Bytes of an array or shape in a TPU's memory, which pads it to tiles.

    One axis is padded to 128 numbers and one to 8 (or 4, 2, 1, if it is that short, but at least 32
    bits); the compiler chooses the two axes that need the least memory. So a core (r, n) of any
    rank loses little: r = 4, 8 and 16 nothing if n is a multiple of 128, r = 100 four percent.

    Example:
      >>> shapes = [(4, 2048), (100, 2048), (100, 100), (4, 2736)]
      >>> [nbytes_on_tpu(jax.ShapeDtypeStruct(shape, "float32")) // 4 for shape in shapes]
      [8192, 212992, 13312, 11264]
    """
    bits = bits_of(x.dtype)
    return smallest_tiling(x.shape, bits).size * bits // 8


def _ratio(a: int, b: int) -> str:
    return f"{a / b:.3f}" if b else "-"
