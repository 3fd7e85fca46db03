"""Matrix functions on matrices and stacks of them, each in the precision that its use needs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


POWERS = (1.0, 0.5, 0.25)  # p of the inverse roots that Fisher stages take


def matmul(a: Array, b: Array) -> Array:
    """a @ b without tensor-float or bfloat16 shortcuts: they cost PᵀP three digits."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def product(a: Array, b: Array) -> Array:
    """a @ b for what is done with a gradient or its core on every step.

    In float32 on CPUs, tensor-float32 on NVIDIA's, three bfloat16 passes on TPUs: the core and the
    update are then right to 3e-4 on a GPU, a sixth of what rounding a gradient to bfloat16 costs,
    and both products are 2.2 to 2.9 times faster on one H100 (`bench_matmul.py`). Where
    `jax_default_matmul_precision` is "highest" they are in float32 everywhere.
    """
    exact = highest_precision_requested()
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST if exact else lax.Precision.HIGH)


def rounded_product(a: Array, b: Array, dtype: Any) -> Array:
    """The same in `dtype`. For bfloat16, accelerators take the factors in it too.

    The error of the result, 1.7e-3 by its own rounding, is then 2.9e-3; it moves half
    the bytes, and XLA can add it to a weight in the same kernel.
    """
    wide = lambda a, b: product(a, b).astype(dtype)
    if dtype != jnp.bfloat16 or highest_precision_requested():
        return wide(a, b)
    narrow = lambda a, b: jnp.matmul(a.astype(dtype), b.astype(dtype))
    return lax.platform_dependent(a, b, cuda=narrow, tpu=narrow, default=wide)


def highest_precision_requested() -> bool:
    """Whether the user wants matmuls in float32."""
    return jax.config.jax_default_matmul_precision in ("highest", "float32", "F32_F32_F32")


def eye_like(A: Float[Array, "*batch r r"]) -> Float[Array, "*batch r r"]:
    """The identity, of A's type: inside `jax.shard_map` a loop must not change it."""
    return jnp.zeros_like(A) + jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)


def rounded(x: Array, dtype: Any) -> Array:
    """x in `dtype`, and rounded for all that is computed from it.

    A plain `astype` may be skipped where the result is widened again (XLA's excess precision, on
    by default, does so on GPUs): then what is stored is rounded and what is computed is not.
    """
    if x.dtype == dtype:
        return x
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def power_of_two(x: Float[Array, "*batch"], root: bool = False) -> Float[Array, "*batch"]:
    """The largest power of two that is at most x, or whose square is with `root`; 1 for x = 0.

    Below the least normal number it is that number, or 1 where the machine flushes to zero.
    """
    # By the bits of the exponent: the compiler would repeat a frexp and an ldexp at every use.
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(jnp.maximum(x, info.tiny), f"int{info.bits}")
    exponent, bias = bits >> info.nmant, 1 - info.minexp
    if root:
        exponent = ((exponent - bias) >> 1) + bias
    power = lax.bitcast_convert_type(exponent << info.nmant, x.dtype)
    return jnp.where(x > 0, power, 1.0)


