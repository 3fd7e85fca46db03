"""Roles of optimizer state fields, and the traversal of a state by role.

:func:`register_state` declares the role of each field of a state type, such as linear in the
gradient or its square. :func:`walk` is the only traversal of a state: it visits every array with
its role and the spec of its leaf. Transport, shardings and checks are functions passed to it.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import PyTree

from .cores import Basis, Core
from .leaf_spec import LeafSpec


Role = str

# The axes of one matrix's part of an array, by its role. m, n and r are the leaf's; k is n, or r
# on both sides; s is any size. A field of the state of a user's transformation has one of DECLARED.
AXES: dict[Role, tuple[str, ...]] = {
    "basis": ("m", "r"),
    "key": (),
    "linear": ("r", "k"),
    "square": ("r", "k"),
    "square_rows": ("r",),
    "square_cols": ("k",),
    "window": ("s", "r", "k"),
    "gram": ("s", "s"),
    "fisher": ("r", "r"),
    "root": ("r", "r"),
    "full": ("m", "n"),
    "scalar": (),
}
DECLARED = tuple(role for role in AXES if role not in ("basis", "key"))


class Undeclared(str):
    """The name of a field without a declared role, in place of a role."""


REGISTERED: dict[type, dict[str, str]] = {}


def register_state(state_type: type, **roles: str) -> None:
    """Declares the roles of the fields of a state, so that it can be transported to a new basis.

    Args:
      state_type: a NamedTuple, or any other pytree type whose children have names.
      **roles: the role of each field with arrays per core, one of

        - `"linear"`, (*batch, r, n): linear in the cores, such as momentum.
        - `"square"`, (*batch, r, n): elementwise squares of cores, such as Adam's nu, or other
          nonnegative sizes. A field that is one number per leaf is kept unchanged.
        - `"square_rows"`, (*batch, r), followed by a field `"square_cols"`, (*batch, n): factors of
          squares v ≈ row colᵀ / mean(row), as in Adafactor.
        - `"window"`, (*batch, s, r, n): cores, followed by a field `"gram"`, (*batch, s, s).
        - `"fisher"`, (*batch, r, r): a mean of R Rᵀ.
        - `"root"`: derived from the Fisher. It is set to zero, and the transformation must
          recompute it. With :func:`quantized` it must be symmetric and semidefinite.
        - `"full"`, (*batch, m, n): of the whole matrix, independent of the basis.
        - `"scalar"`: independent of the basis.

        Transport `"reset"` sets all fields but squares to zero, so `init` must start them at zero.

    Raises:
      ValueError: if a role is none of these, the state has no such field, or a `"square_cols"` or
        `"gram"` field does not follow its partner.

    Example:
      >>> from typing import NamedTuple
      >>> class MomentumState(NamedTuple):
      ...     momentum: object
      >>> register_state(MomentumState, momentum="linear")
    """
    for field, role in roles.items():
        if role not in DECLARED:
            raise ValueError(f"`{field}` must have one of the roles {DECLARED}, got {role!r}.")
        if field not in getattr(state_type, "_fields", (field,)):
            raise ValueError(
                f"{state_type.__name__} has no field `{field}`, only {state_type._fields}."
            )
    partners = {"square_cols": "square_rows", "gram": "window"}
    order = [roles.get(field) for field in getattr(state_type, "_fields", roles)]
    for previous, role in itertools.pairwise([None, *order]):
        if partners.get(role, previous) != previous:
            raise ValueError(
                f"a field with role {role!r} must follow one with role {partners[role]!r}."
            )
    REGISTERED[state_type] = roles
    _declared_roles.cache_clear()


def walk(state: PyTree, f: Callable[[Any, str | None, LeafSpec | None], Any]) -> PyTree:
    """Replaces every array x of a state by `f(x, role, spec)`.

    Args:
      state: of any transformation.
      f: `role` is the role declared for the field that holds x, or an :class:`Undeclared` that
        names the field; `spec` is the LeafSpec of the projected leaf that x belongs to, or None.
    """
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(
        f(x, role, spec) for x, (role, spec) in zip(leaves, roles_of(leaves, treedef), strict=True)
    )


def roles_of(leaves: Sequence[Any], treedef: Any) -> list[tuple[str | None, LeafSpec | None]]:
    """The role and LeafSpec of each leaf of a flattened state, see :func:`walk`."""
    return [
        ("key" if role == "basis" and getattr(x, "dtype", None) == jnp.uint32 else role, spec)
        for x, (role, spec) in zip(leaves, _declared_roles(treedef), strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _declared_roles(treedef: Any) -> tuple[tuple[str | None, LeafSpec | None], ...]:
    """`roles_of` by structure alone: a random basis's key has the role of a basis."""
    found = []

    def visit(node, role, spec):
        if isinstance(node, Core | Basis):
            spec = node.spec
            role = "basis" if isinstance(node, Basis) else role
        children, node_def = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        if children and jax.tree_util.treedef_is_leaf(node_def):
            found.append((role, spec))
            return
        for (key,), child in children:
            visit(child, field_role(node, key, role), spec)

    def field_role(node, key, inherited):
        known = REGISTERED.get(type(node))
        field = getattr(key, "name", None)
        declared = inherited is not None and not isinstance(inherited, Undeclared)
        if known is None and (declared or not hasattr(node, "_fields")):
            return inherited  # a container with the structure of the params
        undeclared = Undeclared(f"{type(node).__name__}.{field}")
        return undeclared if known is None else known.get(field, undeclared)

    visit(treedef.unflatten(range(treedef.num_leaves)), None, None)
    return tuple(found)


