"""From inner's answers U back to the leaves: P U, P U Qᵀ, what was left out, and decay."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..sharding.distributed import on_whole_matrices
from ..sharding.partitioning import ParamPartitions
from ..tree.leaf_spec import Basis, is_core
from ..util.linalg import polar
from .basis import expand, from_core
from .residual import Residual, added


def lift(
    scale: Any,
    residual: str | Residual | None,
    partitions: ParamPartitions,
    answer: PyTree,
    decay: list[Any],
    finite: PyTree,
    bases: list[PyTree],
    weights: PyTree,
    left: tuple[PyTree, ...],
) -> tuple[PyTree, PyTree]:
    """scale · (P U Qᵀ + S), and a W where inner decays, in the shape and dtype of the leaf.

    Args:
      scale: of projected leaves.
      residual: what makes S; None for none.
      partitions: of the leaves, as far as known.
      answer: inner's, with Cores.
      decay: the a of each Core, or None.
      finite: whether the gradients are, with Cores.
      bases: P and Q, trees like the weights.
      weights: the leaves, or others of their dtypes where nothing decays.
      left: with a residual, the gradients, their cores and, if it is limited, |S_before|.

    Returns:
      The updates, and the norms of S, None where none is remembered.
    """
    answer = jax.tree.map(keep_where, answer, finite, is_leaf=is_core)
    decays = iter(decay)

    def at(w, P, Q, U, ok, *left):
        if P is None:
            return U.astype(w.dtype), None
        U, dtype, S, norm = U.value, U.value.dtype, None, None
        factors = expanded(dtype, P, Q)
        if residual is not None:
            G, R, *before = left
            G = P.spec.to_view(G).astype(dtype)
            size = before[0].value if before else None
            whole = functools.partial(on_whole_matrices, polar, P.spec, partitions)
            U, S, size = added(residual, G, R.value, U, ok.value, size, *factors, polar=whole)
            norm = before[0].replace(size) if before else None
        full = from_core(w.dtype, scale * U, *factors)
        if S is not None:
            full = full.astype(dtype) + scale * S
        a = next(decays)
        if a is not None:
            weight = P.spec.to_view(w).astype(dtype)
            full = full.astype(dtype) + jnp.where(ok.value[..., None, None], a * weight, 0)
        return P.spec.from_view(full).astype(w.dtype), norm

    treedef = jax.tree.structure(weights)
    trees = map(treedef.flatten_up_to, (weights, *bases, answer, finite, *left))
    lifted = [at(*x) for x in zip(*trees, strict=True)]
    norms = None if len(left) < 3 else treedef.unflatten([norm for _, norm in lifted])
    return treedef.unflatten([update for update, _ in lifted]), norms


def expanded(dtype: Any, *bases: Basis | None) -> list[Array]:
    """The bases of a leaf, P or P and Q, out of what the state keeps of them."""
    return [expand(x.value, x.spec, dtype) for x in bases if x is not None]


def keep_where(x: Any, ok: Any) -> Any:
    """x with zeros for what is not `ok`: matrices of a Core, or another leaf as a whole."""
    if is_core(x):
        return x.replace(jnp.where(ok.value[..., None, None], x.value, 0))
    return jnp.where(ok, x, jnp.zeros_like(x))
