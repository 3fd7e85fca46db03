"""Matrix functions in full precision, on matrices and stacks of them."""

import math
from typing import Any

import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax
from jaxtyping import Array, Float


POWERS = (1.0, 0.5, 0.25)  # p of the inverse roots that Fisher stages take


def matmul(a: Array, b: Array) -> Array:
    """a @ b without tensor-float or bfloat16 shortcuts: they cost PᵀP three digits."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


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


def power_of_two(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The largest power of two that is at most x, and 1 for x = 0."""
    _, exponent = jnp.frexp(x)
    return jnp.where(x > 0, jnp.ldexp(jnp.ones_like(x), exponent - 1), 1.0)


def orthonormalise(Y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Q of Y = Q R with diag(R) > 0. The sign makes Q a continuous function of Y."""
    Q, R = jnp.linalg.qr(Y)
    return Q * jnp.where(jnp.diagonal(R)[None, :] < 0, -1.0, 1.0).astype(Q.dtype)


def inverse_root(
    A: Float[Array, "*batch r r"], power: float, damping: float
) -> Float[Array, "*batch r r"]:
    """A⁻ᵖ of a symmetric A whose smallest eigenvalue is at least `damping` of its mean one."""
    if power == 1.0:
        return jsp.linalg.cho_solve((jnp.linalg.cholesky(A), True), eye_like(A))
    steps = newton_schulz_steps(A.shape[-1] / damping)
    square_root, inverse = newton_schulz(A, steps)
    if power == 0.5:
        return inverse
    return newton_schulz(square_root, newton_schulz_steps(math.sqrt(A.shape[-1] / damping)))[1]


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
    A: Float[Array, "*batch r r"], steps: int
) -> tuple[Float[Array, "*batch r r"], Float[Array, "*batch r r"]]:
    """A^½ and A^(-½) by the coupled iteration Y ← Y T, Z ← T Z, T = (3I − Z Y)/2.

    Matmuls only, so it batches and shards; in float32 closer than eigh at every size measured, and
    1.5 to 4.5 times faster on one H200 for r from 128 to 512 (`benchmarks/bench_refresh.py`).
    bfloat16 matmuls make it diverge.

    Reference: Higham, "Functions of Matrices" (2008), equation (6.35).
    """
    eye = eye_like(A)
    norm = jnp.sqrt(jnp.square(A).sum(axis=(-2, -1), keepdims=True))

    def turn(_, YZ):
        Y, Z = YZ
        T = 1.5 * eye - 0.5 * matmul(Z, Y)
        return matmul(Y, T), matmul(T, Z)

    Y, Z = lax.fori_loop(0, steps, turn, (A / norm, eye))
    return Y * jnp.sqrt(norm), Z / jnp.sqrt(norm)


def newton_schulz_steps(condition: float) -> int:
    """Turns until float32 rounding: an eigenvalue grows by 1.5² a turn, then its error squares."""
    return math.ceil(math.log(condition) / 0.81) + 7
