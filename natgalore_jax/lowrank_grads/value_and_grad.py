"""value_and_grad: cores straight from the backward pass, and new bases where they are due.

    hot step   loss and cores from the program of the loss at tagged weights (loss.py)
    refresh    where any matrix is due: two more passes a turn of its basis (refresh.py), or whole
               gradients, and all that follows from them (refresh_from_gradients.py)

Which of the two a step is, is decided on the device.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ..sharding.partitioning import ParamPartitions, partitions_of, use_mesh_of
from ..subspace.engine import Engine, SubspaceState, finding
from ..subspace.refresh import Refresh, groups, matrices
from ..subspace.residual import ResidualState
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import Basis, LeafSpec
from ..util.validation import check_choice, check_int
from . import refresh as turns, refresh_from_gradients as whole
from .loss import backward, bases_in, bases_of, mean


FALLBACKS = ("warn", "error", "ignore")
REFRESHES = ("auto", "passes", "gradient")
FEW = 4  # groups that are refreshed together, of which each costs two passes more


def value_and_grad(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    has_aux: bool = False,
    *,
    micro_batches: int = 1,
    refresh: str = "auto",
    on_fallback: str = "warn",
) -> Callable[..., Any]:
    """`jax.value_and_grad` for an optimizer that projects: the gradients of its matrices are cores.

    For y = x W the core is PᵀG = (x P)ᵀ ȳ, two products as wide as the rank: the m x n gradient is
    never formed, stored or reduced over devices. The loss is read as it is written. On a step where
    matrices get new bases it is *this function* that makes them: hence it takes `tx` and returns
    the state. `tx.update` goes on from there, to the update that whole gradients would have given,
    to float32 rounding.

    Call it under `jax.jit`, as part of the training step, with `stagger=False` in the optimizer:
    a refresh costs two more passes of the whole model, for one matrix or for all. More in
    `docs/low-rank-gradients.md`.

    Args:
      loss_fn: `loss_fn(params, *args)`, a real number, or that and arrays if `has_aux`. `params`
        is differentiated; what else it closes over is constant.
      tx: the optimizer, whose state the function is given. Optax may be wrapped around
        `natgalore.project` in any way that hands gradients on: `chain`, `masked`, `partition`,
        `inject_hyperparams`. `MultiSteps` must be inside of it, as (part of) `inner`.
      has_aux: whether `loss_fn` returns a pair.
      micro_batches: k, whose losses and gradients are averaged. Each array of `*args` has them on
        its leading axis, of length k; keyword arguments go to all. Cores are summed, r x n each,
        and a step has one refresh, from the mean. Auxiliary outputs come with that axis.
      refresh: what a new basis is made from. "passes": products with the gradient, which are cores
        on other bases, so that no gradient is formed; for the bases "power" and "random", of one
        side. "gradient": whole gradients, in one pass in place of the hot step's. "auto": passes,
        where `tx` allows it and refreshes all its matrices in at most 4 groups, as with
        `stagger=False`; under `stagger` passes would be most of the time.
      on_fallback: what to do where an operation on a projected weight is not known, so that the
        gradient of that use is formed whole (it is exact all the same): "warn" with the names of
        operations and leaves, "error", or "ignore".

    Returns:
      A function `(params, opt_state, *args, **kwargs) -> (loss, grads), opt_state`, or
      `((loss, aux), grads), opt_state`. In `grads` a projected leaf is a Core of (*batch, r, n), or
      (*batch, r, r) on both sides, and any other its gradient. Clipping by a global norm before
      the projection sees the norms of cores.

    Raises:
      ValueError: if `on_fallback` or `refresh` is none of these; when called, if the state is none
        of `tx`, is one for the `residual`, which needs whole gradients, or of a `MultiSteps` around
        the projection; if a projected leaf is not in `params`; if `refresh="passes"` is asked of
        another basis; if arguments are not micro-batches; or of a fallback, under "error".

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
    check_choice("refresh", refresh, REFRESHES)
    micro_batches = check_int("micro_batches", micro_batches, minimum=1)
    both = loss_fn if has_aux else lambda *args, **kwargs: (loss_fn(*args, **kwargs), None)
    slopes = jax.value_and_grad(both, has_aux=True)

    def fn(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any):
        _check_micro_batches(args, micro_batches)
        full = lambda: mean(lambda args: slopes(params, *args, **kwargs), args, micro_batches)
        leaves, treedef = jax.tree.flatten(opt_state, is_leaf=_is_subspace)
        engines = engines_of(tx, params, opt_state)
        places = [i for i, x in enumerate(leaves) if _is_subspace(x) and _bases(x)]
        states = [leaves[i] for i in places]
        refreshes = [engines[_key(state)][0].refresh for state in states]
        check_paths(states, params)
        with use_mesh_of(params):
            if states:
                run, fallbacks = backward(loss_fn, params, has_aux, args, kwargs, micro_batches)
                jax.eval_shape(lambda: run(bases_of(states)))
                _tell(fallbacks, on_fallback)
                partitions = partitions_of(unbox(params))
                if partitions.mesh is None:  # but `natgalore.sharded` may know
                    partitions = engines[_key(states[0])][1]
                if _by_passes(refresh, refreshes, states):
                    result, states = turns.refreshed(run, refreshes, states, partitions)
                else:
                    result, states = whole.refreshed(run, full, refreshes, states, partitions)
            else:
                result = full()
        for i, state in zip(places, states, strict=True):
            leaves[i] = state
        (value, aux), grads = result
        return ((value, aux) if has_aux else value, grads), treedef.unflatten(leaves)

    return fn


