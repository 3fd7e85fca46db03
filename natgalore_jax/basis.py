"""From a gradient to the basis of its subspace: G (m x n) -> P (m x r), one matrix at a time.

Block power iteration on G Gᵀ, warm from the basis before it,

    Y = G (Gᵀ P) / ‖G (Gᵀ P)‖_F + ε P,    P ← Q of the QR decomposition Y = Q R, diag(R) > 0     (1)

needs matmuls and one r-wide factorisation: no SVD, so it is quick on GPUs and compiles on TPUs.
Its columns turn towards the leading left singular vectors of G as the iteration goes on. The
shift by ε, below which float32 could not tell a squared singular value from rounding, gives the
directions of which a rank-deficient G says nothing to the old basis instead of to noise.

References: Zhao et al., "GaLore", arXiv:2403.03507, section 3 (the subspace); Halko, Martinsson
and Tropp, arXiv:0909.4061, section 4.5 (subspace iteration).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from .linalg import matmul, orthonormalise


Method = Callable[[Float[Array, "m n"], Float[Array, "m r"], Int[Array, ""]], Float[Array, "m r"]]

SHIFT = 1e-6  # ε of (1): ten times float32's rounding of a squared singular value
FIRST_TURNS = 4  # of (1) at a cold start; the study of ratios is in tests/test_basis.py


def power(
    G: Float[Array, "m n"], P: Float[Array, "m r"], turns: Int[Array, ""]
) -> Float[Array, "m r"]:
    """`turns` turns of (1). Costs 4·m·n·r flops and one QR of m x r a turn."""

    def turn(_, P):
        Y = matmul(G, matmul(G.mT, P))
        norm = jnp.linalg.norm(Y)
        return orthonormalise(Y / jnp.where(norm > 0, norm, 1.0).astype(Y.dtype) + SHIFT * P)

    return lax.fori_loop(0, turns, turn, P)


def svd(
    G: Float[Array, "m n"], P: Float[Array, "m r"], turns: Int[Array, ""]
) -> Float[Array, "m r"]:
    """The leading left singular vectors, each with its largest entry positive: exact and slow."""
    del turns
    U = jnp.linalg.svd(G, full_matrices=False)[0][:, : P.shape[-1]]
    largest = jnp.take_along_axis(U, jnp.argmax(jnp.abs(U), axis=0, keepdims=True), axis=0)
    return U * jnp.where(largest < 0, -1.0, 1.0).astype(U.dtype)


METHODS: dict[str, Method] = {"power": power, "svd": svd}


def refreshed(
    method: Method, G: Float[Array, "m n"], P: Float[Array, "m r"], turns: Int[Array, ""]
) -> tuple[Float[Array, "m r"], Bool[Array, ""]]:
    """The new basis, and whether there is one: a zero or non-finite G leaves P as it was.

    G is divided by its largest entry first, so that G Gᵀ neither overflows nor vanishes.
    """
    largest = jnp.max(jnp.abs(G))
    usable = jnp.isfinite(largest) & (largest > 0)
    new = method(jnp.where(usable, G / jnp.where(usable, largest, 1.0), 0.0), P, turns)
    usable &= jnp.isfinite(new).all()
    return jnp.where(usable, new, P), usable


@functools.partial(jax.jit, static_argnames=("m", "r", "dtype"))
def seeded(
    key: Key[Array, ""], index: Int[Array, " matrices"], *, m: int, r: int, dtype: Any
) -> Float[Array, "matrices m r"]:
    """A random orthonormal basis for each index, whatever other indices there are."""

    def one(i):
        return orthonormalise(jax.random.normal(jax.random.fold_in(key, i), (m, r), dtype))

    # One at a time: batched QR deadlocked on two cores (jaxlib 0.10.2).
    return lax.map(one, index)
