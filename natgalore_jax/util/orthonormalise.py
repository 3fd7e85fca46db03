"""The Q of Y = Q R: by Cholesky factors on GPUs, panels of columns on TPUs, reflections on CPUs."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float

from .control_flow import by_platform
from .linalg import eye_like, matmul


def orthonormalise(Y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Q of Y = Q R with diag(R) > 0. The sign convention makes Q continuous in Y."""
    return by_platform(Y, gpu=cholesky_qr, tpu=panel_qr, default=householder_qr)


def householder_qr(Y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """`orthonormalise` by Householder reflections: for any Y, column by column, slow on GPUs."""
    Q, R = jnp.linalg.qr(Y)
    return Q * jnp.where(jnp.diagonal(R)[None, :] < 0, -1.0, 1.0).astype(Q.dtype)


def panel_qr(Y: Float[Array, "m r"], width: int = 32) -> Float[Array, "m r"]:
    """`orthonormalise` by reflections of `width` columns at a time, all by one small program.

    V ← Q of the panel (I − Q Qᵀ) V, with the earlier columns Q, until the projection leaves V
    nearly orthonormal: two times, or up to four in a rank-deficient Y. On the TPU compiler the
    program of `householder_qr` grows with r, to minutes at 4096 x 1024 (`bench_tpu.py --pieces`).

    Reference: Barlow and Smoktunowicz, "Reorthogonalized block classical Gram-Schmidt" (2013),
    arXiv:1108.4209.
    """
    r = Y.shape[1]
    if r <= width:
        return householder_qr(Y)
    rows, columns = (lax.broadcasted_iota(jnp.int32, Y.shape, axis) for axis in (0, 1))
    # A column of zeros has no direction to repeat; its unit vector need not be in the span of Q.
    Y = jnp.where(jnp.any(Y != 0, axis=0, keepdims=True), Y, (rows == columns).astype(Y.dtype))
    block = min(r, 8 * width)  # columns of Q in one product

    def add_panel(i, Q):
        first = jnp.minimum(i * width, r - width)

        def subtract(j, V):
            at = jnp.minimum(j * block, r - block)
            before = lax.dynamic_slice_in_dim(Q, at, block, axis=1)
            before = jnp.where(at + columns[:, :block] < first, before, 0)
            return V - matmul(before, matmul(before.mT, V))

        def step(state):
            V, _, n = state
            V = lax.fori_loop(0, lax.div(first + block - 1, block), subtract, V)
            new = jnp.linalg.qr(V)[0]
            # diag(R), as diag(QᵀV): R itself would need the upper rows of a V that is sharded.
            diagonal = (new * V).sum(axis=0, keepdims=True)
            new *= jnp.where(diagonal < 0, -1.0, 1.0).astype(V.dtype)
            return new, is_near_identity(matmul(V.mT, V)), n + 1

        V = lax.dynamic_slice_in_dim(Y, first, width, axis=1)
        V, _, _ = lax.while_loop(lambda state: ~state[1] & (state[2] < 4), step, (V, False, 0))
        return lax.dynamic_update_slice_in_dim(Q, V, first, axis=1)

    return lax.fori_loop(0, -(-r // width), add_panel, jnp.zeros_like(Y))


def cholesky_qr(Y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """`orthonormalise` by Cholesky factors of YᵀY, or by reflections if these do not converge.

    Columns of Y are first scaled to length 1. Q ← Q R⁻¹, with R the Cholesky factor of QᵀQ + εI,
    brings Q nearer to orthonormal; ε keeps the factorisation from failing. After two to four steps
    a last step with ε = 0 is orthonormal to rounding. R is triangular, so all steps have the Q of
    Y.

    Reference: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices" (2020), arXiv:1809.11085.
    """

    def times_inverse(Q, gram):
        R = jnp.linalg.cholesky(gram).mT
        return matmul(Q, lax.linalg.triangular_solve(R, eye_like(R), left_side=True, lower=False))

    def step(Q, gram):
        # Row sums bound the largest eigenvalue, and rounding moves the smallest by eps times it. A
        # quarter of this shift fails for a rank-deficient Y; four times it takes more steps.
        shift = jnp.finfo(Q.dtype).eps * jnp.abs(gram).sum(axis=-1).max()
        Q = times_inverse(Q, gram + shift * eye_like(gram))
        return Q, matmul(Q.mT, Q)

    def by_reflections(Q, gram):
        # Row-major, else every step that reads P would transpose cuSOLVER's column-major result.
        return with_layout_constraint(householder_qr(Y), Layout((0, 1))), eye_like(gram)

    def next_step(state):
        Q, gram, n = state
        return *lax.cond(n < 4, step, by_reflections, Q, gram), n + 1

    length = jnp.sqrt(jnp.square(Y).sum(axis=0, keepdims=True))
    Q = Y / jnp.where(length > 0, length, 1.0)
    # Two steps without a test: the host of a GPU waits for each condition, which takes as long as
    # a step. Up to a condition of 1e5 two are enough.
    Q, gram = step(*step(Q, matmul(Q.mT, Q)))
    is_far = lambda state: ~is_near_identity(state[1]) & (state[2] <= 4)
    Q, gram, _ = lax.while_loop(is_far, next_step, (Q, gram, 2))
    return times_inverse(Q, gram)


def is_near_identity(gram: Float[Array, "r r"]) -> Bool[Array, ""]:
    """Whether the eigenvalues of a Gram matrix are between a half and 3/2; False for NaN."""
    return jnp.abs(gram - eye_like(gram)).sum(axis=-1).max() < 0.5
