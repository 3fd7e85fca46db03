"""Symmetric matrices in a byte a number: 16 bits for each pair, since half of them say nothing new.

Of a semidefinite A the diagonal is kept as it is, in full, and of each pair i > j the correlation

    ρᵢⱼ = Aᵢⱼ / √(Aᵢᵢ Aⱼⱼ) ∈ [-1, 1],    q = round(32512 ρᵢⱼ) = 256 h + l,                      (1)

h at (i, j) and l at (j, i) of one int8 matrix; h = -128, which no q has, stands for what is not
finite. What comes back is symmetric to the bit, its trace is exact, and ρ is right to 1.5e-5.

The 8-bit code of moments would not do for a Fisher. Its noise, 1 to 2 % of each entry, goes into
all directions alike, and in those of small eigenvalues it is more than the damping. Measured after
300 updates at β = 0.98, for r = 64 to 256, cores of 2 r columns, and eigenvalues over four decades,
or one of them 1e5 times the others:

                      near L's own axes       in other bases
    8 bits, ρ = 0.1   answers wrong by 6 %    L + λI indefinite, mostly no root
    (1),    ρ = 0.1   0.03 to 0.05 %          0.05 to 0.2 %, 1 % in the worst direction
    (1),    ρ = 0.01  0.08 to 0.2 %           0.4 to 1.7 %
    (1),    ρ = 1e-3  0.3 to 0.5 %            1.4 to 7 %

With (1) no eigenvalue of L + λI was below λ. Rounding at random was no better. To nearest,
correlations of less than 1.5e-5 / (1 - β) do not move: 8e-4 at 0.98. (Cholesky factors in 8 bits
keep L definite, but are a hundred times as far off, and a factorisation on each step.)

Kin: Wang et al., "4-bit Shampoo for Memory-Efficient Network Training", arXiv:2405.18144, which
keeps eigenvectors and restores their orthonormality.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from ..sharding.partitioning import array_partition, with_auto_axes
from .dynamic_8bit import wide
from .quantized_array import QuantizedArray


LEVELS = 127 * 256  # of |q|, so that h and l both fit into a byte
NAN = -128


@jax.tree_util.register_dataclass
class SymmetricArray(QuantizedArray):
    """A symmetric semidefinite array, in the state in its place.

    Attributes:
      codes: (*batch, r, r) int8, h of (1) below the diagonal and l above it.
      scales: (*batch, r), the diagonal, in the dtype of the array.
    """

    def array(self) -> Float[Array, "*batch r r"]:
        return with_auto_axes(decode, array_partition(self.codes), self.codes, self.scales)

    def anew(self, x: Float[Array, "*batch r r"]) -> "SymmetricArray":
        return coded(x)


def coded(x: Float[Array, "*batch r r"]) -> SymmetricArray:
    """`encode`, both results lying on a mesh as x does, whose last two axes are whole."""
    return SymmetricArray(*with_auto_axes(encode, (array_partition(x), array_partition(x)), x))


def encode(
    x: Float[Array, "*batch r r"],
) -> tuple[Int8[Array, "*batch r r"], Float[Array, "*batch r"]]:
    """The integers of (1), and the diagonal.

    Args:
      x: of any float dtype, symmetric, no eigenvalue below zero; what is above the diagonal is not
        read.

    Example:
      >>> codes, diagonal = encode(jnp.array([[4.0, 0.5], [0.5, 1.0]]))
      >>> codes.tolist(), diagonal.tolist(), decode(codes, diagonal).tolist()
      ([[0, -64], [32, 0]], [4.0, 1.0], [[4.0, 0.5], [0.5, 1.0]])
    """
    diagonal = jnp.diagonal(x, axis1=-2, axis2=-1)
    root = jnp.sqrt(wide(diagonal))
    inverse = jnp.where(root == 0, 0, 1 / jnp.where(root == 0, 1, root))
    rho = wide(x) * inverse[..., :, None] * inverse[..., None, :]
    finite = jnp.isfinite(rho)
    q = jnp.where(finite, jnp.round(jnp.clip(rho, -1, 1) * LEVELS), 0)
    high = jnp.floor((q + 128) / 256)
    low = q - 256 * high
    high = jnp.where(finite, high, NAN)
    return (jnp.tril(high, -1) + jnp.tril(low, -1).mT).astype(jnp.int8), diagonal


def decode(
    codes: Int8[Array, "*batch r r"], diagonal: Float[Array, "*batch r"]
) -> Float[Array, "*batch r r"]:
    """What integers and a diagonal stand for, in the dtype of the diagonal."""
    full = wide(diagonal)
    root = jnp.sqrt(full)
    q = codes.astype(full.dtype)
    high = jnp.tril(q, -1)
    rho = jnp.where(high == NAN, jnp.nan, (256 * high + jnp.triu(q, 1).mT) / LEVELS)
    x = (rho + rho.mT) * (root[..., :, None] * root[..., None, :])  # symmetric to the bit
    on = jnp.eye(x.shape[-1], dtype=bool)
    return jnp.where(on, full[..., None], x).astype(diagonal.dtype)
