"""Symmetric matrices in one byte per entry: 16 bits for each pair of equal entries.

The diagonal of a semidefinite A is stored in full, and for each pair i > j the correlation

    ρᵢⱼ = Aᵢⱼ / √(Aᵢᵢ Aⱼⱼ) ∈ [-1, 1],    q = round(32512 ρᵢⱼ) = 256 h + l,                      (1)

h at (i, j) and l at (j, i) of one int8 matrix; h = -128, which no q has, encodes numbers that are
not finite. The decoded matrix is symmetric to the bit, its trace is exact, and the error of ρ is at
most 1.5e-5.

The 8-bit code of moments is too coarse for a Fisher. Its error, 1 to 2 % of each entry, spreads
evenly over directions, and along small eigenvalues it exceeds the damping λ = ρ tr(L)/r. Errors of
preconditioned cores after 300 updates at β = 0.98, for r = 64 to 256, cores of 2 r columns, and
eigenvalues over four decades, or one eigenvalue 1e5 times the others:

                      near L's eigenbasis     in other bases
    8 bits, ρ = 0.1   6 %                     L + λI indefinite, mostly no root
    (1),    ρ = 0.1   0.03 to 0.05 %          0.05 to 0.2 %, 1 % in the worst direction
    (1),    ρ = 0.01  0.08 to 0.2 %           0.4 to 1.7 %
    (1),    ρ = 1e-3  0.3 to 0.5 %            1.4 to 7 %

With (1) no eigenvalue of L + λI was below λ. Stochastic rounding was no better. With rounding to
nearest, correlations below 1.5e-5 / (1 - β) do not change: 8e-4 at 0.98. (8-bit Cholesky factors
keep L definite, but have a hundred times the error and need a factorisation per step.)

Related: Wang et al., "4-bit Shampoo for Memory-Efficient Network Training", arXiv:2405.18144,
quantizes eigenvectors and restores their orthonormality.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from ..sharding.array_partitions import array_partition, with_auto_axes
from ..tree.flax_serialization import serializable
from .dynamic_8bit import at_least_float32
from .quantized_array import QuantizedArray


LEVELS = 127 * 256  # the largest |q| for which h and l fit into a byte
NAN = -128


@serializable
@jax.tree_util.register_dataclass
class SymmetricArray(QuantizedArray):
    """A quantized symmetric semidefinite array, in place of the array in a state.

    Attributes:
      codes: (*batch, r, r) int8, h of (1) below the diagonal and l above it.
      scales: (*batch, r), the diagonal, in the dtype of the array.
    """

    def decode(self) -> Float[Array, "*batch r r"]:
        return with_auto_axes(decode, array_partition(self.codes), self.codes, self.scales)

    def encode(self, x: Float[Array, "*batch r r"]) -> "SymmetricArray":
        return quantize_symmetric(x)


def quantize_symmetric(x: Float[Array, "*batch r r"]) -> SymmetricArray:
    """`encode` with the partition of x, whose last axis is not sharded."""
    return SymmetricArray(*with_auto_axes(encode, (array_partition(x), array_partition(x)), x))


def encode(
    x: Float[Array, "*batch r r"],
) -> tuple[Int8[Array, "*batch r r"], Float[Array, "*batch r"]]:
    """The integers of (1), and the diagonal.

    Args:
      x: symmetric and semidefinite, of any float dtype; entries above the diagonal are not read.

    Example:
      >>> codes, diagonal = encode(jnp.array([[4.0, 0.5], [0.5, 1.0]]))
      >>> codes.tolist(), diagonal.tolist(), decode(codes, diagonal).tolist()
      ([[0, -64], [32, 0]], [4.0, 1.0], [[4.0, 0.5], [0.5, 1.0]])
    """
    diagonal = jnp.diagonal(x, axis1=-2, axis2=-1)
    root = jnp.sqrt(at_least_float32(diagonal))
    inverse = jnp.where(root == 0, 0, 1 / jnp.where(root == 0, 1, root))
    rho = at_least_float32(x) * inverse[..., :, None] * inverse[..., None, :]
    finite = jnp.isfinite(rho)
    q = jnp.where(finite, jnp.round(jnp.clip(rho, -1, 1) * LEVELS), 0)
    high = jnp.floor((q + 128) / 256)
    low = q - 256 * high
    high = jnp.where(finite, high, NAN)
    return (jnp.tril(high, -1) + jnp.tril(low, -1).mT).astype(jnp.int8), diagonal


def decode(
    codes: Int8[Array, "*batch r r"], diagonal: Float[Array, "*batch r"]
) -> Float[Array, "*batch r r"]:
    """The matrix that integers and a diagonal encode, in the dtype of the diagonal."""
    full = at_least_float32(diagonal)
    root = jnp.sqrt(full)
    q = codes.astype(full.dtype)
    high = jnp.tril(q, -1)
    rho = jnp.where(high == NAN, jnp.nan, (256 * high + jnp.triu(q, 1).mT) / LEVELS)
    x = (rho + rho.mT) * (root[..., :, None] * root[..., None, :])  # symmetric to the bit
    on_diagonal = jnp.eye(x.shape[-1], dtype=bool)
    return jnp.where(on_diagonal, full[..., None], x).astype(diagonal.dtype)
