"""Numbers in 8 bits: the dynamic code of 8-bit Adam, in blocks, by arithmetic alone.

A block of numbers is kept as its scale, the largest of their magnitudes, and for each number an
integer q. The leading bit of q is a decade below the scale and its other bits a linear fraction of
that decade, so the code reaches seven decades down and is finest where the numbers are large:

    value(q) = (18 q + 9 - 16·2ᵉ) / (c 5ᴱ⁻ᵉ),   2ᵉ ≤ q < 2ᵉ⁺¹,   E - 6 ≤ e ≤ E,   value(0) = 0  (1)

The values of a decade are the middles of equal cells of it, and c makes the largest value 1. What
is linear in gradients is kept as ±q in an int8 (E = 6, c = 1271: magnitudes from 1 to 127). Squares
are kept as q of their roots in a uint8 (E = 7, c = 2551: from 2 to 255), which halves the decades
that they span. A second moment may be 1e-12 of the largest in its block, and if it were rounded to
0, Adam would divide by ε alone: so what is not 0 is never rounded to 0 there, but to the smallest
value, 3e-7 of the scale's root.

The table of 8-bit Adam has 1 as a value more, without -1, and its next one 0.7 % below; here the
largest of a block comes back as it is, of either sign, and the integer that is left, -128 or 1,
stands for what is not finite. No table is looked up: a gather, which is slow on TPUs.

References: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861;
Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561, of the code.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


GENERATOR = "threefry2x32"  # the same numbers on every machine, however they are sharded


class Code(NamedTuple):
    """How numbers become integers.

    Attributes:
      dtype: of the integers.
      last: E of equation (1).
      nan: the integer of what is not finite.
      squares: whether q is of the root of a number, which is not negative.
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
        """The smallest q but 0."""
        return 2 ** (self.last - 6)

    @property
    def decades(self) -> list[tuple[int, float]]:
        """Of each decade, 2ᵉ and the unit of its values, 1 / (c 5ᴱ⁻ᵉ)."""
        c = 18 * self.largest + 9 - 16 * 2**self.last
        exponents = range(self.last - 6, self.last + 1)
        return [(2**e, 1 / (c * 5 ** (self.last - e))) for e in exponents]

    def value(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """Equation (1)."""
        value = jnp.zeros_like(q)
        for first, unit in self.decades:
            value = jnp.where(q >= first, (18 * q + (9 - 16 * first)) * unit, value)
        return value

    def nearest(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """The q whose value is nearest to y in [0, 1]; halfway, either neighbour."""
        q, below = jnp.zeros_like(y), 0.0
        for first, unit in self.decades:
            here = jnp.floor((y * (1 / unit) + 16 * first) / 18)
            start = (below + (2 * first + 9) * unit) / 2
            q = jnp.where(y > start, jnp.clip(here, first, 2 * first - 1), q)
            below = (20 * first - 9) * unit
        return q


LINEAR = Code(jnp.int8, 6, -128, squares=False)
SQUARE = Code(jnp.uint8, 7, 1, squares=True)


def code_of(codes: Any) -> Code:
    """The code that integers are in: their dtype tells."""
    return SQUARE if codes.dtype == jnp.uint8 else LINEAR


@functools.partial(jax.jit, static_argnames=("code", "block"))  # traced once for arrays alike
def encode(
    code: Code, x: Float[Array, "*axes n"], block: int, key: Array | None = None
) -> tuple[Integer[Array, "*axes n"], Float[Array, "*axes blocks"]]:
    """The integers and scales of x.

    Args:
      code: of x.
      x: of any float dtype; blocks lie along its last axis.
      block: how many numbers share a scale; it divides n.
      key: rounds to one of the two neighbours at random, so that the mean is x. None: to the
        nearest.

    Returns:
      The integers, and the scales in x's dtype, which is exact: they are entries of x.

    Example:
      >>> codes, scales = encode(LINEAR, jnp.array([-2.0, 0.0, 1.0, jnp.nan]), 4)
      >>> codes.tolist(), scales.tolist(), decode(codes, scales)[:3].tolist()
      ([-127, 0, 92, -128], [2.0], [-2.0, 0.0, 1.0086545944213867])
    """
    blocks = wide(x).reshape(*x.shape[:-1], -1, block)
    finite = jnp.isfinite(blocks)
    size = jnp.where(finite, jnp.abs(blocks), 0)
    scales = size.max(axis=-1, keepdims=True)
    usable = scales >= jnp.finfo(scales.dtype).tiny
    y = jnp.where(usable, size / jnp.where(usable, scales, 1), 0)
    q = code.nearest(jnp.sqrt(y) if code.squares else y)
    if key is not None:
        q = _rounded_at_random(code, y, q, key)
    if code.squares:
        q = jnp.where(y > 0, jnp.maximum(q, code.smallest), q)
    else:
        q = jnp.where(blocks < 0, -q, q)
    q = jnp.where(finite, q, code.nan)
    return q.astype(code.dtype).reshape(x.shape), scales[..., 0].astype(x.dtype)


def decode(
    codes: Integer[Array, "*axes n"], scales: Float[Array, "*axes blocks"]
) -> Float[Array, "*axes n"]:
    """What integers and scales stand for, in the dtype of the scales."""
    code = code_of(codes)
    q = codes.astype(wide(scales).dtype).reshape(*scales.shape, -1)
    value = code.value(jnp.abs(q))
    value = value * value if code.squares else jnp.where(q < 0, -value, value)
    x = jnp.where(q == code.nan, jnp.nan, value * wide(scales)[..., None])
    return x.reshape(codes.shape).astype(scales.dtype)


def _rounded_at_random(
    code: Code, y: Float[Array, "..."], q: Float[Array, "..."], key: Array
) -> Float[Array, "..."]:
    """One of the two q around y, so that the mean of what they stand for is y."""
    stands_for = lambda q: code.value(q) ** (2 if code.squares else 1)
    step = lambda q: jnp.where(q == 0, code.smallest, jnp.minimum(q + 1, code.largest))
    back = lambda q: jnp.where(q <= code.smallest, 0, q - 1)
    low = jnp.where(stands_for(q) > y, back(q), q)
    high = step(low)
    gap = stands_for(high) - stands_for(low)
    chance = (y - stands_for(low)) / jnp.where(gap > 0, gap, 1)
    return jnp.where(jax.random.uniform(key, y.shape, y.dtype) < chance, high, low)


def block_size(n: int) -> int | None:
    """How many numbers of an axis of n share a scale, or None if n has no divisor that would do.

    At most 128, with which a scale costs a quarter of a bit. It divides n, so nothing is padded.
    Of its divisors from 32 to 128, those come first that leave a number of blocks which 8 (or 4, or
    2) divides, so that an axis which lies on so many devices is cut between blocks; of these, the
    largest. Without such a divisor, the largest from 16 on.

    Example:
      >>> block_size(4096), block_size(11008), block_size(5461), block_size(512), block_size(62)
      (128, 86, 127, 64, 62)
    """
    divisors = [b for b in range(16, 129) if n and n % b == 0]
    wide = [b for b in divisors if b >= 32]
    return max(wide or divisors, key=lambda b: (math.gcd(n // b, 8), b), default=None)


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32, or float64 if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
