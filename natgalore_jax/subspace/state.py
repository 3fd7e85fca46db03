"""The state of a projection, and how to find it in a larger state."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Int, PyTree

from ..quantization.quantized_array import TAKES_CODES, is_quantized
from ..tree.cores import Basis, cores, replace_cores
from ..tree.flax_boxes import unbox_cores
from ..tree.leaf_spec import LeafSpec
from ..tree.state_roles import is_per_matrix, register_state, roles_of
from .refresh import MatrixState, Refresh
from .transport import Transport


FORMAT_VERSION = 1  # of the state; a later version comes with a conversion from this one

# (P,) or (P, Q) of each projected leaf, by its path
Bases = dict[tuple[Any, ...], tuple[Basis, ...]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a projection that are needed outside of it; static, in every Basis.

    Attributes:
      refresh: when and how bases change.
      has_residual: whether the update needs whole gradients.
      unprojected: (name, reason) of each leaf that is not projected.
    """

    refresh: Refresh
    has_residual: bool
    unprojected: tuple[tuple[str, str], ...]

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.refresh, self.has_residual, self.unprojected))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: hashes of strings differ between processes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class SubspaceState(NamedTuple):
    """The state of :func:`project`.

    Its arrays are float32 whatever the dtype of the params (float64 for a float64 leaf), so a
    checkpoint stays valid when the params are cast to bfloat16.

    Attributes:
      count: updates so far, int32.
      basis: a tree like the params with a Basis, (*batch, m, r), at each projected leaf and None
        elsewhere.
      right_basis: the same for Q, (*batch, n, r), at leaves projected on both sides.
      refreshed: the number of refreshes of each matrix, (*batch) int32, at each projected leaf. A
        matrix with 0 still has its random basis; its first usable gradient refreshes it.
      skipped: a tree like the params, int32: the number of non-finite gradients, for each matrix
        (*batch) of a projected leaf and for each other leaf.
      inner_state: the state of the inner transformation, with Cores at projected leaves; with
        `residual_momentum`, a :class:`ResidualMomentumState` that contains it.
      version: FORMAT_VERSION, int32.
    """

    count: Int[Array, ""]
    basis: PyTree
    right_basis: PyTree
    refreshed: PyTree
    skipped: PyTree
    inner_state: PyTree
    version: Int[Array, ""]


class ResidualMomentumState(NamedTuple):
    """The state of a projection with `residual_momentum`, as its `inner_state`.

    Attributes:
      momentum: a tree like the params with a Core, M of (*batch, m, n), at each projected leaf and
        None elsewhere.
      inner_state: the state of the inner transformation.
    """

    momentum: PyTree
    inner_state: PyTree


register_state(
    SubspaceState, count="scalar", refreshed="scalar", skipped="scalar", version="scalar"
)
register_state(ResidualMomentumState, momentum="full")
TAKES_CODES.add(SubspaceState)


def is_subspace(x: Any) -> bool:
    return isinstance(x, SubspaceState)


def subspace_states(state: PyTree) -> list[SubspaceState]:
    """The SubspaceStates in the state of an optimizer, in order, without boxes."""
    return [unbox_cores(x) for x in jax.tree.leaves(state, is_leaf=is_subspace) if is_subspace(x)]


def is_basis(x: Any) -> bool:
    return isinstance(x, Basis)


def bases_in(tree: PyTree) -> list[Basis]:
    """The Bases of a tree, in order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_basis) if is_basis(x)]


def bases_of(states: Sequence[SubspaceState]) -> Bases:
    """The bases of each projected leaf, by its path."""
    by_path: Bases = {}
    for state in states:
        for side in (state.basis, state.right_basis):
            for P in bases_in(side):
                by_path[P.spec.path] = (*by_path.get(P.spec.path, ()), P)
    return by_path


def settings_of(state: SubspaceState) -> Settings | None:
    """The settings of the projection; None if it projects no leaf."""
    bases = bases_in(state.basis)
    return bases[0].settings if bases else None


class NothingProjected(UserWarning):
    """Warns that a projection projects no leaf.

    Attributes:
      reasons: why not, for each leaf by name.
    """

    def __init__(self, message: str, reasons: dict[str, str]):
        super().__init__(message)
        self.reasons = reasons


def decisions_of(
    tx: optax.GradientTransformation, params: PyTree
) -> tuple[PyTree, dict[str, LeafSpec | str]]:
    """The state of an optimizer, as shapes, and what its projections do with each leaf.

    Args:
      tx: any optimizer with projections in it.
      params: arrays or shapes.

    Returns:
      The state; and by name the LeafSpec of each projected leaf, and the reason for each leaf that
      a projection was given and does not project.
    """
    decisions: dict[str, LeafSpec | str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A new function, so that JAX does not skip the trace, and with it the warnings.
        state = jax.eval_shape(lambda params: tx.init(params), params)
    for warning in caught:
        if isinstance(warning.message, NothingProjected):
            decisions |= warning.message.reasons
        else:
            warnings.warn(warning.message, stacklevel=3)
    for each in subspace_states(state):
        settings = settings_of(each)
        decisions |= dict(settings.unprojected) if settings else {}
        decisions |= {P.spec.name: P.spec for P in bases_in(each.basis)}
    return state, decisions


class Flattened(NamedTuple):
    """The projected leaves of a SubspaceState: lists with an entry for each.

    Attributes:
      specs: the LeafSpecs.
      roles: of the arrays of inner's state that transport carries.
      states: what a refresh changes.
      unflatten: from new `states` to the new SubspaceState.
    """

    specs: list[LeafSpec]
    roles: list[tuple[Any, ...]]
    states: list[MatrixState]
    unflatten: Callable[[list[MatrixState]], SubspaceState]


def flatten(state: SubspaceState, transport: Transport | None) -> Flattened:
    """Collects, for each projected leaf, what a refresh changes; the only walk of an update."""
    bases = bases_of([state]).values()
    specs = [P.spec for P, *_ in bases]
    leaves, treedef = jax.tree.flatten(state.inner_state, is_leaf=is_quantized)
    places: dict[LeafSpec, list[int]] = {spec: [] for spec in specs}
    entries = roles_of(leaves, treedef)
    if transport is not None:
        for i, (x, (role, spec)) in enumerate(zip(leaves, entries, strict=True)):
            if spec in places and is_per_matrix(x, role, spec):
                places[spec].append(i)
    states = [
        MatrixState(
            stored=tuple(P.value for P in sides),
            refreshed=n.value,
            carried=[leaves[i] for i in places[spec]],
        )
        for spec, sides, n in zip(specs, bases, cores(state.refreshed), strict=True)
    ]

    def unflatten(new: list[MatrixState]) -> SubspaceState:
        sides = [iter([x.stored[k] for x in new if k < len(x.stored)]) for k in (0, 1)]
        replace = lambda side, tree: jax.tree.map(
            lambda P: P.replace(next(side)), tree, is_leaf=is_basis
        )
        moved = [*leaves]
        for spec, x in zip(specs, new, strict=True):
            for i, array in zip(places[spec], x.carried, strict=True):
                moved[i] = array
        return state._replace(
            basis=replace(sides[0], state.basis),
            right_basis=replace(sides[1], state.right_basis),
            refreshed=replace_cores(state.refreshed, [x.refreshed for x in new]),
            inner_state=treedef.unflatten(moved),
        )

    roles = [tuple(entries[i][0] for i in places[spec]) for spec in specs]
    return Flattened(specs, roles, states, unflatten)
