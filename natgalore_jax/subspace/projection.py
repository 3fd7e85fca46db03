"""One projected leaf on its way down to its core and back.

    down    R = PᵀG, or PᵀG Q
    back    W's update: scale · (P U, or P U Qᵀ, + the residual) + a W

Each function is compiled once for all leaves of a shape, and its program is traced once: they take
a :class:`LeafSpec` without a name.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..quantization.quantized_array import decode_basis, with_keys_of, without_keys
from ..sharding.distributed import on_whole_matrices, over_layers
from ..sharding.partitioning import (
    LeafPartition,
    align,
    is_divided_further,
    role_partition,
    store,
)
from ..sharding.tpu_layouts import in_stored_layout
from ..tree.cores import is_core
from ..tree.leaf_spec import LeafSpec
from ..util.linalg import max_abs
from ..util.orthogonalize import dtype_on_tpu, polar
from .basis import expand, from_core, to_core
from .refresh import MatrixState, Refresh, RefreshLeaf, number_of_matrices, refresh_due
from .residual import RESIDUALS, Momentum, Products, Residual, with_residual


class Projected(NamedTuple):
    """The projected leaves on their way to inner: lists with an entry for each.

    Attributes:
      states: after refreshes, with the core R, zero where not finite, and `finite`.
      bases: P, or P and Q, as arrays, (*batch, m, r) and (*batch, n, r).
    """

    states: list[MatrixState]
    bases: list[tuple[Array, ...]]


def refresh_and_project(
    refresh: Refresh,
    specs: list[LeafSpec],
    roles: list[tuple[Any, ...]],
    partitions: list[LeafPartition],
    gradients: list[Any],
    states: list[MatrixState],
    count: Int[Array, ""],
    refresh_bases: bool | None = None,
) -> Projected:
    """Refreshes the due bases and projects the gradients.

    Args:
      refresh: of the projection.
      specs: of the leaves.
      roles: of `carried` in each state.
      partitions: of the leaves.
      gradients: in the shapes of the leaves; or Cores, which `value_and_grad` has projected on
        bases that it has refreshed.
      states: of the matrices.
      count: of steps.
      refresh_bases: whether all bases are due, or none; None: those of the schedule.

    Raises:
      ValueError: if a gradient has another shape than its leaf.
    """
    dtypes, bases, new = [], [], []
    for spec, leaf, G, state in zip(specs, partitions, gradients, states, strict=True):
        dtype = core_dtype(state.stored[0], G.value if is_core(G) else G)
        dtypes.append(dtype)
        bases.append(expand_bases(spec.unnamed, dtype, state.stored))
        if is_core(G):
            R = G.value.astype(dtype)
        else:
            check_shape(spec, G)
            R = to_subspace(spec.unnamed, leaf, dtype, G, bases[-1])
        new.append(state._replace(R=R))
    # The only pass over the cores on every step: the largest entries show which cores are finite
    # and which are zero.
    largest = [max_abs(state.R) for state in new]
    new = [x._replace(finite=jnp.isfinite(size)) for x, size in zip(new, largest, strict=True)]
    full = [i for i, G in enumerate(gradients) if not is_core(G)]
    if full and refresh_bases is not False:
        total = number_of_matrices(specs)
        due = [
            jnp.full_like(new[i].refreshed, True, bool)
            if refresh_bases
            else refresh.due(specs[i], largest[i], new[i].refreshed, count, total)
            for i in full
        ]
        after = refresh_due(
            refresh,
            tuple(RefreshLeaf(specs[i], roles[i], partitions[i]) for i in full),
            "gradient",
            [gradients[i] for i in full],
            due,
            [new[i]._replace(carried=without_keys(new[i].carried)) for i in full],
        )
        for i, x in zip(full, after, strict=True):
            new[i] = x._replace(carried=with_keys_of(new[i].carried, x.carried))
            # Expanded a second time, and aligned again for the lift: full bases kept from above
            # would all be held through inner.
            bases[i] = expand_bases(specs[i].unnamed, dtypes[i], x.stored)
    new = [
        x._replace(R=store(zero_where_not(x.finite, x.R), "linear", spec, leaf))
        for x, spec, leaf in zip(new, specs, partitions, strict=True)
    ]
    return Projected(new, bases)


def check_shape(spec: LeafSpec, G: Any) -> None:
    """Raises if a gradient has not the shape of its leaf."""
    if G.shape != spec.shape:
        raise ValueError(
            f"the gradient of `{spec.name}` has shape {G.shape}, its state is for {spec.shape}."
        )


def core_dtype(stored: Any, G: Any) -> Any:
    """The dtype of the core of G: that of the stored basis; for a random basis, of computations."""
    dtype = getattr(stored, "scales", stored).dtype
    return dtype if jnp.issubdtype(dtype, jnp.floating) else working_dtype(G)


def working_dtype(x: Any) -> Any:
    """The dtype of computations on a leaf: at least float32; integers as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.dtype
    return jnp.promote_types(x.dtype, jnp.float32)


def to_working_dtype(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, working_dtype(x))
    return jnp.asarray(x, working_dtype(x))


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def expand_bases(spec: LeafSpec, dtype: Any, stored: tuple[Any, ...]) -> tuple[Array, ...]:
    """P, or P and Q, (*batch, m, r) and (*batch, n, r), from what the state stores."""
    pairs = zip(stored, spec.sides, strict=True)
    return tuple(expand(decode_basis(x), side, dtype) for x, side in pairs)


