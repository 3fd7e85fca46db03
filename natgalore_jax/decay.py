"""Decay that an inner optimizer puts on weights it never sees.

Inner works on cores, but `optax.adamw` also decays weights, and decay belongs on the whole weight.
So inner is given core-shaped weights w = 0 and asked, by forward-mode differentiation, how its
answer depends on them. Decoupled decay answers

    u(w) = u(0) + a w,    a a number (−lr · weight_decay, 0 where masked)                       (1)

and the engine adds a W for the whole weight W. An inner for which (1) does not hold (LAMB's trust
ratio, coupled L2, clipping after decay, a state that averages weights) is refused: it would read
weights that are not there.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core as jax_core
from jaxtyping import Array, Float, PyTree

from .spec import cores, is_core, replace_cores


WEIGHT, ARRAY = 1, 2  # what a value was computed from, as bits; from scalars alone: 0


def update_with_decay(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    **extra_args: Any,
) -> tuple[PyTree, list[Float[Array, ""] | None], PyTree]:
    """Inner's answer at w = 0, the a of (1) for each Core (None where it is 0), its new state.

    Args:
      inner: the transformation.
      updates: its input, with Cores.
      state: its state.
      params: like `updates`: zeros in the Cores, weights elsewhere.
      **extra_args: handed on.

    Raises:
      ValueError: if (1) does not hold for `inner`.
    """

    def linearised(updates, state, params, ones):
        along = replace_cores(jax.tree.map(_no_direction, params), ones)
        primals, (slopes, drift) = jax.jvp(
            lambda w: inner.update(updates, state, w, **extra_args), (params,), (along,)
        )
        others = jax.tree.leaves(jax.tree.map(_hide_core, slopes, is_leaf=is_core))
        return (
            primals,
            [x.value for x in cores(slopes)],
            _real(others),
            _real(jax.tree.leaves(drift)),
        )

    arguments = (updates, state, params, [jnp.ones_like(x.value) for x in cores(params)])
    closed, shapes = jax.make_jaxpr(linearised, return_shape=True)(*arguments)
    origins = [ARRAY if x.ndim else 0 for x in jax.tree.leaves(arguments[:3])]
    origins += [WEIGHT] * len(arguments[3])
    outputs = jax.tree.structure(shapes)
    _, slopes, others, drift = outputs.unflatten(_origins(closed, origins))
    if any(drift):
        _refuse("its state would remember weights")
    if any(x & WEIGHT for x in others):
        _refuse("the update of one leaf depends on the weights of another")
    if WEIGHT | ARRAY in slopes:
        _refuse("what it adds is not a number times the weight")
    (updates, state), values, _, _ = outputs.unflatten(
        jax_core.jaxpr_as_fun(closed)(*jax.tree.leaves(arguments))
    )
    decay = [x.ravel()[0] if at & WEIGHT else None for x, at in zip(values, slopes, strict=True)]
    return updates, decay, state


def _refuse(reason: str) -> None:
    raise ValueError(
        f"the inner transformation cannot work on cores: {reason}. Decoupled weight decay as in "
        "optax.adamw is carried to the whole weight; what reads weights in any other way belongs "
        "outside of `natgalore.project`, after `natgalore.project_back()`."
    )


def _no_direction(x: Array) -> Array | np.ndarray:
    real = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if real else np.zeros(x.shape, jax.dtypes.float0)


def _hide_core(x: Any) -> Any:
    return None if is_core(x) else x


def _real(tangents: list[Any]) -> list[Array]:
    return [x for x in tangents if x.dtype != jax.dtypes.float0]


def _origins(closed: jax_core.ClosedJaxpr, origins: Sequence[int]) -> list[int]:
    """The origins of a program's outputs from those of its inputs."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.invars, origins, strict=True))
    known |= {
        var: ARRAY if np.ndim(x) else 0
        for var, x in zip(jaxpr.constvars, closed.consts, strict=True)
    }
    of = lambda var: 0 if isinstance(var, jax_core.Literal) else known[var]
    for eqn in jaxpr.eqns:
        inputs = [of(var) for var in eqn.invars]
        known |= zip(eqn.outvars, _through(eqn, inputs), strict=True)
    return [of(var) for var in jaxpr.outvars]


def _through(eqn: jax_core.JaxprEqn, inputs: list[int]) -> list[int]:
    """One equation of it: inside calls and branches when they are understood, else all from all."""
    call = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.primitive.name == "cond":
        branches = [_origins(branch, inputs[1:]) for branch in eqn.params["branches"]]
        return [_union([inputs[0], *origins]) for origins in zip(*branches, strict=True)]
    if eqn.primitive.name in ("jit", "pjit", "closed_call") and call is not None:
        return _origins(call, inputs)
    return [_union(inputs)] * len(eqn.outvars)


def _union(origins: Sequence[int]) -> int:
    return int(np.bitwise_or.reduce(list(origins))) if origins else 0
