"""The basis of a subspace from a gradient: G (m x n) -> P (m x r), one matrix at a time.

One step of block power iteration on G Gᵀ, from the old basis,

    Y = G (Gᵀ P) / ‖G (Gᵀ P)‖_F + ε P,    P ← Q of the QR decomposition Y = Q R, diag(R) > 0     (1)

needs matmuls and one r-wide factorisation: no SVD, so it is fast on GPUs and compiles on TPUs. The
columns converge to the leading left singular vectors of G. The shift ε, below which float32 cannot
tell a squared singular value from rounding, keeps the old basis in directions in which a
rank-deficient G is zero.

A random basis needs neither a gradient nor memory: it is regenerated from its key at each use,

    P_ij = √(2/m) s_i cos(π (2i + 1) k_j / 2m),    times 1/√2 where k_j = 0,                     (2)

r columns k_j of the cosine transform, drawn without replacement, with random signs s_i of the rows.
Its columns are orthonormal without a factorisation, and E[P Pᵀ] = (r/m) I.

References: Zhao et al., "GaLore", arXiv:2403.03507, section 3 (the subspace); Halko, Martinsson
and Tropp, arXiv:0909.4061, sections 4.5 (subspace iteration) and 4.6 (subsampled transforms).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from ..tree.leaf_spec import LeafSpec
from ..util.linalg import gram_product, max_abs, product, rounded_product
from ..util.orthonormalise import orthonormalise


BasisUpdate = Callable[
    [Float[Array, "m n"], Float[Array, "m r"], Key[Array, ""]], Float[Array, "m r"]
]

SHIFT = 1e-6  # ε of (1): ten times float32's rounding of a squared singular value
GENERATOR = "threefry2x32"  # independent of the user's default, which may change at a restart
FIRST_ITERATIONS = 4  # at the first refresh; studied in tests/subspace/test_basis.py


def power(
    G: Float[Array, "m n"], P: Float[Array, "m r"], key: Key[Array, ""]
) -> Float[Array, "m r"]:
    """One step of (1). Costs 4·m·n·r flops and one QR of m x r."""
    del key
    return from_product(gram_product(G, P), P)


def from_product(Y: Float[Array, "m r"], P: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """The second half of (1), from Y = G (Gᵀ P) in any units."""
    norm = jnp.linalg.norm(Y)
    return orthonormalise(Y / jnp.where(norm > 0, norm, 1.0).astype(Y.dtype) + SHIFT * P)


def svd(G: Float[Array, "m n"], P: Float[Array, "m r"], key: Key[Array, ""]) -> Float[Array, "m r"]:
    """The leading left singular vectors, each with its largest entry positive: exact and slow."""
    del key
    U = jnp.linalg.svd(G, full_matrices=False)[0][:, : P.shape[-1]]
    largest = jnp.take_along_axis(U, jnp.argmax(jnp.abs(U), axis=0, keepdims=True), axis=0)
    return U * jnp.where(largest < 0, -1.0, 1.0).astype(U.dtype)


@dataclasses.dataclass(frozen=True)
class StoredBasis:
    """A basis that the state stores, computed from the gradient and the old basis.

    Attributes:
      step: (G, P, key) -> P.
      first_iterations: the number of steps at a matrix's first refresh, from a random basis.
      from_product: `step` from G (Gᵀ P), in any units, and P; None if it needs G itself.
    """

    step: BasisUpdate
    first_iterations: int = 1
    from_product: Callable[..., Float[Array, "m r"]] | None = None

    @property
    def needs_gradient(self) -> bool:
        """Whether a refresh needs G itself, not only products with it."""
        return self.from_product is None

    def start(self, keys: Key[Array, " matrices"], spec: LeafSpec, dtype: Any) -> Array:
        """The stored bases of the keys, before the first refresh."""
        return orthonormal(keys, m=spec.m, r=spec.rank, dtype=dtype).reshape(spec.basis_shape)

    def next(
        self,
        G: Float[Array, "m n"],
        P: Float[Array, "m r"],
        key: Key[Array, ""],
        first: Bool[Array, ""],
    ) -> Float[Array, "m r"]:
        """The stored form of the new basis of a matrix with basis P."""
        if self.first_iterations == 1:
            new = self.step(G, P, key)
        else:
            steps = jnp.where(first, self.first_iterations, 1)
            new = lax.fori_loop(0, steps, lambda _, P: self.step(G, P, key), P)
        if jnp.shape(new) != P.shape:
            raise ValueError(
                f"`basis` must return an array of the shape of P, {P.shape}, got {jnp.shape(new)}."
            )
        return jnp.asarray(new, P.dtype)

    def after(
        self, Y: Float[Array, "m r"], P: Float[Array, "m r"], key: Key[Array, ""]
    ) -> Float[Array, "m r"]:
        """One step of `next`, from the product Y = G (Gᵀ P) in units of its largest entry."""
        del key
        assert self.from_product is not None
        return self.from_product(Y, P)


@dataclasses.dataclass(frozen=True)
class RandomBasis:
    """A random basis (2), of which the state stores the key alone."""

    first_iterations = 1
    needs_gradient = False

    def start(self, keys: Key[Array, " matrices"], spec: LeafSpec, dtype: Any) -> Array:
        """See :class:`StoredBasis`."""
        del dtype
        data = jax.random.key_data(keys)
        return data.reshape(*spec.batch_shape, data.shape[-1])

    def next(
        self,
        G: Float[Array, "m n"],
        P: Float[Array, "m r"],
        key: Key[Array, ""],
        first: Bool[Array, ""],
    ) -> UInt32[Array, " words"]:
        """See :class:`StoredBasis`."""
        del G, P, first
        return jax.random.key_data(key)

    def after(
        self, Y: Float[Array, "m r"], P: Float[Array, "m r"], key: Key[Array, ""]
    ) -> UInt32[Array, " words"]:
        """See :class:`StoredBasis`."""
        del Y, P
        return jax.random.key_data(key)


Method = StoredBasis | RandomBasis

METHODS: dict[str, Method] = {
    "power": StoredBasis(power, FIRST_ITERATIONS, from_product),
    "svd": StoredBasis(svd),
    "random": RandomBasis(),
}


def normalised(G: Float[Array, "..."]) -> tuple[Float[Array, "..."], Bool[Array, ""]]:
    """G divided by its largest entry, so that G Gᵀ neither overflows nor vanishes; and whether G is
    usable, that is finite and not zero.
    """
    unit = max_abs(G, None)
    usable = jnp.isfinite(unit) & (unit > 0)
    return jnp.where(usable, G / jnp.where(usable, unit, 1.0), 0.0), usable


def expand(stored: Array, spec: LeafSpec, dtype: Any) -> Float[Array, "*batch m r"]:
    """The bases of one matrix or of all from what the state stores: the bases, or their keys."""
    if jnp.issubdtype(stored.dtype, jnp.floating):
        return stored
    one = functools.partial(cosines, m=spec.m, r=spec.rank, dtype=dtype)
    for _ in stored.shape[:-1]:
        one = jax.vmap(one)
    return one(stored)


def to_core(
    G: Float[Array, "*batch m n"], P: Float[Array, "*batch m r"], *Q: Float[Array, "*batch n r"]
) -> Float[Array, "..."]:
    """The core PᵀG, or PᵀG Q."""
    R = product(P.mT, G)
    return product(R, Q[0]) if Q else R


def from_core(
    dtype: Any,
    U: Float[Array, "..."],
    P: Float[Array, "*batch m r"],
    *Q: Float[Array, "*batch n r"],
) -> Float[Array, "*batch m n"]:
    """P U, or P U Qᵀ, in `dtype`."""
    return rounded_product(P, product(U, Q[0].mT) if Q else U, dtype)


def basis_key(
    seed: int, index: Int[Array, ""], times: Int[Array, ""] | int, side: int
) -> Key[Array, ""]:
    """The key of the basis that a matrix has after `times` refreshes.

    Args:
      seed: of the projection.
      index: of the matrix, in the refresh order.
      times: refreshes so far; 0 for the initial basis.
      side: 0 for P, 1 for Q.
    """
    key = jax.random.key(seed, impl=GENERATOR)
    for part in (side, index, times):
        key = jax.random.fold_in(key, part)
    return key


@functools.partial(jax.jit, static_argnames=("m", "r", "dtype"))
def orthonormal(
    keys: Key[Array, " matrices"], *, m: int, r: int, dtype: Any
) -> Float[Array, "matrices m r"]:
    """A random orthonormal basis for each key: Q of a matrix of normal numbers."""
    one = lambda key: orthonormalise(jax.random.normal(key, (m, r), dtype))
    # One at a time: batched QR deadlocked on two cores (jaxlib 0.10.2).
    return lax.map(one, keys)


def cosines(data: UInt32[Array, " words"], *, m: int, r: int, dtype: Any) -> Float[Array, "m r"]:
    """Equation (2), whose signs and columns come from a key's data."""
    key = jax.random.wrap_key_data(data, impl=GENERATOR)
    signs_key, columns_key = jax.random.split(key)
    signs = jax.random.rademacher(signs_key, (m,), dtype)
    k = jax.random.permutation(columns_key, jnp.arange(m, dtype=jnp.uint32))[None, :r]
    # The phase (2i + 1) k modulo 4m in integers, or float32 would lose it; in two parts that
    # stay below 2³² up to m = 700 000.
    odd = 2 * jnp.arange(m, dtype=jnp.uint32)[:, None] + 1
    period = jnp.uint32(4 * m)
    high = (odd * (k >> 8)) % period
    phase = ((high << 8) + odd * (k & 255)) % period
    size = jnp.where(k == 0, jnp.sqrt(1 / m), jnp.sqrt(2 / m)).astype(dtype)
    angle = phase.astype(dtype) * jnp.asarray(jnp.pi / (2 * m), dtype)
    return signs[:, None] * size * jnp.cos(angle)
