"""How a TPU stores an array: in tiles, with one axis padded to 128 numbers and another to 8."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


class Tiling(NamedTuple):
    """The way to store an array that needs the least memory, which the compiler chooses.

    Attributes:
      size: numbers, padding included.
      order: the axes from major to minor; the last one is padded to 128 numbers, the one before it
        to 8 (or 4, 2, 1, if it is that short, but at least 32 bits).
    """

    size: int
    order: tuple[int, ...]


def smallest_tiling(shape: Sequence[int], bits: int) -> Tiling:
    """The tiling of an array of numbers of `bits` bits; row-major if no other one is smaller.

    Example:
      >>> smallest_tiling((1024, 2736), 32)  # 2736 is no multiple of 128, but of 8
      Tiling(size=2801664, order=(1, 0))
    """
    if len(shape) < 2:
        return Tiling(_vector_size(math.prod(shape), bits), tuple(range(len(shape))))
    axes = range(len(shape))
    tilings = [
        Tiling(_tiled_size(shape, i, j, bits), (*(k for k in axes if k not in (i, j)), i, j))
        for j in reversed(axes)
        for i in reversed(axes)
        if i != j
    ]
    return min(tilings, key=lambda tiling: tiling.size)


def bits_of(dtype: Any) -> int:
    """Bits of one number. NumPy's `itemsize` is the unpacked size."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize


def _tiled_size(shape: Sequence[int], second: int, last: int, bits: int) -> int:
    others = math.prod(n for axis, n in enumerate(shape) if axis not in (second, last))
    return others * _rows(shape[second], bits) * _padded(shape[last], 128)


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _rows(size: int, bits: int) -> int:
    """The padded size of the axis that is second in a tile."""
    rows = next(n for n in (1, 2, 4, 8) if n >= min(size, 8) and n * bits >= 32)
    return _padded(size, rows)


def _vector_size(size: int, bits: int) -> int:
    """A vector has rows of 128 numbers: 1, 2, 4, or a multiple of 8."""
    return _rows(_padded(size, 128) // 128, bits) * 128 if size else 0
