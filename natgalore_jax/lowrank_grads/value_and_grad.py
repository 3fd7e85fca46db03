"""`jax.value_and_grad` with cores for projected weights, straight from the backward pass.

    no matrix due   value and cores from the loss at weights W + P B Qᵀ, B = 0 (loss.py)
    a matrix due    the same, on refreshed bases (refresh.py)

The device decides which of the two a step is.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ..selection.select import check_arrays
from ..sharding.array_partitions import partitions_of, use_mesh_of, use_partitions
from ..subspace.refresh import groups, number_of_matrices
from ..subspace.state import (
    SubspaceState,
    bases_in,
    is_subspace,
    settings_of,
    subspace_states,
)
from ..tree.flax_boxes import rebox_like, unbox, unbox_cores
from ..util.validation import check_choice, check_int
from .loss import backward, mean
from .refresh import refreshed_by_passes, refreshed_from_gradients


FALLBACKS = ("warn", "error", "ignore")
REFRESHES = ("auto", "passes", "gradient")
FEW = 4  # groups of matrices; each costs two more passes in a period


def value_and_grad(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    has_aux: bool = False,
    *,
    micro_batches: int = 1,
    refresh: str = "auto",
    on_fallback: str = "warn",
) -> Callable[..., Any]:
    """`jax.value_and_grad` for an optimizer that projects: gradients of its matrices are cores.

    Not for `natural_galore` with its default residual, which needs whole gradients: use
    `residual=None`, or :func:`galore`.

    For y = x W with cotangent ȳ the core is PᵀG = (x P)ᵀ ȳ, two products as wide as the rank: the m
    x n gradient is never formed, stored or reduced over devices. The loss function needs no change.
    *This function* refreshes bases where they are due, so it returns the new state, and `tx.update`
    continues from there, with the update that whole gradients would have given, to float32
    rounding.

    Call it under `jax.jit`, as part of the training step, with `stagger=False` in the optimizer: a
    refresh by passes costs two more passes of the whole model, for one matrix or for all. More in
    `docs/low-rank-gradients.md`.

    Args:
      loss_fn: `loss_fn(params, *args)` returns a real number, or that and arrays if `has_aux`. It
        is differentiated with respect to `params` alone.
      tx: the optimizer of the state. Optax may wrap `natgalore.project` in any way that passes
        gradients on: `chain`, `masked`, `partition`, `inject_hyperparams`. `MultiSteps` must be
        inside, as (part of) `inner`; :func:`sharded` and :func:`offload` outermost.
      has_aux: whether `loss_fn` returns a pair.
      micro_batches: k; losses and gradients are averaged over k micro-batches, which each array of
        `*args` has on a leading axis of length k. Keyword arguments go to all. Cores are summed,
        r x n each, and a step has one refresh, from the mean. Auxiliary outputs get that axis.
      refresh: the source of a new basis. "passes": products with the gradient, so that no gradient
        is formed. These products are cores on other bases. It supports the bases "power" and
        "random", and one projected side. "gradient": whole gradients, in one pass in place of the
        pass with cores. "auto": passes if supported, and if matrices are refreshed in at most 4
        groups, as with `stagger=False`; with more groups passes would take most of the time.
      on_fallback: the reaction to an operation on a projected weight without a rule, for which the
        gradient of this use is formed whole, and exact: "warn" with the names of operations and
        leaves, "error", or "ignore".

    Returns:
      A function `(params, opt_state, *args, **kwargs) -> (loss, grads), opt_state`, or
      `((loss, aux), grads), opt_state`. In `grads` a projected leaf is a Core of (*batch, r, n), or
      (*batch, r, r) on both sides, and any other leaf its gradient. Clipping by a global norm
      before the projection sees the norms of cores.

    Raises:
      ValueError: if `on_fallback` or `refresh` is unknown. When called: if the state is one with a
        `residual`, which needs whole gradients, or of a `MultiSteps` around the projection; if a
        projected leaf is not in `params`; if `refresh="passes"` and the basis does not allow it; if
        arguments are not micro-batches; or for a fallback, under "error".

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> params = {"kernel": jnp.ones((16, 64))}
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
      >>> tx = natgalore.galore(1e-3, rank=8, stagger=False)
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
    full_pass = jax.value_and_grad(both, has_aux=True)

    def fn(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any):
        _check_micro_batches(args, micro_batches)
        full = lambda: mean(lambda args: full_pass(params, *args, **kwargs), args, micro_batches)
        check_states(opt_state, params)
        bare = unbox_cores(opt_state)
        leaves, treedef = jax.tree.flatten(bare, is_leaf=is_subspace)
        places = [i for i, x in enumerate(leaves) if is_subspace(x) and bases_in(x.basis)]
        states = [leaves[i] for i in places]
        with use_mesh_of(params), _partitions_known_to(tx, params):
            if not states:
                result = full()
            else:
                run, fallbacks = backward(loss_fn, params, has_aux, args, kwargs, micro_batches)
                specs = [P.spec for state in states for P in bases_in(state.basis)]
                partitions = partitions_of(unbox(params), specs)
                if _by_passes(refresh, states):
                    result, states = refreshed_by_passes(run, states, partitions)
                else:
                    result, states = refreshed_from_gradients(run, full, states, partitions)
                _report(fallbacks, on_fallback)
        for i, state in zip(places, states, strict=True):
            leaves[i] = state
        (value, aux), grads = result
        new_state = rebox_like(treedef.unflatten(leaves), opt_state)
        return ((value, aux) if has_aux else value, grads), new_state

    return fn


