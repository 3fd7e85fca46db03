"""The orthogonal factor U Vᵀ of X = U Σ Vᵀ, from products alone: (X Xᵀ)^(-½) X, m ≤ n.

Each of three steps applies an odd polynomial to the singular values,

    X ← q(A) X,    A = X Xᵀ,    q(A) = a I + b A + c A²,                                         (1)

the first one to X / s, whose singular values are at most 1 and as large as that bound allows:

    s² = (|X|² + ridge) ‖A‖ / tr A,    tr A = |X|²,    ‖A‖ in the Frobenius norm.                (2)

Without the ridge s is the Schatten 4-norm, ‖X‖ ≤ s. It exceeds ‖X‖ by m^¼ at most, the Frobenius
norm by m^½. Muon divides by the latter and ends in [0.68, 1.13] after five steps; these end in
[0.85, 1.15] after three, since an optimizer needs no exact factor.

Two orders of the same products:

    direct    (1) as it stands                                   12 m²n + 6 m³ flops
    Gram      A ← q(A)² A and Q ← q(A) Q on m x m, then Q X      4 m²n + 18 m³ flops             (3)

(3) squares the singular values, so that it needs the 11 bits of float16. Errors against the exact
factor, of matrices without the r leading directions, r = m/4 (`bench_orthogonalize.py`): see
`docs/performance.md`.

References: Amsel et al., "The Polar Express", arXiv:2505.16932, and Grishina et al., "CANS",
arXiv:2506.10935, for minimax polynomials; Jordan et al., "Muon" (2024),
https://kellerjordan.github.io/posts/muon; Dao-AILab, "Gram Newton-Schulz" (2026), for (3).
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .control_flow import by_platform
from .linalg import eye_like, highest_precision_requested


# a, b, c of each step. The first polynomial is the best odd approximation of 1 on [0.016, 1.01],
# each other one on the range of the one before, 1 % wider for rounding. Singular values in
# [0.016, 1] of X / s end in [0.852, 1.148]; smaller ones grow at most 61.1 times, so zeros stay
# near zero. Derived by `oracles.minimax_steps`.
COEFFICIENTS = (
    (7.7877, -22.0545, 15.9205),
    (3.3472, -2.4633, 0.4916),
    (2.3437, -1.6832, 0.4083),
)
# n/m from which (3) has fewer flops; on an H200 it is faster from 1.46 to 1.56 on.
GRAM_FROM = 1.5
GRAM_LEAST = 128  # m; in smaller ones float16's rounding of A exceeds small squares 0.016²


def polar(
    X: Float[Array, "*batch m n"],
    ridge: float | Float[Array, "..."] = 0.0,
) -> Float[Array, "*batch m n"]:
    """Approximates U Vᵀ of X = U Σ Vᵀ.

    Low precision is sufficient: GPUs compute in float16, TPUs, which have none, in bfloat16 by the
    direct form, unless `jax_default_matmul_precision` is "highest".

    Args:
      X: with a Frobenius norm of at most 8, for float16 to hold A², and with ridge = 0 of
        at least 0.1.
      ridge: of (2), one number or (*batch, 1, 1), in units of X². An X much smaller than its root
        stays small.
    """
    if X.shape[-2] > X.shape[-1]:
        return polar(X.mT, ridge).mT
    own = functools.partial(orthogonalised, dtype=X.dtype, gram=is_gram_better(X))
    if highest_precision_requested():
        return own(X, ridge)
    gpu = functools.partial(own, dtype=jnp.float16)
    tpu = functools.partial(own, dtype=dtype_on_tpu(), gram=False, unroll=False)
    return by_platform(X, jnp.asarray(ridge, X.dtype), gpu=gpu, tpu=tpu, default=own)


def dtype_on_tpu() -> Any:
    """The dtype to which `polar` rounds X and its result on TPUs; None if it does not."""
    return None if highest_precision_requested() else jnp.bfloat16


def is_gram_better(X: Float[Array, "*batch m n"]) -> bool:
    """Whether X, m ≤ n, is orthogonalised by (3)."""
    m, n = X.shape[-2:]
    return m >= GRAM_LEAST and n >= GRAM_FROM * m


def orthogonalised(
    X: Float[Array, "*batch m n"],
    ridge: float | Float[Array, "..."],
    *,
    dtype: Any,
    gram: bool,
    coefficients: tuple[tuple[float, float, float], ...] = COEFFICIENTS,
    unroll: bool = True,
) -> Float[Array, "*batch m n"]:
    """`polar` for m ≤ n, with factors in `dtype`, by (3) or the direct form.

    Unrolled, the last product is summed in X's dtype. The loop of the direct form has one body for
    all steps, half the products to compile, and its result is rounded to `dtype`.
    """
    wide, X = X.dtype, X.astype(dtype)
    steps, last = jnp.asarray(coefficients, wide), len(coefficients) - 1

    def q(A, s, i):
        """q(A / s²), over s in the last step. Products stay in units of s²: a pass would divide."""
        a, b, c = steps[i]
        unit = 1 / jnp.where(i == last, s, 1.0)  # times it: a division of each entry is longer
        return ((a * eye_like(A) + b / s**2 * A + c / s**4 * (A @ A)) * unit).astype(dtype)

    if gram:
        A = X @ X.mT
        s = schatten_norm(A.astype(wide), ridge)

        def on_gram(i, AqQ):
            A, factor, Q = AqQ
            A = (A @ factor) @ factor
            factor = q(A, s, i)
            return A, factor, factor @ Q

        first = q(A, s, 0)
        *_, Q = lax.fori_loop(1, last + 1, on_gram, (A, first, first), unroll=unroll)
        return jnp.matmul(Q, X, preferred_element_type=wide)

    def direct(i, Xs, result=dtype):
        X, s = Xs
        A = X @ X.mT
        s = jnp.where(i == 0, schatten_norm(A.astype(wide), ridge), s)
        factor = q(A, s, i)
        if not unroll:
            # XLA:TPU would compute q again for each block of the product's columns.
            factor = lax.optimization_barrier(factor)
        return jnp.matmul(factor, X, preferred_element_type=result), s

    one = jnp.ones_like(X[..., :1, :1], wide)
    if unroll:
        Xs = lax.fori_loop(0, last, direct, (X, one), unroll=True)
        return direct(last, Xs, wide)[0]
    return lax.fori_loop(0, last + 1, direct, (X, one))[0].astype(wide)


def schatten_norm(
    A: Float[Array, "*batch m m"], ridge: float | Float[Array, "..."]
) -> Float[Array, "*batch 1 1"]:
    """s of (2), from A = X Xᵀ; 1 for zeros."""
    trace = jnp.trace(A, axis1=-2, axis2=-1)[..., None, None]
    norm = jnp.sqrt(jnp.square(A).sum(axis=(-2, -1), keepdims=True))
    # ‖A‖ / tr A is at least m^-½. The bound holds where the square underflows.
    ratio = jnp.maximum(norm / jnp.where(trace > 0, trace, 1.0), A.shape[-1] ** -0.5)
    square = (trace + ridge) * ratio
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))
