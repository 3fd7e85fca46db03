"""Functions of matrices and stacks of matrices, each in the precision that its use needs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax
from jaxtyping import Array, Float

from .control_flow import by_platform


POWERS = (1.0, 0.5, 0.25)  # p of the inverse roots A⁻ᵖ in Fisher stages


def matmul(a: Array, b: Array) -> Array:
    """a @ b without tensor-float32 or bfloat16: they cost PᵀP three digits."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def product(a: Array, b: Array) -> Array:
    """a @ b for products with a gradient or its core, computed on every step.

    In float32 on CPUs, tensor-float32 on NVIDIA GPUs, three bfloat16 passes on TPUs. The error of
    the core and the update is 3e-4 on a GPU, a sixth of the error of rounding a gradient to
    bfloat16, and both products are 2.2 to 2.9 times faster on one H100 (`bench_matmul.py`). With
    `jax_default_matmul_precision` "highest" they are in float32 everywhere.
    """
    exact = highest_precision_requested()
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST if exact else lax.Precision.HIGH)


def state_product(a: Array, b: Array) -> Array:
    """a @ b for moments in a new basis: `matmul`, on TPUs `product`, as of the cores in them.

    Three passes compile in half the time of six; `galore` of a scanned Llama 350m in 0.9 of it.
    """
    return by_platform(a, b, tpu=product, default=matmul)


def rounded_product(a: Array, b: Array, dtype: Any) -> Array:
    """`product` with the result in `dtype`; for bfloat16, on accelerators, the factors too.

    Bfloat16 factors increase the error from 1.7e-3, the rounding of the result, to 2.9e-3. They
    halve the memory traffic, and XLA can fuse the addition to a weight.
    """
    wide = lambda a, b: product(a, b).astype(dtype)
    if dtype != jnp.bfloat16 or highest_precision_requested():
        return wide(a, b)
    narrow = lambda a, b: jnp.matmul(a.astype(dtype), b.astype(dtype))
    return by_platform(a, b, gpu=narrow, tpu=narrow, default=wide)


