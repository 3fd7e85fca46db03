"""Diagnostics of the subspace, as functions of an optimizer's state. All may run under `jax.jit`.

Each takes the state of any optimizer that contains a `natgalore.project` and returns a dict from
the name of a leaf to one number per matrix, (*batch).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from ..fisher.core import CoreFisherState
from ..fisher.window import FisherState
from ..subspace.basis import normalised, to_core
from ..subspace.projection import expand_bases
from ..subspace.state import SubspaceState, bases_of
from ..tree.cores import cores, is_core
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec, path_name
from ..util.linalg import matmul


def explained_energy(state: PyTree, grads: PyTree) -> dict[str, Array]:
    """The share of each gradient's energy inside the subspace: |PᵀG|² / |G|², in [0, 1].

    Right after a refresh on the same gradients this is the most that the rank allows (up to the lag
    of the power iteration). A large fall before the next refresh means that `refresh_every` is too
    long.

    Args:
      state: of an optimizer.
      grads: full gradients, in the structure of the params.

    Returns:
      For each projected leaf (*batch), in the dtype of its core; 0 where a gradient is zero or not
      finite.

    Raises:
      ValueError: if `grads` has no full gradient of a projected leaf: the cores of
        :func:`natgalore_jax.value_and_grad` do not contain |G|.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore
      >>> tx = natgalore.galore(1e-3, rank=4)
      >>> grads = {"kernel": jnp.eye(8)}
      >>> _, state = tx.update(grads, tx.init(grads), grads)
      >>> round(float(explained_energy(state, grads)["kernel"]), 4)  # 4 of 8 equal directions
      0.5
    """
    leaves = jax.tree_util.tree_leaves_with_path(unbox(grads), is_leaf=is_core)
    gradients = {path_name(path): G for path, G in leaves}

    def energy(G, *bases):
        unit, usable = normalised(G)
        total = jnp.where(usable, jnp.square(unit).sum(), 1.0)
        return jnp.where(usable, jnp.square(to_core(unit, *bases)).sum() / total, 0.0)

    energies = {}
    for spec, stored in _stored_bases(state):
        G = _full_gradient(gradients, spec)
        bases = expand_bases(spec.unnamed, jnp.promote_types(G.dtype, jnp.float32), stored)
        per_matrix = energy
        for _ in spec.batch:
            per_matrix = jax.vmap(per_matrix)
        energies[spec.name] = per_matrix(spec.to_view(G).astype(bases[0].dtype), *bases)
    return energies


def basis_drift(before: PyTree, after: PyTree) -> dict[str, Array]:
    """The distance between two states' subspaces: 1 − |P'ᵀP|²/r, 0 if equal, 1 if orthogonal.

    For a leaf projected on both sides it is the mean of both sides.

    Args:
      before: a state of an optimizer.
      after: a later state of the same optimizer.

    Returns:
      For each projected leaf (*batch).
    """

    drift = lambda P, new: 1 - jnp.square(matmul(new.mT, P)).sum(axis=(-2, -1)) / P.shape[-1]
    drifts = {}
    for old, new in zip(_stored_bases(before), _stored_bases(after), strict=True):
        bases = [expand_bases(spec.unnamed, jnp.float32, stored) for spec, stored in (old, new)]
        sides = [drift(*pair) for pair in zip(*bases, strict=True)]
        drifts[old[0].name] = sum(sides) / len(sides)
    return drifts


def fisher_condition(state: PyTree) -> dict[str, Array]:
    """The condition number of each Fisher without damping: of L, or of the filled part of K.

    At most 1/eps of the dtype, beyond which eigenvalues are rounding noise; 1 before the first
    gradient. Costs one eigendecomposition per matrix: for occasional use, not for every step.

    Args:
      state: of an optimizer with a Fisher stage; otherwise the dict is empty.

    Returns:
      For each projected leaf (*batch).
    """
    conditions = {}
    for node in _find(state, CoreFisherState):
        for L in cores(node.fisher):
            rank = jnp.full(L.spec.batch_shape, L.spec.rank)
            conditions[L.spec.name] = _condition(L.value, rank)
    for node in _find(state, FisherState):
        for count, K, D in zip(*map(cores, (node.count, node.gram, node.scale)), strict=True):
            largest = jnp.maximum(D.value.max(axis=-1, keepdims=True), jnp.finfo(K.value).tiny)
            unit = D.value / largest
            scaled = unit[..., :, None] * K.value * unit[..., None, :]
            filled = jnp.minimum(count.value, K.value.shape[-1])
            conditions[K.spec.name] = _condition(scaled, filled)
    return conditions


def skipped_steps(state: PyTree) -> dict[str, Array]:
    """The number of steps on which each gradient was not finite.

    Args:
      state: of an optimizer.

    Returns:
      For every leaf the optimizer was given, int32: (*batch) of a projected leaf, otherwise ().
    """
    counts = {}
    for node in _find(state, SubspaceState):
        for path, x in jax.tree_util.tree_leaves_with_path(node.skipped, is_leaf=is_core):
            counts[x.spec.name if is_core(x) else path_name(path)] = x.value if is_core(x) else x
    return counts


def _condition(A: Array, number: Array) -> Array:
    """Ratio of the largest to the smallest of the `number` largest eigenvalues of each A."""

    def of_matrix(A, number):
        values = jnp.linalg.eigvalsh(A)
        largest = values[-1]
        smallest = jnp.maximum(values[-jnp.maximum(number, 1)], jnp.finfo(A.dtype).eps * largest)
        return jnp.where(largest > 0, largest / jnp.where(largest > 0, smallest, 1.0), 1.0)

    # One at a time: batched eigh deadlocked on two cores (jaxlib 0.10.2).
    flat = lax.map(lambda x: of_matrix(*x), (A.reshape(-1, *A.shape[-2:]), number.reshape(-1)))
    return flat.reshape(A.shape[:-2])


def _full_gradient(gradients: dict[str, Any], spec: LeafSpec) -> Array:
    """The gradient of a projected leaf, if it is a full one."""
    G = gradients.get(spec.name)
    if G is None or is_core(G):
        kind = "no gradient" if G is None else "a core"
        raise ValueError(
            f"`grads` must be full gradients, such as those of jax.grad, but has {kind} for "
            f"{spec.name!r}: the energy needs |G|, which a core does not contain."
        )
    return G


def _find(state: PyTree, kind: type) -> list:
    """All nodes of a type in a state."""
    is_kind = lambda x: isinstance(x, kind)
    return [x for x in jax.tree.leaves(unbox(state), is_leaf=is_kind) if is_kind(x)]


def _stored_bases(state: PyTree) -> list[tuple[LeafSpec, tuple[Any, ...]]]:
    """The spec of each projected leaf, and P, or P and Q, as the state stores them."""
    return [
        (sides[0].spec, tuple(P.value for P in sides))
        for node in _find(state, SubspaceState)
        for sides in bases_of([node]).values()
    ]
