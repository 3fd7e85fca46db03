"""How training goes in the subspace, as functions of a state: cheap, and jittable with the step.

Each takes any optimizer's state with a `natgalore.project` somewhere in it, and gives a dict from
a leaf's name to one number for each of its matrices, (*batch).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from ..fisher.core import CoreFisherState
from ..fisher.window import FisherState
from ..quantization.quantized_array import decoded
from ..subspace.basis import normalised, to_core
from ..subspace.engine import SubspaceState
from ..subspace.lift import expanded
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import Basis, cores, is_core, path_name
from ..util.linalg import matmul


def explained_energy(state: PyTree, grads: PyTree) -> dict[str, Array]:
    """The share of each gradient's energy that the basis holds: |PᵀG|² / |G|², in [0, 1].

    Args:
      state: of an optimizer.
      grads: gradients, in the structure of the params. Right after a refresh on the same gradients
        this is the most that the rank can hold (up to the power iteration's lag); what it falls to
        before the next refresh says whether `refresh_every` is too long.

    Returns:
      For each projected leaf (*batch), in the dtype of its core; 0 where a gradient is zero or not
      finite.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore
      >>> tx = natgalore.galore(1e-3, rank=4)
      >>> grads = {"kernel": jnp.eye(8)}
      >>> _, state = tx.update(grads, tx.init(grads), grads)
      >>> round(float(explained_energy(state, grads)["kernel"]), 4)  # 4 of 8 equal directions
      0.5
    """
    leaves = {path_name(path): G for path, G in jax.tree_util.tree_leaves_with_path(unbox(grads))}

    def energy(G, *bases):
        unit, usable = normalised(G)
        whole = jnp.where(usable, jnp.square(unit).sum(), 1.0)
        return jnp.where(usable, jnp.square(to_core(unit, *bases)).sum() / whole, 0.0)

    found = {}
    for P, Q in _bases(state):
        G = leaves[P.spec.name]
        bases = expanded(jnp.promote_types(G.dtype, jnp.float32), P, Q)
        one = energy
        for _ in P.spec.batch:
            one = jax.vmap(one)
        found[P.spec.name] = one(P.spec.to_view(G).astype(bases[0].dtype), *bases)
    return found


def basis_drift(before: PyTree, after: PyTree) -> dict[str, Array]:
    """How far each subspace has turned: 1 − |P'ᵀP|²/r, from 0 for the same to 1 at right angles.

    Of a leaf projected on both sides it is the mean of the two.

    Args:
      before: the state of an optimizer.
      after: a later state of it.

    Returns:
      For each projected leaf (*batch).
    """

    def drift(old, new):
        P, R = expanded(jnp.float32, old, new)
        return 1 - jnp.square(matmul(R.mT, P)).sum(axis=(-2, -1)) / P.shape[-1]

    found = {}
    for old, new in zip(_bases(before), _bases(after), strict=True):
        sides = [drift(P, R) for P, R in zip(old, new, strict=True) if P is not None]
        found[old[0].spec.name] = sum(sides) / len(sides)
    return found


def fisher_condition(state: PyTree) -> dict[str, Array]:
    """Largest over smallest eigenvalue of each Fisher, undamped: of L, or of K's filled slots.

    At most 1/eps, which is beyond what the dtype can tell; 1 where nothing has come in. One
    eigendecomposition a matrix: for a look now and then, not for every step.

    Args:
      state: of an optimizer with a Fisher stage; without one the dict is empty.

    Returns:
      For each projected leaf (*batch).
    """
    found = {}
    for node in _find(state, CoreFisherState):
        for L in cores(node.fisher):
            found[L.spec.name] = _condition(L.value, jnp.full(L.spec.batch_shape, L.spec.rank))
    for node in _find(state, FisherState):
        for count, K, D in zip(*map(cores, (node.count, node.gram, node.scale)), strict=True):
            unit = D.value / jnp.maximum(
                D.value.max(axis=-1, keepdims=True), jnp.finfo(K.value).tiny
            )
            scaled = unit[..., :, None] * K.value * unit[..., None, :]
            found[K.spec.name] = _condition(scaled, jnp.minimum(count.value, K.value.shape[-1]))
    return found


def skipped_steps(state: PyTree) -> dict[str, Array]:
    """How often each gradient was not finite: (*batch) of a projected leaf, one number of another.

    Args:
      state: of an optimizer.

    Returns:
      For every leaf that the optimizer was given, int32.
    """
    found = {}
    for node in _find(state, SubspaceState):
        for path, x in jax.tree_util.tree_leaves_with_path(node.skipped, is_leaf=is_core):
            found[x.spec.name if is_core(x) else path_name(path)] = x.value if is_core(x) else x
    return found


def _condition(A: Array, known: Array) -> Array:
    """Of the largest `known` eigenvalues of each symmetric A."""

    def one(A, known):
        values = jnp.linalg.eigvalsh(A)
        largest = values[-1]
        smallest = jnp.maximum(values[-jnp.maximum(known, 1)], jnp.finfo(A.dtype).eps * largest)
        return jnp.where(largest > 0, largest / jnp.where(largest > 0, smallest, 1.0), 1.0)

    # One at a time: batched eigh deadlocked on two cores (jaxlib 0.10.2).
    flat = lax.map(lambda x: one(*x), (A.reshape(-1, *A.shape[-2:]), known.reshape(-1)))
    return flat.reshape(A.shape[:-2])


def _find(state: PyTree, kind: type) -> list:
    is_kind = lambda x: isinstance(x, kind)
    return [x for x in jax.tree.leaves(unbox(state), is_leaf=is_kind) if is_kind(x)]


def _bases(state: PyTree) -> list[tuple[Basis, Basis | None]]:
    """P and Q of each projected leaf."""
    found = []
    for node in _find(state, SubspaceState):
        right = {Q.spec.name: Q for Q in _find(decoded(node.right_basis), Basis)}
        found += [(P, right.get(P.spec.name)) for P in _find(decoded(node.basis), Basis)]
    return found
