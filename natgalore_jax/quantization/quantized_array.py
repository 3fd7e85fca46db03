"""Arrays in 8 or 4 bits, in a state in place of the arrays they encode."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..sharding.array_partitions import array_partition, explicit_mesh, with_auto_axes
from ..sharding.partitioning import add_axes, all_mesh_axes, divisible_partition
from ..tree.cores import Basis
from ..tree.flax_serialization import serializable
from ..util.linalg import matmul
from .dynamic_8bit import Code, block_size, code_of, decode, encode


SMALLEST = 4096  # entries; smaller arrays are not encoded, as in 8-bit Adam

# States whose transformation takes QuantizedArrays in its state, and returns them.
TAKES_CODES: set[type] = set()


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array in 8 or 4 bits.

    Attributes:
      codes: (*axes, n) int8, uint8 or int4; the dtype determines the code.
      scales: (*axes, blocks), in the dtype of the array.
      key: of the stochastic rounding of the next `encode`; None rounds to nearest. Only present
        during an update.
    """

    codes: Any
    scales: Any
    key: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def size(self) -> int:
        return self.codes.size

    def decode(self) -> Array:
        """The array that the codes stand for."""
        return with_auto_axes(decode, array_partition(self.codes), self.codes, self.scales)

    def encode(self, x: Array) -> "QuantizedArray":
        """Encodes x in the place of this array, with the same code and block size."""
        block, code = x.shape[-1] // self.scales.shape[-1], code_of(self.codes)
        encoded = lambda x, key: encode(code, x, block, key)
        codes, scales = with_auto_axes(encoded, (self.codes, self.scales), x, self.key)
        return dataclasses.replace(self, codes=codes, scales=scales)

    def with_key(self, key: Array | None) -> "QuantizedArray":
        return dataclasses.replace(self, key=key)


def is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def quantize(
    code: Code, x: Float[Array, "*axes n"], block: int, key: Array | None = None, batch: int = 0
) -> QuantizedArray:
    """Encodes an array.

    Codes are sharded as x; a mesh axis that does not divide the blocks divides another axis of the
    scales, one of the leading `batch` axes last.
    """
    mesh, codes = explicit_mesh(x), array_partition(x)
    scales = codes
    if mesh is not None:
        blocks = (*x.shape[:-1], x.shape[-1] // block)
        divisible = divisible_partition(codes, blocks, mesh)
        scales = add_axes(divisible, all_mesh_axes(codes), blocks, mesh, batch)
    encoded = lambda x, key: encode(code, x, block, key)
    return QuantizedArray(*with_auto_axes(encoded, (codes, scales), x, key))


def dequantize(tree: PyTree) -> PyTree:
    """Decodes every QuantizedArray of a tree; decoded bases are orthonormal again."""

    def one(x):
        if isinstance(x, Basis):
            return x.replace(decode_basis(x.value))
        return x.decode() if is_quantized(x) else x

    return jax.tree.map(one, tree, is_leaf=lambda x: is_quantized(x) or isinstance(x, Basis))


def requantize(tree: PyTree, like: PyTree) -> PyTree:
    """Encodes the arrays of `tree` at whose place `like` has a QuantizedArray."""
    encode = lambda old, x: old.encode(x) if is_quantized(old) else x
    return jax.tree.map(encode, like, tree, is_leaf=is_quantized)


def without_keys(arrays: list[Any]) -> list[Any]:
    """The arrays, of which a QuantizedArray rounds to nearest."""
    return [x.with_key(None) if is_quantized(x) else x for x in arrays]


def with_keys_of(old: list[Any], new: list[Any]) -> list[Any]:
    """The new arrays, of which a QuantizedArray rounds by the key of the old one."""
    pairs = zip(old, new, strict=True)
    return [x.with_key(before.key) if is_quantized(x) else x for before, x in pairs]


def decode_basis(stored: Any) -> Array:
    """The basis that a state stores: decoded with orthonormal columns if it is in 8 bits.

    Codes are orthonormal to 1.3 % only, which leaves this share of a large gradient in G − P PᵀG.
    Where the residual is small, 15 to 43 % of it then lay in the span of P (m = 512 and 1024, r =
    m/8 and m/4, singular values over two and four decades). One iteration for the polar factor
    reduces these to 1.3e-4 and 0.3 to 0.8 %, for r/n of the cost of a projection and a lift.
    """
    if not is_quantized(stored):
        return stored
    orthonormal = lambda P: 1.5 * P - 0.5 * matmul(P, matmul(P.mT, P))
    decoded = lambda codes, scales: orthonormal(decode(codes, scales))
    return with_auto_axes(decoded, stored.codes, stored.codes, stored.scales)


def block_of(x: Any) -> int | None:
    """The number of entries of x that share a scale; None if x is not encoded."""
    return block_size(x.shape[-1]) if is_large(x) else None


def is_large(x: Any) -> bool:
    """Whether an array has enough entries to encode."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.size >= SMALLEST
