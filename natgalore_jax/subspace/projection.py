"""From gradients down to cores, on bases that are refreshed first where they are due."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from ..sharding.partitioning import ParamPartitions
from ..tree.leaf_spec import Basis, Core, is_core
from .basis import to_core
from .lift import expanded, keep_where
from .refresh import Refresh


def lower(
    refresh: Refresh, updates: PyTree, state: Any, partitions: ParamPartitions
) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree, list[Bool[Array, "..."]]]:
    """What `Refresh` returns, of gradients among which there may be cores.

    A core was projected where it was made, by `value_and_grad`, after a refresh if due: its
    basis stays as it is.

    Args:
      refresh: of the projection.
      updates: the gradients, out of their boxes.
      state: the :class:`SubspaceState`.
      partitions: of the gradients, as far as known.

    Raises:
      ValueError: if a gradient has another shape than its leaf.
    """
    given = [x if is_core(x) else None for x in jax.tree.leaves(updates, is_leaf=is_core)]
    if not any(given):
        projected = jax.tree.map(project, updates, state.basis, state.right_basis)
        return refresh(updates, projected, state, partitions)
    of = functools.partial(jax.tree.map, is_leaf=is_core)
    in_dtype = lambda G, P: G.replace(G.value.astype(core_dtype(P, G.value)))
    given_cores = of(lambda G, P: in_dtype(G, P) if is_core(G) else None, updates, state.basis)
    without = functools.partial(of, lambda G, x: None if is_core(G) else x, updates)
    fields = ("basis", "right_basis", "refreshed")
    rest = state._replace(**{field: without(getattr(state, field)) for field in fields})
    gradients = without(updates)
    projected = jax.tree.map(project, gradients, rest.basis, rest.right_basis)
    *new, inner_state, finite = refresh(gradients, projected, rest, partitions, state.basis)
    old = state.basis, state.right_basis, given_cores, state.refreshed
    join = functools.partial(of, lambda G, new, old: old if is_core(G) else new, updates)
    left = iter(finite)
    slots = jax.tree.structure(updates, is_leaf=is_core).flatten_up_to(state.basis)
    finite = [
        next(left) if G is None else jnp.isfinite(G.value).all(axis=(-2, -1))
        for G, P in zip(given, slots, strict=True)
        if P is not None
    ]
    return *map(join, new, old), inner_state, finite


def check_cores(updates: PyTree, bases: PyTree) -> None:
    """Raises if a gradient is a core on a basis of another state, or has not the shape of one."""

    def check(G, P):
        if is_core(G) and (P is None or P.spec != G.spec or G.value.shape != G.spec.core_shape):
            raise ValueError(
                f"the gradient of `{G.spec.name}` is a core of another state, or of another shape "
                f"than {G.spec.core_shape}: `update` takes the state that value_and_grad returned."
            )

    jax.tree.map(check, updates, bases, is_leaf=is_core)


def project(G: Array, P: Basis | None, Q: Basis | None) -> Any:
    """The core of a projected leaf, in the dtype of its state; the leaf itself for another."""
    if P is None:
        return working(G)
    if G.shape != P.spec.shape:
        raise ValueError(
            f"the gradient of `{P.spec.name}` has shape {G.shape}, its state is for {P.spec.shape}."
        )
    dtype = core_dtype(P, G)
    return Core(to_core(P.spec.to_view(G).astype(dtype), *expanded(dtype, P, Q)), P.spec)


def core_dtype(P: Basis, G: Any) -> Any:
    """The dtype of the core of G on the basis P."""
    kept = P.value.dtype  # of a random basis that of its key, which says nothing of the core's
    return kept if jnp.issubdtype(kept, jnp.floating) else working_dtype(G)


def gate(projected: PyTree, finite: list[Bool[Array, "..."]]) -> tuple[PyTree, PyTree]:
    """`projected` with zeros for what is not finite, and what was: per matrix, or per other leaf.

    `finite` says it of the Cores. A core is finite where its gradient is: P mixes all rows, so one
    bad entry spoils its column. Looking at the core spares a pass over the gradient.
    """
    left = iter(finite)
    of = lambda x: x.replace(next(left)) if is_core(x) else jnp.isfinite(x).all()
    ok = jax.tree.map(of, projected, is_leaf=is_core)
    return jax.tree.map(keep_where, projected, ok, is_leaf=is_core), ok


def working_dtype(x: Any) -> Any:
    """The dtype in which a leaf is worked on: at least float32, and integers as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.dtype
    return jnp.promote_types(x.dtype, jnp.float32)


def working(x: Any) -> Any:
    """The leaf in that dtype."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, working_dtype(x))
    return jnp.asarray(x, working_dtype(x))