def _by_passes(how: str, refreshes: list[Refresh], states: list[SubspaceState]) -> bool:
    """Whether new bases are made without whole gradients."""
    unable = [
        P.spec.name
        for refresh, state in zip(refreshes, states, strict=True)
        for P in _bases(state)
        if refresh.method.needs_gradient or P.spec.both
    ]
    if unable and how == "passes":
        raise ValueError(
            'refresh="passes" makes bases "power" and "random", of one side alone, and no other: '
            f"not that of `{unable[0]}`."
        )
    number = max(
        groups(refresh.every, matrices(state.basis), refresh.stagger)
        for refresh, state in zip(refreshes, states, strict=True)
    )
    return how == "passes" or (how == "auto" and number <= FEW and not unable)


def _check_micro_batches(args: Sequence[Any], number: int) -> None:
    """Raises if the arguments are not micro-batches."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(args)}
    if number > 1 and sizes != {(number,)}:
        found = ", ".join(str(*size) if size else "none" for size in sorted(sizes))
        raise ValueError(
            f"each array of `*args` must have micro_batches={number} on a leading axis, found "
            f"{found or 'no array'}; what is the same for all can be a keyword argument."
        )


def engines_of(
    tx: optax.GradientTransformation | optax.MultiSteps, params: PyTree, opt_state: PyTree
) -> dict[tuple[LeafSpec, ...], tuple[Engine, ParamPartitions]]:
    """The engines in `tx` and how the weights lie, by the leaves that they project."""
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
    engines = {_key(state): (engine, partitions) for engine, state, partitions in found}
    for state in jax.tree.leaves(opt_state, is_leaf=_is_subspace):
        if _is_subspace(state) and _key(state) not in engines:
            raise ValueError("`opt_state` is not a state of `tx`: their projections differ.")
    return engines


def check_paths(states: list[SubspaceState], params: PyTree) -> None:
    """Raises if a leaf that is projected is missing, or is projected twice."""
    there = {path for path, _ in jax.tree_util.tree_leaves_with_path(unbox(params))}
    seen = set()
    for P in (P for state in states for P in _bases(state)):
        path, name = P.spec.path, P.spec.name
        if path not in there:
            raise ValueError(f"`{name}`, which `opt_state` projects, is not in `params`.")
        if path in seen:
            raise ValueError(f"`{name}` is projected twice in `opt_state`.")
        seen.add(path)


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


def _bases(state: SubspaceState) -> list[Basis]:
    return bases_in(state.basis)


def _key(state: SubspaceState) -> tuple[LeafSpec, ...]:
    return tuple(P.spec for P in _bases(state))


def _is_subspace(x: Any) -> bool:
    return isinstance(x, SubspaceState)


def _is_multi_steps(x: Any) -> bool:
    return isinstance(x, optax.MultiStepsState)


def _has(tree: PyTree, kind: type) -> bool:
    is_kind = lambda x: isinstance(x, kind)
    return any(map(is_kind, jax.tree.leaves(tree, is_leaf=is_kind)))
