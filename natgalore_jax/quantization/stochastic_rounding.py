"""Stochastic rounding of updated bfloat16 weights, without a float32 copy.

A bfloat16 number has eight significant bits, so adjacent numbers differ by 0.4 to 0.8 %. If p + u
is rounded to nearest, an update smaller than half of that is lost on every step. Stochastic
rounding to one of the two adjacent numbers,

    P(p' = above) = (p + u - below) / (above - below),    so    E[p'] = p + u,                 (1)

keeps every update in the mean. The two bfloat16 neighbours of a float32 number are its upper
sixteen bits and these plus one. Sixteen random bits added to the lower sixteen carry with the
probability of (1).

References: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551;
Zamirai et al., "Revisiting BFloat16 Training", arXiv:2010.06192.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..sharding.array_partitions import array_partition, with_auto_axes
from ..tree.cores import cores
from ..tree.state_roles import register_state
from ..util.validation import check_int
from .dynamic_8bit import GENERATOR


class RoundingState(NamedTuple):
    """State of :func:`stochastic_rounding`.

    Attributes:
      key: key data of the next rounding, two uint32 words.
    """

    key: Array


register_state(RoundingState, key="scalar")


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformation:
    """Stochastic rounding of bfloat16 weights, as the last stage of an optimizer.

    Replaces each update of a bfloat16 leaf by a float32 update with which `optax.apply_updates`
    returns p + u stochastically rounded to bfloat16, equation (1) of this module. Updates of leaves
    with other dtypes are unchanged, and so are weights with an update of 0.

    Args:
      seed: of the random numbers.

    Returns:
      A transformation with state :class:`RoundingState`. It needs `params` and generates one random
      number per weight and step, on the weight's device.

    Raises:
      TypeError, ValueError: if `seed` is not a nonnegative integer; at init, inside a projection;
        at update, without params.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> params = {"kernel": jnp.ones((64, 256), jnp.bfloat16)}
      >>> tx = optax.chain(optax.sgd(1e-3), natgalore.stochastic_rounding())
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)["kernel"]  # 1 - 0.001, between 1 and 1 - 2⁻⁸
      >>> moved.dtype.name, sorted(set(map(float, moved.ravel())))
      ('bfloat16', [0.99609375, 1.0])
      >>> round(float(moved.astype(jnp.float32).mean()), 4)
      0.999
    """
    seed = check_int("seed", seed, minimum=0)

    def init(params: PyTree) -> RoundingState:
        if cores(params):
            raise ValueError(
                "`stochastic_rounding` must follow `natgalore.project`, not be inside."
            )
        return RoundingState(jax.random.key_data(jax.random.key(seed, impl=GENERATOR)))

    def update(updates: PyTree, state: RoundingState, params: PyTree = None):
        if params is None:
            raise ValueError(
                "`stochastic_rounding` needs params: call tx.update(grads, state, params)."
            )
        current, following = jax.random.split(jax.random.wrap_key_data(state.key, impl=GENERATOR))
        leaves, treedef = jax.tree.flatten(updates)
        weights = treedef.flatten_up_to(params)
        rounded = [
            with_auto_axes(
                _rounding_update, array_partition(w), u, w, jax.random.fold_in(current, i)
            )
            if getattr(w, "dtype", None) == jnp.bfloat16
            else u
            for i, (u, w) in enumerate(zip(leaves, weights, strict=True))
        ]
        return treedef.unflatten(rounded), RoundingState(jax.random.key_data(following))

    return optax.GradientTransformation(init, update)


def _rounding_update(u: Float[Array, "..."], w: Any, key: Array) -> Float[Array, "..."]:
    """The float32 update from w to the stochastically rounded w + u."""
    w = w.astype(jnp.float32)
    return neighbour(w + u.astype(jnp.float32), key) - w


def neighbour(x: Float[Array, "*axes"], key: Array) -> Float[Array, "*axes"]:
    """The float32 array x stochastically rounded to bfloat16 numbers, equation (1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> neighbour(jnp.array([1.0, -2.5, jnp.inf, jnp.nan]), jax.random.key(0)).tolist()
      [1.0, -2.5, inf, nan]
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    truncated = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), truncated, x)