@functools.partial(jax.jit, static_argnames=("spec", "partition", "dtype"))
def to_subspace(
    spec: LeafSpec,
    partition: LeafPartition,
    dtype: Any,
    G: Float[Array, "..."],
    bases: tuple[Array, ...],
) -> Float[Array, "*batch r k"]:
    """The core R of a gradient in the leaf's shape; k is n, or r on both sides."""

    def of_layer(spec, partition, G, bases):
        R = to_core(spec.to_view(G).astype(dtype), *aligned_bases(spec, partition, bases))
        return store(R, "linear", spec, partition)

    R = over_layers(of_layer, spec, partition, G, bases, full=(True, False))
    return in_stored_layout(R, role_partition("linear", spec, partition), partition)


def lift(
    spec: LeafSpec,
    partition: LeafPartition,
    dtype: Any,
    U: Float[Array, "*batch r k"],
    *bases: Array,
) -> Float[Array, "*batch m n"]:
    """P U, or P U Qᵀ, in `dtype`, sharded as the leaf.

    On TPUs layer by layer where U or P is gathered for it. Elsewhere the product of a stack is
    better: XLA adds it to the weight without writing it.
    """

    def of_layer(spec, partition, U, bases):
        U = align(U, "linear", spec, partition)
        return from_core(dtype, U, *aligned_bases(spec, partition, bases))

    pairs = zip(bases, spec.sides, strict=True)
    factors = [(U, "linear", spec), *((P, "basis", side) for P, side in pairs)]
    if not any(is_divided_further(*factor, partition) for factor in factors):
        return of_layer(spec, partition, U, bases)
    return over_layers(of_layer, spec, partition, U, bases, full_result=True)


def aligned_bases(
    spec: LeafSpec, partition: LeafPartition, bases: tuple[Array, ...]
) -> tuple[Array, ...]:
    """P, or P and Q, sharded as the axes m and n of the leaf, for products with G."""
    pairs = zip(bases, spec.sides, strict=True)
    return tuple(align(P, "basis", side, partition) for P, side in pairs)


def zero_where_not(finite: Bool[Array, "*batch"], x: Float[Array, "*batch a b"]) -> Array:
    """x with zeros for the matrices that are not finite."""
    return jnp.where(finite[..., None, None], x, 0)


def finite_part(spec: LeafSpec, finite: Bool[Array, "*batch"], x: Float[Array, "..."]) -> Array:
    """x, in the leaf's shape, with zeros for the matrices that are not finite."""
    mask = jnp.broadcast_to(finite[..., None, None], (*spec.batch_shape, spec.m, spec.n))
    return jnp.where(spec.from_view(mask), x, 0)


@functools.partial(jax.jit, static_argnames=("spec", "partition", "residual", "dtype"))
def from_subspace(
    spec: LeafSpec,
    partition: LeafPartition,
    residual: str | Residual | None,
    dtype: Any,
    scale: Any,
    U: Float[Array, "*batch r k"],
    finite: Bool[Array, "*batch"],
    bases: tuple[Array, ...],
    gradient: tuple[Float[Array, "..."], Float[Array, "*batch r k"]] | None,
    residual_scale: Any,
    momentum: Momentum | None,
    decay: tuple[Float[Array, ""], Float[Array, "..."]] | None,
) -> tuple[Float[Array, "..."], Float[Array, "*batch m n"] | None]:
    """The update of a leaf, in its shape and in `dtype`; zero for matrices that are not finite.

    Beside it the new momentum of the residual; None without.

    Args:
      spec: of the leaf.
      partition: of the leaf.
      residual: the rule for the residual, or None.
      dtype: of the leaf.
      scale: α of P U and the residual.
      U: inner's answer.
      finite: whether the gradient of each matrix is. Inner saw a zero core where it is not, but its
        momentum moves such a matrix all the same, hence this second mask.
      bases: P, or P and Q.
      gradient: G and R, if there is a residual.
      residual_scale: γ of the residual.
      momentum: of the residual, if it has one.
      decay: a of inner's decoupled decay and the weight W, if inner decays this leaf.
    """
    U = zero_where_not(finite, U)
    lifted = functools.partial(lift, spec, partition)
    M = None
    if gradient is None:
        full = spec.from_view(lifted(dtype if decay is None else U.dtype, scale * U, *bases))
    else:
        G, R = gradient
        G = spec.to_view(finite_part(spec, finite, G.astype(U.dtype)))
        products = Products(
            to_core=lambda M, *bases: to_subspace(
                spec, partition, M.dtype, spec.from_view(M), bases
            ),
            from_core=lifted,
            polar=functools.partial(
                on_whole_matrices, polar, spec, partition, kept_in=dtype_on_tpu()
            ),
        )
        if momentum is not None:
            momentum = momentum._replace(M=align(momentum.M, "full", spec, partition))
        size, U, S, M = with_residual(
            residual, G, R, U, *bases, scale=residual_scale, momentum=momentum, products=products
        )
        M = None if M is None else store(M, "full", spec, partition)
        if residual not in RESIDUALS or momentum is not None:  # else zero for G = 0
            S = zero_where_not(finite, S)
        # Each product by itself: XLA then writes it in the leaf's layout, not in the view's.
        total = spec.from_view(lifted(U.dtype, U, *bases)) + spec.from_view(S)
        full = scale * size * total  # rounded once, below
    if decay is not None:
        a, W = decay
        full = full + finite_part(spec, finite, a * W.astype(U.dtype))
    return full.astype(dtype), M
