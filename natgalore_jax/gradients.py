"""value_and_grad: cores straight from the backward pass, where no refresh needs the whole gradient.

    hot step   loss and cores from the program of the loss at tagged weights (backward.py)
    refresh    where any matrix is due: loss and whole gradients, new bases from these with all that
               depends on them, and cores on the new bases

Both stand behind conditions on the device: a step runs one of them. A matrix that has had no
usable gradient yet is due once its core is neither zero nor infinite, which is known only after a
hot step; then, once, a step runs both.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import PyTree

from .backward import Bases, backward, like
from .boxes import unbox
from .checks import check_choice
from .control import when
from .engine import Engine, SubspaceState, finding
from .lower import lower
from .manual import varying_as
from .placement import Layout, entered, layout_of, local
from .refresh import Refresh
from .residual import ResidualState
from .spec import Basis, LeafSpec, cores, is_core, path_name


FALLBACKS = ("warn", "error", "ignore")


def value_and_grad(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    has_aux: bool = False,
    *,
    on_fallback: str = "warn",
) -> Callable[..., Any]:
    """`jax.value_and_grad` for an optimizer that projects: the gradients of its matrices are cores.

    For y = x W the core is PᵀG = (x P)ᵀ ȳ, two products as wide as the rank: the m x n gradient is
    never formed, stored or reduced over devices. The loss is read as it is written. On steps where
    any matrix gets a new basis, the first among them, whole gradients are formed, and it is *this
    function* that refreshes with them: hence it takes `tx` and returns the state. `tx.update` goes
    on from there, to the update that whole gradients would have given, to float32 rounding.

    Call it under `jax.jit`, as part of the training step. Under `stagger`, the default, up to 100
    steps of each `refresh_every` have some matrix due, and so whole gradients; without, one has.
    More in `docs/low-rank-gradients.md`.

    Args:
      loss_fn: `loss_fn(params, *args)`, a real number, or that and arrays if `has_aux`. `params`
        is differentiated; what else it closes over is constant.
      tx: the optimizer, whose state the function is given. Optax may be wrapped around
        `natgalore.project` in any way that hands gradients on: `chain`, `masked`, `partition`,
        `inject_hyperparams`. `MultiSteps` must be inside of it, as (part of) `inner`.
      has_aux: whether `loss_fn` returns a pair.
      on_fallback: what to do where an operation on a projected weight is not known, so that the
        gradient of that use is formed whole (it is exact all the same): "warn" with the names of
        operations and leaves, "error", or "ignore".

    Returns:
      A function `(params, opt_state, *args, **kwargs) -> (loss, grads), opt_state`, or
      `((loss, aux), grads), opt_state`. In `grads` a projected leaf is a Core of (*batch, r, n), or
      (*batch, r, r) on both sides, and any other its gradient. Clipping by a global norm before
      the projection sees the norms of cores.

    Raises:
      ValueError: if `on_fallback` is none of these; when called, if the state is none of `tx`, is
        one for the `residual`, which needs whole gradients, or of a `MultiSteps` around the
        projection; if a projected leaf is not in `params`; or of a fallback, under "error".

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> params = {"kernel": jnp.ones((16, 64))}
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
      >>> tx = natgalore.galore(1e-3, rank=8)
      >>> gradients = jax.jit(natgalore.value_and_grad(loss_fn, tx))
      >>> opt_state = tx.init(params)
      >>> (loss, grads), opt_state = gradients(params, opt_state, jnp.ones((4, 16)))
      >>> grads["kernel"].value.shape
      (8, 64)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> updates["kernel"].shape
      (16, 64)

    The nearest published idea is that of Shamshoum et al., "CompAct", arXiv:2410.15352, which keeps
    x P for a random P in place of activations.
    """
    check_choice("on_fallback", on_fallback, FALLBACKS)
    whole = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def fn(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any):
        leaves, treedef = jax.tree.flatten(opt_state, is_leaf=_is_subspace)
        engines = _engines(tx, params, opt_state)
        places = [i for i, x in enumerate(leaves) if _is_subspace(x) and _bases(x)]
        states = [leaves[i] for i in places]
        if not places:
            return whole(params, *args, **kwargs), opt_state
        by_path = _by_path(states, params)
        layout = layout_of(unbox(params))
        with entered(params):
            hot, fallbacks = backward(loss_fn, params, by_path, has_aux, args, kwargs)
            blank = jax.tree.map(_blank, jax.eval_shape(hot))
            _tell(fallbacks, on_fallback)
            refreshes = [engines[_key(state)].refresh for state in states]

            def due(result):
                at = {G.spec: jnp.abs(G.value).max(axis=(-2, -1)) for G in cores(result[1])}
                largest = lambda state: [at[n.spec] for n in cores(state.refreshed)]
                flags = [
                    refresh.any_due(state, largest(state))
                    for refresh, state in zip(refreshes, states, strict=True)
                ]
                return jnp.stack(flags).any()

            def refreshed(carry):
                value, grads = whole(params, *args, **kwargs)
                at = dict(jax.tree_util.tree_leaves_with_path(unbox(grads)))
                changed = []
                for refresh, state in zip(refreshes, states, strict=True):
                    P, Q, projected, times, inner_state = _lowered(
                        refresh, _of_projected(state, at), state, layout
                    )
                    at |= {R.spec.path: R for R in cores(projected)}
                    changed.append((P, Q, times, inner_state))
                return (value, like(params, at)), changed

            result = when(~due(blank), lambda _: hot(), blank)
            before = [(x.basis, x.right_basis, x.refreshed, x.inner_state) for x in states]
            result, changed = when(due(result), refreshed, (result, before))
        for i, (P, Q, times, inner_state) in zip(places, changed, strict=True):
            leaves[i] = leaves[i]._replace(
                basis=P, right_basis=Q, refreshed=times, inner_state=inner_state
            )
        return result, treedef.unflatten(leaves)

    return fn


def _lowered(
    refresh: Refresh, gradients: PyTree, state: SubspaceState, layout: Layout
) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree]:
    """Bases, cores, counts and inner state after a refresh; cores lie as those of `backward`."""
    whole = jax.tree.map(lambda n: n.replace(PartitionSpec()), state.refreshed, is_leaf=is_core)
    like = state.basis, state.right_basis, whole, state.refreshed, state.inner_state
    down = lambda gradients, state: lower(refresh, gradients, state, layout)[:-1]
    return local(down, like, gradients, state)


def _blank(x: jax.ShapeDtypeStruct) -> Any:
    """Zeros of the type of x."""
    explicit = x.sharding is not None and AxisType.Explicit in x.sharding.mesh.axis_types
    return varying_as(lax.full_like(x, 0, sharding=x.sharding if explicit else None), x)


def _of_projected(state: SubspaceState, at: dict[tuple[Any, ...], Any]) -> PyTree:
    """What `at` holds for each path, in the structure of a state's trees; None for other leaves."""
    of = lambda n: at[n.spec.path] if is_core(n) else None
    return jax.tree.map(of, state.skipped, is_leaf=is_core)


