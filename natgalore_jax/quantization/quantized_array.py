"""Arrays of a state in 8 bits, in their places: made, read, and kept where nothing has changed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..sharding.partitioning import (
    array_partition,
    divisible_partition,
    explicit_mesh,
    with_auto_axes,
)
from ..tree.leaf_spec import Basis
from ..util.linalg import matmul
from .dynamic_8bit import Code, block_size, code_of, decode, encode


SMALLEST = 4096  # numbers of an array that is worth it, as in 8-bit Adam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array in 8 bits, in the state in its place.

    Attributes:
      codes: (*axes, n) int8 or uint8, which says which code it is.
      scales: (*axes, blocks), in the dtype of the array.
    """

    codes: Any
    scales: Any

    def array(self) -> Array:
        """What it stands for."""
        return with_auto_axes(decode, array_partition(self.codes), self.codes, self.scales)

    def anew(self, x: Array) -> "QuantizedArray":
        """x in its place, to nearest."""
        return coded(code_of(self.codes), x, x.shape[-1] // self.scales.shape[-1])


def is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def coded(
    code: Code, x: Float[Array, "*axes n"], block: int, key: Array | None = None
) -> QuantizedArray:
    """`encode`, the codes lying on a mesh as x does, and the scales as far as their number lets."""
    mesh, lies = explicit_mesh(x), array_partition(x)
    blocks = (*x.shape[:-1], x.shape[-1] // block)
    scales = lies if mesh is None else divisible_partition(lies, blocks, mesh)
    encoded = lambda x, key: encode(code, x, block, key)
    return QuantizedArray(*with_auto_axes(encoded, (lies, scales), x, key))


def decoded(state: PyTree) -> PyTree:
    """`state` with the array that each QuantizedArray stands for in its place, bases
    orthonormal again.
    """

    def array(x):
        if _is_coded_basis(x):
            return x.replace(basis(x.value))
        return x.array() if is_quantized(x) else x

    return jax.tree.map(array, state, is_leaf=_is_leaf)


def recoded(state: PyTree, like: PyTree) -> PyTree:
    """`state` with an array in 8 bits, to nearest, wherever `like` has one: undoes `decoded`.

    What is in 8 bits already stays as it is.
    """

    def one(x, array):
        if _is_coded_basis(x):
            return array if is_quantized(array.value) else x.replace(x.value.anew(array.value))
        if not is_quantized(x) or is_quantized(array):
            return array
        return x.anew(array)

    return kept_bases(like, state, jax.tree.map(one, like, state, is_leaf=_is_leaf))


@dataclasses.dataclass(frozen=True)
class Closed:
    """A QuantizedArray as one leaf, where both its arrays are to be met together.

    Attributes:
      coded: what is in it.
    """

    coded: QuantizedArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        return self.coded.codes.shape


def closed(state: PyTree) -> PyTree:
    """`state` with a leaf in place of each QuantizedArray."""
    return jax.tree.map(lambda x: Closed(x) if is_quantized(x) else x, state, is_leaf=is_quantized)


def opened(state: PyTree) -> PyTree:
    """Undoes `closed`."""
    return jax.tree.map(lambda x: x.coded if isinstance(x, Closed) else x, state)


def kept_bases(before: PyTree, state: PyTree, encoded: PyTree) -> PyTree:
    """`encoded`, which `state` was, with the codes `before` of each basis that has not changed.

    A basis that was made orthonormal is not what its codes stand for, so that it would be rounded
    anew on every step, and drift.
    """

    def one(old, array, new):
        if not _is_coded_basis(old) or is_quantized(array.value):
            return new
        return new.replace(
            keep_codes_if_unchanged(old.value, basis(old.value), array.value, new.value)
        )

    return jax.tree.map(one, before, state, encoded, is_leaf=_is_leaf)


def keep_codes_if_unchanged(
    old: QuantizedArray, was: Array, now: Array, new: QuantizedArray
) -> QuantizedArray:
    """The codes of each matrix that was one array and is another: the old ones of an equal one."""

    def keep(was, now, old, new):
        same = (was == now).all(axis=(-2, -1), keepdims=True)
        return jax.tree.map(lambda a, b: jnp.where(same, a, b), old, new)

    both = [(x.codes, x.scales) for x in (old, new)]
    return QuantizedArray(*with_auto_axes(keep, both[0], was, now, *both))


def basis(x: QuantizedArray) -> Float[Array, "*batch m r"]:
    """A basis that is kept in 8 bits, with orthonormal columns again.

    Its codes are so to 1.3 %, and of a large gradient that much is left in G − P Pᵀ G, beside
    which what the projection leaves out may be small: 15 to 43 % of a whitened residual then lay
    in the span of P (m = 512 and 1024, r = m/8 and m/4, singular values over two and four decades).
    One turn of the iteration for the polar factor leaves 1.3e-4, and 0.3 to 0.8 %. It costs r/n of
    a projection down and up.
    """
    again = lambda P: 1.5 * P - 0.5 * matmul(P, matmul(P.mT, P))
    return with_auto_axes(
        lambda codes, scales: again(decode(codes, scales)), x.codes, x.codes, x.scales
    )


def basis_of(kept: Any) -> Array:
    """Of what a state keeps of a basis: that, or what it stands for if it is in 8 bits."""
    return basis(kept) if is_quantized(kept) else kept


def _is_coded_basis(x: Any) -> bool:
    return isinstance(x, Basis) and is_quantized(x.value)


def _is_leaf(x: Any) -> bool:
    return is_quantized(x) or _is_coded_basis(x)


def block_of(x: Any) -> int | None:
    """How many numbers of x share a scale; None where x stays as it is."""
    return block_size(x.shape[-1]) if is_large(x) else None


def is_large(x: Any) -> bool:
    """Whether an array is worth it."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.size >= SMALLEST