def orthonormalise(Y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Q of Y = Q R with diag(R) > 0. The sign makes Q a continuous function of Y."""
    return lax.platform_dependent(Y, cuda=cholesky_qr, default=householder_qr)


def householder_qr(Y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """The same of any Y, by reflections: column by column, so slow on GPUs."""
    Q, R = jnp.linalg.qr(Y)
    return Q * jnp.where(jnp.diagonal(R)[None, :] < 0, -1.0, 1.0).astype(Q.dtype)


def cholesky_qr(Y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """The same by Cholesky factors of YᵀY, and by reflections where those do not get there.

    Y R⁻¹ with the factor R of YᵀY + εI is nearer to orthonormal than Y, with columns of length 1
    to begin with. After one turn to four, for which ε keeps the factor from failing, it is so near
    that one without ε is orthonormal to rounding. R is triangular, so Q is that of Y throughout.

    Reference: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices" (2020), arXiv:1809.11085.
    """

    def times_inverse(Q, gram):
        R = jnp.linalg.cholesky(gram).mT
        return matmul(Q, lax.linalg.triangular_solve(R, eye_like(R), left_side=True, lower=False))

    def turn(Qn):
        Q, gram, n = Qn
        shift = 4 * jnp.finfo(Q.dtype).eps * jnp.trace(gram)
        Q = times_inverse(Q, gram + shift * eye_like(gram))
        return Q, matmul(Q.mT, Q), n + 1

    def near(gram):  # no where NaN
        return jnp.abs(gram - eye_like(gram)).sum(axis=-1).max() < 0.5

    length = jnp.sqrt(jnp.square(Y).sum(axis=0, keepdims=True))
    Q = Y / jnp.where(length > 0, length, 1.0)
    far = lambda Qn: ~near(Qn[1]) & (Qn[2] < 4)
    Q, gram, _ = lax.while_loop(far, turn, (Q, matmul(Q.mT, Q), 0))

    def by_reflections():
        # By rows, or each step that only reads P would first turn it from cuSOLVER's columns.
        return with_layout_constraint(householder_qr(Y), Layout((0, 1)))

    return lax.cond(near(gram), lambda: times_inverse(Q, gram), by_reflections)


def inverse_root(
    A: Float[Array, "*batch r r"], power: float, damping: float
) -> Float[Array, "*batch r r"]:
    """A⁻ᵖ of A = L + λI, with λ at least `damping` of the mean eigenvalue of L, none below 0."""
    if power == 1.0:
        return jsp.linalg.cho_solve((jnp.linalg.cholesky(A), True), eye_like(A))
    condition = A.shape[-1] * (1 + 1 / damping)  # the trace of A over its least eigenvalue
    square_root, inverse = newton_schulz(A, condition)
    if power == 0.5:
        return inverse
    return newton_schulz(square_root, math.sqrt(condition))[1]


def symmetric_inverse_root(
    A: Float[Array, "*batch s s"], power: float, least: Float[Array, "*batch"]
) -> Float[Array, "*batch s s"]:
    """A⁻ᵖ of a symmetric A that may be badly conditioned, by eigenvalues of at least `least`."""

    def one(A, least):
        values, vectors = jnp.linalg.eigh(A)
        return matmul(vectors * (jnp.maximum(values, least) ** -power)[None], vectors.T)

    # One at a time: batched eigh deadlocked on two cores (jaxlib 0.10.2).
    matrices = A.reshape(-1, *A.shape[-2:]), least.reshape(-1)
    return lax.map(lambda x: one(*x), matrices).reshape(A.shape)


def newton_schulz(
    A: Float[Array, "*batch r r"], condition: float
) -> tuple[Float[Array, "*batch r r"], Float[Array, "*batch r r"]]:
    """A^½ and A^(-½) by the coupled iteration Y ← Y T, Z ← T Z, T = (3ρ I − ρ³ Z Y)/2.

    Matmuls only, so it batches and shards; in float32 closer than eigh at every size measured.
    The scales ρ > 1 of the first turns halve their number, and with it the rounding. bfloat16
    matmuls make it diverge.

    Args:
      A: symmetric, no eigenvalue below its Frobenius norm over `condition`.
      condition: bounds the number of turns.

    References: Higham, "Functions of Matrices" (2008), equation (6.35); Chen and Chow, "A stable
    scaling of Newton-Schulz for improving the sign function computation" (2014), for ρ.
    """
    eye = eye_like(A)
    norm = jnp.sqrt(jnp.square(A).sum(axis=(-2, -1), keepdims=True))

    def turn(YZ, scale):
        Y, Z = YZ
        T = 1.5 * scale * eye - 0.5 * scale**3 * matmul(Z, Y)
        return (matmul(Y, T), matmul(T, Z)), None

    scales = jnp.asarray(newton_schulz_scales(condition), A.dtype)
    (Y, Z), _ = lax.scan(turn, (A / norm, eye), scales)
    return Y * jnp.sqrt(norm), Z / jnp.sqrt(norm)


def newton_schulz_scales(condition: float) -> list[float]:
    """ρ of each turn, until float32 rounding.

    A turn maps the square root x of an eigenvalue to ρx (3 − ρ²x²)/2. With this ρ the least of
    [l, 1] comes out of both its ends, none above 1, and that is the next l.
    """
    scales = []
    least = 1 / math.sqrt(condition)
    while 1 - least > 1e-8:
        scales.append(math.sqrt(3 / (1 + least + least * least)))
        least *= scales[-1] * (3 - (scales[-1] * least) ** 2) / 2
    return scales


def polar(X: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """Nearly the orthogonal factor U Vᵀ of X = U Σ Vᵀ, for X of Frobenius norm 1 at most.

    Five turns of X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, after which a singular value from 0.01 to 1 lies
    within 0.68 and 1.14, where more turns of the classical iteration would take it to 1; below it
    grows by a⁵ = 485 at most, so what is nothing stays so. Nothing of it needs digits: accelerators
    work in bfloat16, as Muon does, unless `jax_default_matmul_precision` is "highest".

    Reference: Jordan et al., "Muon" (2024), https://kellerjordan.github.io/posts/muon, of a, b, c.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = X.shape[-2] > X.shape[-1]

    def turn(_, X):
        A = X @ X.mT
        return a * X + (b * A + c * A @ A) @ X

    def turns(X):
        return lax.fori_loop(0, 5, turn, X)

    X, dtype = X.mT if tall else X, X.dtype
    if highest_precision_requested():
        X = turns(X)
    else:
        narrow = lambda X: turns(X.astype(jnp.bfloat16)).astype(dtype)
        X = lax.platform_dependent(X, cuda=narrow, tpu=narrow, default=turns)
    return X.mT if tall else X


def norms(
    X: Float[Array, "*batch a b"], axes: tuple[int, ...], unit_from: Array | None = None
) -> Float[Array, "*batch a_ b_"]:
    """Square roots of the sums of squares over `axes`, which are kept as ones.

    In units of the largest entry there, of X or of `unit_from`: squares of 1e25 are no float32.
    """
    unit = power_of_two(
        jnp.abs(X if unit_from is None else unit_from).max(axis=axes, keepdims=True)
    )
    return unit * jnp.sqrt(jnp.square(X / unit).sum(axis=axes, keepdims=True))


def max_abs(X: Float[Array, "..."], axes: tuple[int, ...] | None = (-2, -1)) -> Float[Array, "..."]:
    """The largest absolute value over `axes`, or all axes if None; not finite if one is not.

    On CPUs the maximum of 8192 numbers or more is a number all the same (jaxlib 0.10.2).
    """
    finite = jnp.isfinite(X).all(axis=axes)
    return jnp.where(finite, jnp.abs(X).max(axis=axes), jnp.nan)
