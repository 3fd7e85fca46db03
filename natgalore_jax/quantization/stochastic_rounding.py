"""Weights kept in bfloat16 alone: sums that are rounded at random, so that their mean is right.

A bfloat16 number has eight digits, and neighbours that lie 0.4 to 0.8 % apart. An update smaller
than half of that is lost if p + u is rounded to nearest, step after step. Rounded to one of the two
neighbours at random, each as likely as it is near,

    P(p' = above) = (p + u - below) / (above - below),    so    E[p'] = p + u,                 (1)

no update is lost but in the noise. The neighbours of a float32 number in bfloat16 are its own
first sixteen bits, and these plus one: sixteen random bits, added to its last sixteen, carry as
often as (1) asks.

References: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551;
Zamirai et al., "Revisiting BFloat16 Training", arXiv:2010.06192.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..sharding.partitioning import array_partition, with_auto_axes
from ..tree.leaf_spec import cores
from ..tree.state_roles import register_state
from ..util.validation import check_int
from .dynamic_8bit import GENERATOR


class RoundingState(NamedTuple):
    """What :func:`stochastic_rounding` remembers.

    Attributes:
      key: that of the next rounding, two words of uint32.
    """

    key: Array


register_state(RoundingState, key="scalar")


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformation:
    """The last stage of an optimizer of bfloat16 weights that have no float32 copy.

    It turns each update of a bfloat16 leaf into a float32 one, after which `optax.apply_updates`
    gives p + u rounded at random to a neighbour in bfloat16, equation (1) of this module. Updates
    of leaves in other dtypes pass as they are. An update of 0 moves nothing.

    Args:
      seed: of the random numbers.

    Returns:
      A transformation with state :class:`RoundingState`. It needs `params`, and takes one random
      number a weight and step, made where it is used.

    Raises:
      TypeError, ValueError: if `seed` is no integer from 0 on; at init, inside a projection; at
        update, without params.

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
            raise ValueError("`stochastic_rounding` goes after `natgalore.project`, not into it.")
        return RoundingState(jax.random.key_data(jax.random.key(seed, impl=GENERATOR)))

    def update(updates: PyTree, state: RoundingState, params: PyTree = None):
        if params is None:
            raise ValueError(
                "`stochastic_rounding` needs the params: tx.update(grads, state, params)."
            )
        now, following = jax.random.split(jax.random.wrap_key_data(state.key, impl=GENERATOR))
        leaves, treedef = jax.tree.flatten(updates)
        weights = treedef.flatten_up_to(params)
        rounded = [
            with_auto_axes(_to_neighbours, array_partition(w), u, w, jax.random.fold_in(now, i))
            if getattr(w, "dtype", None) == jnp.bfloat16
            else u
            for i, (u, w) in enumerate(zip(leaves, weights, strict=True))
        ]
        return treedef.unflatten(rounded), RoundingState(jax.random.key_data(following))

    return optax.GradientTransformation(init, update)


def _to_neighbours(u: Float[Array, "..."], w: Any, key: Array) -> Float[Array, "..."]:
    """The update in float32 that takes w to the neighbour of w + u which the key draws."""
    w = w.astype(jnp.float32)
    return neighbour(w + u.astype(jnp.float32), key) - w


def neighbour(x: Float[Array, "*axes"], key: Array) -> Float[Array, "*axes"]:
    """x, float32, rounded at random to a bfloat16 number, equation (1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> neighbour(jnp.array([1.0, -2.5, jnp.inf, jnp.nan]), jax.random.key(0)).tolist()
      [1.0, -2.5, inf, nan]
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x)