def gram_product(G: Float[Array, "m n"], P: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """G (GᵀP), with all digits of float32."""
    at_once = lambda G, P: matmul(G, matmul(G.mT, P))
    return by_platform(G, P, tpu=gram_product_by_blocks, default=at_once)


def gram_product_by_blocks(
    G: Float[Array, "m n"], P: Float[Array, "m r"], width: int = 256
) -> Float[Array, "m r"]:
    """`gram_product` as Σ G_j (G_jᵀP) over blocks of columns of G.

    On the TPU compiler it takes a tenth of the seconds of the two whole products in six passes, and
    these most of those of a refresh (`bench_tpu.py --pieces`).
    """
    n = G.shape[1]
    if n <= width:
        return matmul(G, matmul(G.mT, P))
    columns = lax.broadcasted_iota(jnp.int32, (1, width), 1)

    def add_block(j, Y):
        first = jnp.minimum(j * width, n - width)
        block = lax.dynamic_slice_in_dim(G, first, width, axis=1)
        block = jnp.where(first + columns < j * width, 0, block)  # of the block before
        block = lax.optimization_barrier(block)  # one program for blocks of every G
        return Y + matmul(block, matmul(block.mT, P))

    return lax.fori_loop(0, -(-n // width), add_block, jnp.zeros_like(P))


def highest_precision_requested() -> bool:
    """Whether `jax_default_matmul_precision` requests matmuls in float32."""
    return jax.config.jax_default_matmul_precision in ("highest", "float32", "F32_F32_F32")


def eye_like(A: Float[Array, "*batch r r"]) -> Float[Array, "*batch r r"]:
    """The identity, of A's type, which loops inside `jax.shard_map` require."""
    return jnp.zeros_like(A) + jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)


def rounded(x: Array, dtype: Any) -> Array:
    """x in `dtype`, rounded in every later computation too.

    XLA may skip an `astype` whose result is widened again (its excess precision, on by default,
    does so on GPUs). Then the stored array would be rounded, but not the array in computations.
    """
    if x.dtype == dtype:
        return x
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def power_of_two(x: Float[Array, "*batch"], root: bool = False) -> Float[Array, "*batch"]:
    """The largest power of two that is at most x, or at most √x with `root`; 1 for x = 0.

    For subnormal x it is the least normal number, or 1 on machines that flush to zero.
    """
    # From the exponent's bits: XLA would recompute frexp and ldexp at every use.
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(jnp.maximum(x, info.tiny), f"int{info.bits}")
    exponent, bias = bits >> info.nmant, 1 - info.minexp
    if root:
        exponent = ((exponent - bias) >> 1) + bias
    power = lax.bitcast_convert_type(exponent << info.nmant, x.dtype)
    return jnp.where(x > 0, power, 1.0)


def inverse_root(
    A: Float[Array, "*batch r r"], power: float, damping: float
) -> Float[Array, "*batch r r"]:
    """A⁻ᵖ of A = L + λI, L semidefinite, λ at least `damping` times L's mean eigenvalue."""
    if power == 1.0:
        return jsp.linalg.cho_solve((jnp.linalg.cholesky(A), True), eye_like(A))
    condition = A.shape[-1] * (1 + 1 / damping)  # bounds tr A over the least eigenvalue of A
    square_root, inverse = newton_schulz(A, condition)
    if power == 0.5:
        return inverse
    return newton_schulz(square_root, math.sqrt(condition))[1]


def symmetric_inverse_root(
    A: Float[Array, "*batch s s"], power: float, least: Float[Array, "*batch"]
) -> Float[Array, "*batch s s"]:
    """A⁻ᵖ of a symmetric, possibly ill-conditioned A, its eigenvalues raised to `least`."""

    def one(A, least):
        values, vectors = jnp.linalg.eigh(A)
        return matmul(vectors * (jnp.maximum(values, least) ** -power)[None], vectors.T)

    # One matrix at a time: batched eigh deadlocked on two cores (jaxlib 0.10.2).
    matrices = A.reshape(-1, *A.shape[-2:]), least.reshape(-1)
    return lax.map(lambda x: one(*x), matrices).reshape(A.shape)


def newton_schulz(
    A: Float[Array, "*batch r r"], condition: float
) -> tuple[Float[Array, "*batch r r"], Float[Array, "*batch r r"]]:
    """A^½ and A^(-½) by the coupled iteration Y ← Y T, Z ← T Z, T = (3ρ I − ρ³ Z Y)/2.

    Matmuls only, so it batches and shards; in float32 more accurate than eigh at every size
    measured. The scales ρ > 1 of the first steps halve the number of steps, and with it the
    rounding error. With bfloat16 matmuls it diverges.

    Args:
      A: symmetric, with no eigenvalue below its Frobenius norm over `condition`.
      condition: bounds the number of steps.

    References: Higham, "Functions of Matrices" (2008), equation (6.35); Chen and Chow, "A stable
    scaling of Newton-Schulz for improving the sign function computation" (2014), for ρ.
    """
    eye = eye_like(A)
    norm = jnp.sqrt(jnp.square(A).sum(axis=(-2, -1), keepdims=True))

    def step(YZ, scale):
        Y, Z = YZ
        T = 1.5 * scale * eye - 0.5 * scale**3 * matmul(Z, Y)
        return (matmul(Y, T), matmul(T, Z)), None

    scales = jnp.asarray(newton_schulz_scales(condition), A.dtype)
    (Y, Z), _ = lax.scan(step, (A / norm, eye), scales)
    return Y * jnp.sqrt(norm), Z / jnp.sqrt(norm)


def newton_schulz_scales(condition: float) -> list[float]:
    """ρ of each step, until convergence to float32 rounding.

    A step maps the square root x of an eigenvalue to ρx (3 − ρ²x²)/2. With this ρ both ends of
    [l, 1] map to the minimum over the interval, the next l, and no x maps above 1.
    """
    scales = []
    least = 1 / math.sqrt(condition)
    while 1 - least > 1e-8:
        scales.append(math.sqrt(3 / (1 + least + least * least)))
        least *= scales[-1] * (3 - (scales[-1] * least) ** 2) / 2
    return scales


def norms(
    X: Float[Array, "*batch a b"], axes: tuple[int, ...], unit_from: Array | None = None
) -> Float[Array, "*batch a_ b_"]:
    """Euclidean norms over `axes`, which are kept with size 1.

    Computed in units of the largest entry of X, or of `unit_from`, over the same axes: the square
    of 1e25 overflows float32.
    """
    largest = jnp.abs(X if unit_from is None else unit_from).max(axis=axes, keepdims=True)
    # Where the reciprocal is normal too. Times it is exact, and on TPUs shorter than a division.
    unit = power_of_two(jnp.minimum(largest, jnp.finfo(X.dtype).max / 4))
    return unit * jnp.sqrt(jnp.square(X * (1 / unit)).sum(axis=axes, keepdims=True))


@functools.partial(jax.jit, static_argnames="axes")  # traced once for equal arrays
def max_abs(X: Float[Array, "..."], axes: tuple[int, ...] | None = (-2, -1)) -> Float[Array, "..."]:
    """The largest absolute value over `axes`, or all axes if None; not finite if any is not.

    Of the bits, as integers: their order is that of positive numbers, infinity and NaN. XLA:CPU's
    max-reduction of numbers drops NaNs for 8192 elements or more (jaxlib 0.10.2).
    """
    bits = lax.bitcast_convert_type(jnp.abs(X), f"int{jnp.finfo(X.dtype).bits}")
    return lax.bitcast_convert_type(bits.max(axis=axes), X.dtype)