def _engines(
    tx: optax.GradientTransformation | optax.MultiSteps, params: PyTree, opt_state: PyTree
) -> dict[tuple[LeafSpec, ...], Engine]:
    """The engines in `tx`, by the leaves that they project."""
    if _has(opt_state, ResidualState):
        raise ValueError("`residual` needs whole gradients: use jax.value_and_grad with it.")
    for node in jax.tree.leaves(opt_state, is_leaf=_is_multi_steps):
        if _is_multi_steps(node) and _has(node, SubspaceState):
            raise ValueError(
                "optax.MultiSteps around the projection adds up whole gradients: put it inside, as "
                "(part of) `inner` of natgalore.project."
            )
    with finding() as found, warnings.catch_warnings(action="ignore"):
        jax.eval_shape(lambda params: tx.init(params), params)  # a new one, or JAX remembers it
    engines = {_key(state): engine for engine, state in found}
    for state in jax.tree.leaves(opt_state, is_leaf=_is_subspace):
        if _is_subspace(state) and _key(state) not in engines:
            raise ValueError("`opt_state` is not a state of `tx`: their projections differ.")
    return engines


def _by_path(states: list[SubspaceState], params: PyTree) -> Bases:
    """The bases of each projected leaf, and that it is there."""
    by_path: Bases = {}
    there = {path for path, _ in jax.tree_util.tree_leaves_with_path(unbox(params))}
    for P in (P for state in states for P in _bases(state)):
        path = P.spec.path
        if path not in there:
            raise ValueError(
                f"`{path_name(path)}`, which `opt_state` projects, is not in `params`."
            )
        if path in by_path:
            raise ValueError(f"`{path_name(path)}` is projected twice in `opt_state`.")
        by_path[path] = (P,)
    for Q in (Q for state in states for Q in _found(state.right_basis)):
        by_path[Q.spec.path] += (Q,)
    return by_path


def _tell(fallbacks: dict[tuple[str, str], None], on_fallback: str) -> None:
    """Warns of uses whose gradients are whole, or refuses them."""
    if not fallbacks or on_fallback == "ignore":
        return
    uses = ", ".join(f"{operation} of `{name}`" for operation, name in fallbacks)
    message = (
        f"natgalore.value_and_grad forms the whole gradient of {uses}; it is exact, but saves "
        'nothing there. on_fallback="ignore" silences this.'
    )
    if on_fallback == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _found(bases: PyTree) -> list[Basis]:
    is_basis = lambda x: isinstance(x, Basis)
    return [x for x in jax.tree.leaves(bases, is_leaf=is_basis) if is_basis(x)]


def _bases(state: SubspaceState) -> list[Basis]:
    return _found(state.basis)


def _key(state: SubspaceState) -> tuple[LeafSpec, ...]:
    return tuple(P.spec for P in _bases(state))


def _is_subspace(x: Any) -> bool:
    return isinstance(x, SubspaceState)


def _is_multi_steps(x: Any) -> bool:
    return isinstance(x, optax.MultiStepsState)


def _has(tree: PyTree, kind: type) -> bool:
    is_kind = lambda x: isinstance(x, kind)
    return any(map(is_kind, jax.tree.leaves(tree, is_leaf=is_kind)))