def _partitions_known_to(
    tx: optax.GradientTransformation | optax.MultiSteps, params: PyTree
) -> contextlib.AbstractContextManager[Any]:
    """The context of the partitions that :func:`sharded` was given, around the whole optimizer."""
    partitions = getattr(tx, "param_partitions", None)
    return contextlib.nullcontext() if partitions is None else use_partitions(partitions(params))


def _by_passes(how: str, states: list[SubspaceState]) -> bool:
    """Whether bases are refreshed without whole gradients."""
    refreshes = [settings_of(state).refresh for state in states]
    unable = [
        P.spec.name
        for refresh, state in zip(refreshes, states, strict=True)
        for P in bases_in(state.basis)
        if refresh.method.needs_gradient or P.spec.both
    ]
    if unable and how == "passes":
        raise ValueError(
            'refresh="passes" makes bases "power" and "random", of one side alone, and no other: '
            f"not that of `{unable[0]}`."
        )
    matrices = [number_of_matrices([P.spec for P in bases_in(x.basis)]) for x in states]
    number = max(
        groups(refresh.every, total, refresh.stagger)
        for refresh, total in zip(refreshes, matrices, strict=True)
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


def check_states(opt_state: PyTree, params: PyTree) -> None:
    """Raises if cores cannot be computed for a state, or it does not fit the params."""
    check_arrays(params)
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(unbox(params))}
    seen = set()
    for state in subspace_states(opt_state):
        settings = settings_of(state)
        if settings is not None and settings.has_residual:
            raise ValueError("`residual` needs whole gradients: use jax.value_and_grad with it.")
        for P in bases_in(state.basis):
            path, name = P.spec.path, P.spec.name
            if path not in paths:
                raise ValueError(f"`{name}`, which `opt_state` projects, is not in `params`.")
            if path in seen:
                raise ValueError(f"`{name}` is projected twice in `opt_state`.")
            seen.add(path)
    is_outer = lambda x: isinstance(x, tuple(OUTER))
    for node in jax.tree.leaves(opt_state, is_leaf=is_outer):
        if is_outer(node) and subspace_states(node):
            name, fault = OUTER[type(node)]
            raise ValueError(
                f"optax.{name} around the projection {fault}: put it inside, as (part of) `inner` "
                "of natgalore.project."
            )


RETURNS_CORES = "returns cores in place of updates on some steps"
# States of wrappers that do not work around a projection that gets cores.
OUTER = {
    optax.MultiStepsState: ("MultiSteps", "adds up whole gradients"),
    optax.ApplyIfFiniteState: ("apply_if_finite", RETURNS_CORES),
    optax.ConditionallyMaskState: ("conditionally_mask", RETURNS_CORES),
    optax.ConditionallyTransformState: ("conditionally_transform", RETURNS_CORES),
}


def _report(fallbacks: dict[tuple[str, str], None], on_fallback: str) -> None:
    """Warns of uses with whole gradients, or raises."""
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
