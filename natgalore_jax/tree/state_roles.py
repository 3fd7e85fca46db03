"""What does this array of a state hold? The roles that answer it, declared where a state is.

Whether a field is linear in the gradient, or its square, is said once, with
:func:`register_state`. :func:`walk` is the one traversal of a state: it meets every array with its
role and the spec of the leaf that it belongs to. Transport, shardings and checks are each one
function that it is given.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import PyTree

from .leaf_spec import Basis, Core, LeafSpec


Role = Literal[
    "basis",
    "key",
    "linear",
    "square",
    "square_rows",
    "square_cols",
    "window",
    "gram",
    "fisher",
    "root",
    "scalar",
]


class Undeclared(str):
    """Stands for the role of a field of which no role is known; names the field."""


ROLES: dict[type, dict[str, str]] = {}


def register_state(state_type: type, **roles: str) -> None:
    """Declares what the fields of a state hold, so that it can be carried to another basis.

    Args:
      state_type: a NamedTuple, or any other pytree whose children have names.
      **roles: for each field that holds something per core, one of

        - `"linear"`, (*batch, r, n): a combination of cores, as momentum is.
        - `"square"`, (*batch, r, n): one of their elementwise squares, as Adam's nu is, or of other
          sizes that have no sign. One number for a whole leaf is left as it is.
        - `"square_rows"`, (*batch, r), and the field after it `"square_cols"`, (*batch, n): the
          factors of squares v ≈ row colᵀ / mean(row), as Adafactor's are.
        - `"window"`, (*batch, s, r, n): cores; and after it `"gram"`, (*batch, s, s).
        - `"fisher"`, (*batch, r, r): a mean of R Rᵀ.
        - `"root"`: derived from the Fisher; cleared, and the transformation computes it anew. One
          that :func:`quantized` is told to keep in 8 bits must be symmetric and semidefinite too.
        - `"scalar"`: what no basis enters.

        Transport `"reset"` makes all of them zero but squares, so zero must mean that nothing has
        come in.

    Raises:
      ValueError: if a role is none of these, the state has no such field, or `"square_cols"` or
        `"gram"` does not come right after the field it goes with.

    Example:
      >>> from typing import NamedTuple
      >>> class MomentumState(NamedTuple):
      ...     momentum: object
      >>> register_state(MomentumState, momentum="linear")
    """
    for field, role in roles.items():
        if role not in get_args(Role):
            raise ValueError(
                f"`{field}` must have one of the roles {get_args(Role)}, got {role!r}."
            )
        if field not in getattr(state_type, "_fields", (field,)):
            raise ValueError(
                f"`{field}` is no field of {state_type.__name__}: {state_type._fields}."
            )
    partners = {"square_cols": "square_rows", "gram": "window"}
    order = [roles.get(field) for field in getattr(state_type, "_fields", roles)]
    for before, role in itertools.pairwise([None, *order]):
        if partners.get(role, before) != before:
            raise ValueError(
                f"a field of role {role!r} must come right after one of {partners[role]!r}."
            )
    ROLES[state_type] = roles


def walk(state: PyTree, f: Callable[[Any, str | None, LeafSpec | None], Any]) -> PyTree:
    """`state` with every array x replaced by `f(x, role, spec)`: the one traversal of a state.

    `spec` is that of the leaf which x belongs to, or None where x belongs to no projected leaf.
    `role` is the one declared for the field that holds x; where none was, it names the field.
    """

    def visit(node, role, spec):
        if node is None:
            return None
        if isinstance(node, Core | Basis):
            spec = node.spec
            if isinstance(node, Basis):
                dtype = getattr(node.value, "dtype", None)  # None of codes and their scales
                is_key = dtype is not None and not jnp.issubdtype(dtype, jnp.floating)
                role = "key" if is_key else "basis"
        children, treedef = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        if not children:
            return node  # optax.MaskedNode, say
        if jax.tree_util.treedef_is_leaf(treedef):
            return f(node, role, spec)
        return treedef.unflatten(visit(x, role_of(node, key, role), spec) for (key,), x in children)

    def role_of(node, key, inherited):
        known = ROLES.get(type(node))
        field = getattr(key, "name", None)
        declared = inherited is not None and not isinstance(inherited, Undeclared)
        if known is None and (declared or not hasattr(node, "_fields")):
            return inherited  # a container: of params, where a state's field has their structure
        undeclared = Undeclared(f"{type(node).__name__}.{field}")
        return undeclared if known is None else known.get(field, undeclared)

    return visit(state, None, None)


def is_per_matrix(x: Any, role: Any, spec: LeafSpec) -> bool:
    """Whether x has a part for each matrix of its leaf, which another basis may change."""
    return not is_per_leaf_scalar(x, role) and x.shape[: len(spec.batch)] == spec.batch_shape


def is_per_leaf_scalar(x: Any, role: Any) -> bool:
    """Whether x, in place of squares, is one number for a whole leaf, which no basis enters.

    NovoGrad's norm is, and what Adafactor puts where it does not factor, or does.
    """
    return role in SQUARES and x.shape in ((), (1,))


def slice_shape(role: str, spec: LeafSpec) -> tuple[int, ...] | None:
    """The shape of one matrix's part of a state array in `role`; None where it has a say in it."""
    r, n = spec.core_shape[-2:]
    shapes = {"square_rows": (r,), "square_cols": (n,), "fisher": (r, r)}
    return (r, n) if role in ("linear", "square") else shapes.get(role)


def owner(path: tuple, names: Mapping[tuple, Any]) -> tuple | None:
    """The path, of those in `names`, that ends the path of an array of a state, or of its parts."""
    ends = (end[i:] for end in (path, path[:-1]) for i in range(len(end) + 1))
    return next((end for end in ends if end in names), None)


SQUARES = ("square", "square_rows", "square_cols")

# What Optax's own states hold of the gradients they have seen.
register_state(optax.ScaleByAdamState, mu="linear", nu="square")  # of its kin too, ADOPT and AdaMax
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
register_state(optax.SnapshotState, measurement="scalar")  # written anew at every step
register_state(optax.MonitorState, measurements="scalar")
register_state(optax.contrib.MuonState, mu="linear")
register_state(optax.contrib.ScaleByAdemamixState, m1="linear", m2="linear", nu="square")
register_state(optax.contrib.ScaleBySimplifiedAdEMAMixState, m="linear", n="square")

# Optax names these states nowhere public.
for tx, roles in (
    (optax.scale_by_rms(bias_correction=True), {"nu": "square"}),
    (optax.scale_by_stddev(bias_correction=True), {"mu": "linear", "nu": "square"}),
    (optax.scale_by_optimistic_gradient(), {"previous_gradient": "linear"}),
):
    register_state(type(jax.eval_shape(tx.init, ())), **roles)
