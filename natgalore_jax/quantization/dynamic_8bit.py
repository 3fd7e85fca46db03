"""Block-wise dynamic quantization to 8 or 4 bits, as in 8-bit Adam, without a lookup table.

A block of numbers is stored as its scale, the largest magnitude, and an integer q per number. The
leading bit of q selects a decade below the scale, and the other bits are a linear fraction of that
decade, so the code spans seven decades and is finest for the largest numbers:

    value(q) = (18 q + 9 - 16·2ᵉ) / (c 5ᴱ⁻ᵉ),   2ᵉ ≤ q < 2ᵉ⁺¹,   E - 6 ≤ e ≤ E,   value(0) = 0  (1)

The values of a decade are the midpoints of equal cells, and c makes the largest value 1. Arrays
linear in gradients are stored as ±q in int8 (E = 6, c = 1271: |q| from 1 to 127). Squares are
stored as the q of their roots in uint8 (E = 7, c = 2551: q from 2 to 255), which halves the decades
they span. A second moment may be 1e-12 of the largest in its block; rounded to 0, it would make
Adam divide by ε alone. So positive squares are rounded to at least the smallest value, 3e-7 of the
scale's root.

In 4 bits an array is stored as ±q with E = 2 and three decades, e = 0, 1, 2 (c = 71: |q| from 1 to
7, with values 0.006, 0.037, 0.087, 0.24, 0.49, 0.75 and 1), and -8 encodes numbers that are not
finite.

The table of 8-bit Adam has an additional value 1 without a -1, and its next value is 0.7 % below.
Here the largest number of a block is exact for both signs, and the unused integer, -128 or 1,
encodes numbers that are not finite. A table would need a gather, which is slow on TPUs.

References: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861;
Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561, for the code.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


GENERATOR = "threefry2x32"  # equal numbers on every machine and under every sharding


class Code(NamedTuple):
    """A code of 8 or 4 bits.

    Attributes:
      dtype: the integer dtype.
      last: E of equation (1).
      nan: the integer for numbers that are not finite.
      squares: whether q encodes the square root of a nonnegative number.
    """

    dtype: Any
    last: int
    nan: int
    squares: bool

    @property
    def largest(self) -> int:
        """The largest q."""
        return 2 ** (self.last + 1) - 1

    @property
    def smallest(self) -> int:
        """The smallest positive q."""
        return 2 ** max(self.last - 6, 0)

    @property
    def decades(self) -> list[tuple[int, float]]:
        """(2ᵉ, 1 / (c 5ᴱ⁻ᵉ)) for each decade: its first q and the unit of its values."""
        c = 18 * self.largest + 9 - 16 * 2**self.last
        exponents = range(max(self.last - 6, 0), self.last + 1)
        return [(2**e, 1 / (c * 5 ** (self.last - e))) for e in exponents]

    def value(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """Equation (1)."""
        value = jnp.zeros_like(q)
        for first, unit in self.decades:
            value = jnp.where(q >= first, (18 * q + (9 - 16 * first)) * unit, value)
        return value

    def nearest(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """The q whose value is nearest to y in [0, 1]; at a midpoint, either neighbour."""
        q, largest_below = jnp.zeros_like(y), 0.0
        for first, unit in self.decades:
            in_decade = jnp.floor((y * (1 / unit) + 16 * first) / 18)
            start = (largest_below + (2 * first + 9) * unit) / 2
            q = jnp.where(y > start, jnp.clip(in_decade, first, 2 * first - 1), q)
            largest_below = (20 * first - 9) * unit
        return q


LINEAR = Code(jnp.int8, 6, -128, squares=False)
LINEAR_4BIT = Code(jnp.int4, 2, -8, squares=False)
SQUARE = Code(jnp.uint8, 7, 1, squares=True)
CODES = {jnp.dtype(code.dtype): code for code in (LINEAR, LINEAR_4BIT, SQUARE)}


def code_of(codes: Any) -> Code:
    """The code of integers, by their dtype."""
    return CODES[codes.dtype]


@functools.partial(jax.jit, static_argnames=("code", "block"))  # traced once for arrays of one type
def encode(
    code: Code, x: Float[Array, "*axes n"], block: int, key: Array | None = None
) -> tuple[Integer[Array, "*axes n"], Float[Array, "*axes blocks"]]:
    """The integers and scales of x.

    Args:
      code: the code.
      x: an array of any float dtype; blocks are along its last axis.
      block: the number of entries with a common scale, a divisor of n.
      key: for stochastic rounding to one of the two neighbours, with mean x. None rounds to
        nearest.

    Returns:
      The integers, and the scales in x's dtype. Scales are entries of x, hence exact.

    Example:
      >>> codes, scales = encode(LINEAR, jnp.array([-2.0, 0.0, 1.0, jnp.nan]), 4)
      >>> codes.tolist(), scales.tolist(), decode(codes, scales)[:3].tolist()
      ([-127, 0, 92, -128], [2.0], [-2.0, 0.0, 1.0086545944213867])
    """
    blocks = at_least_float32(x).reshape(*x.shape[:-1], -1, block)
    finite = jnp.isfinite(blocks)
    size = jnp.where(finite, jnp.abs(blocks), 0)
    scales = size.max(axis=-1, keepdims=True)
    usable = scales >= jnp.finfo(scales.dtype).tiny
    y = jnp.where(usable, size / jnp.where(usable, scales, 1), 0)
    q = code.nearest(jnp.sqrt(y) if code.squares else y)
    if key is not None:
        q = _round_stochastically(code, y, q, key)
    if code.squares:
        q = jnp.where(y > 0, jnp.maximum(q, code.smallest), q)
    else:
        q = jnp.where(blocks < 0, -q, q)
    q = jnp.where(finite, q, code.nan)
    return q.astype(code.dtype).reshape(x.shape), scales[..., 0].astype(x.dtype)


@jax.jit  # traced once for equal arrays
def decode(
    codes: Integer[Array, "*axes n"], scales: Float[Array, "*axes blocks"]
) -> Float[Array, "*axes n"]:
    """The array that integers and scales encode, in the dtype of the scales."""
    code = code_of(codes)
    q = codes.astype(at_least_float32(scales).dtype).reshape(*scales.shape, -1)
    value = code.value(jnp.abs(q))
    value = value * value if code.squares else jnp.where(q < 0, -value, value)
    x = jnp.where(q == code.nan, jnp.nan, value * at_least_float32(scales)[..., None])
    return x.reshape(codes.shape).astype(scales.dtype)


def _round_stochastically(
    code: Code, y: Float[Array, "..."], q: Float[Array, "..."], key: Array
) -> Float[Array, "..."]:
    """One of the two q around y, drawn so that the mean of their values is y."""
    decoded = lambda q: code.value(q) ** (2 if code.squares else 1)
    next_q = lambda q: jnp.where(q == 0, code.smallest, jnp.minimum(q + 1, code.largest))
    previous_q = lambda q: jnp.where(q <= code.smallest, 0, q - 1)
    low = jnp.where(decoded(q) > y, previous_q(q), q)
    high = next_q(low)
    gap = decoded(high) - decoded(low)
    probability = (y - decoded(low)) / jnp.where(gap > 0, gap, 1)
    return jnp.where(jax.random.uniform(key, y.shape, y.dtype) < probability, high, low)


def block_size(n: int) -> int | None:
    """The number of entries with a common scale along an axis of n, or None without a divisor.

    A divisor of n, so that nothing is padded, and at most 128, at which a scale costs a quarter of
    a bit per entry. Among the divisors from 32 to 128, those with a number of blocks divisible by 8
    (else 4, else 2) are preferred, so that shards of an axis on that many devices end with a block;
    among these, the largest. Without a divisor from 32 on, the largest from 16 on.

    Example:
      >>> block_size(4096), block_size(11008), block_size(5461), block_size(512), block_size(62)
      (128, 86, 127, 64, 62)
    """
    divisors = [b for b in range(16, 129) if n and n % b == 0]
    preferred = [b for b in divisors if b >= 32]
    return max(preferred or divisors, key=lambda b: (math.gcd(n // b, 8), b), default=None)


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32, or unchanged if float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