def is_per_matrix(x: Any, role: Any, spec: LeafSpec) -> bool:
    """Whether x has the batch axes of its leaf, so that a refresh changes its parts separately."""
    return not is_per_leaf_scalar(x, role) and x.shape[: len(spec.batch)] == spec.batch_shape


def is_per_leaf_scalar(x: Any, role: Any) -> bool:
    """Whether x has a role of squares but is one number per leaf, independent of the basis.

    True for NovoGrad's norm and for Adafactor's placeholders of shape (1,).
    """
    return role in SQUARES and x.shape in ((), (1,))


def fits(x: Any, role: Any, spec: LeafSpec) -> bool:
    """Whether one matrix's part of x has the shape that its role has in AXES.

    Scalars have any shape. A number per matrix may have the role of a root, and one per leaf those
    of squares.
    """
    part = x.shape[len(spec.batch) :]
    if role not in AXES or role in ("scalar", "key") or is_per_leaf_scalar(x, role):
        return True
    expected = [axis_size(axis, spec) for axis in AXES[role]]
    same = len(part) == len(expected) and all(
        b in (a, None) for a, b in zip(part, expected, strict=True)
    )
    return same or (role == "root" and not part)


def axis_size(axis: str, spec: LeafSpec) -> int | None:
    """The size of one of the axes of AXES; None for s."""
    return {"m": spec.m, "n": spec.n, "r": spec.rank, "k": spec.core_shape[-1]}.get(axis)


def owner(path: tuple, names: Mapping[tuple, Any]) -> tuple | None:
    """The path among `names` that is a suffix of a state array's path, or None.

    The last key of the array's path may be one of a part, such as the codes of a quantized array.
    """
    suffixes = (end[i:] for end in (path, path[:-1]) for i in range(len(end) + 1))
    return next((suffix for suffix in suffixes if suffix in names), None)


SQUARES = ("square", "square_rows", "square_cols")

# States of Optax.
register_state(optax.ScaleByAdamState, mu="linear", nu="square")  # also of ADOPT and AdaMax
register_state(optax.ScaleByAmsgradState, mu="linear", nu="square", nu_max="square")
register_state(optax.ScaleByLionState, mu="linear")
register_state(optax.ScaleByAdanState, m="linear", v="linear", n="square", g="linear")
register_state(optax.ScaleByBeliefState, mu="linear", nu="square")
register_state(optax.ScaleByAdaDeltaState, e_g="square", e_x="square")
register_state(optax.ScaleByNovogradState, mu="linear", nu="square")
register_state(optax.ScaleByRpropState, step_sizes="square", prev_updates="linear")
register_state(optax.ScaleByRmsState, nu="square")
register_state(optax.ScaleByRStdDevState, mu="linear", nu="square")
register_state(optax.ScaleByRssState, sum_of_squares="square")
register_state(optax.FactoredState, v_row="square_rows", v_col="square_cols", v="square")
register_state(optax.TraceState, trace="linear")
register_state(optax.EmaState, ema="linear")
register_state(optax.ApplyEvery, grad_acc="linear")
register_state(optax.MultiStepsState, acc_grads="linear")
register_state(optax.ZeroNansState, found_nan="scalar")
register_state(optax.SnapshotState, measurement="scalar")  # overwritten at every step
register_state(optax.MonitorState, measurements="scalar")
register_state(optax.contrib.MuonState, mu="linear")
register_state(optax.contrib.ScaleByAdemamixState, m1="linear", m2="linear", nu="square")
register_state(optax.contrib.ScaleBySimplifiedAdEMAMixState, m="linear", n="square")

# States that Optax does not export.
for tx, roles in (
    (optax.scale_by_rms(bias_correction=True), {"nu": "square"}),
    (optax.scale_by_stddev(bias_correction=True), {"mu": "linear", "nu": "square"}),
    (optax.scale_by_optimistic_gradient(), {"previous_gradient": "linear"}),
):
    register_state(type(jax.eval_shape(tx.init, ())), **roles)
