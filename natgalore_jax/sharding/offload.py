"""Keeping part of a state in the host's memory, and streaming it through each step."""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from ..tree.state_roles import SQUARES, walk
from ..util.validation import check_choice


# Roles by what may be offloaded; None: whatever it is.
WHAT = {"all": None, "moments": ("linear", *SQUARES), "window": ("window",)}


def offload(
    tx: optax.GradientTransformation, what: str = "all"
) -> optax.GradientTransformationExtraArgs:
    """`tx` with part of its state in the host's memory (`pinned_host`) between steps.

    Each update copies that part to the device, and back. The steps are the same, bit by bit. What
    it costs and saves on one GPU is in `docs/sharding.md`.

    A `jax.jit` that donates the state must know where each of its results goes, since JAX matches
    them with the donated arrays by shape otherwise, on the host or not, and may crash: give it
    `out_shardings`, that of the state from :func:`state_shardings`, of a mesh of one device if need
    be, all others with `memory_kind="device"`.

    Args:
      tx: any optimizer, of this library's transformations and Optax's.
      what: `"window"`, the gradients of the window Fisher, s cores a matrix; `"moments"`, what is
        linear in gradients or their square, of all leaves; or `"all"` arrays of the state. Vectors
        and numbers stay on the device: they are small, and each copy takes its time.

    Returns:
      A transformation with the state of `tx`. Around :func:`sharded`, if both are used.

    Raises:
      ValueError: if `what` is none of these.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore
      >>> tx = offload(natgalore.natural_galore(1e-3, rank=16), "moments")
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})
      >>> state[0].inner_state[1].mu["kernel"].value.sharding.memory_kind
      'pinned_host'

    Reference: Ren et al., "ZeRO-Offload", arXiv:2101.06840.
    """
    check_choice("what", what, WHAT)
    roles = WHAT[what]
    tx = optax.with_extra_args_support(tx)

    def to(space: jax.memory.Space, state: PyTree) -> PyTree:
        def move(x, role, spec):
            chosen = x.ndim > 1 and (roles is None or role in roles)
            return jax.device_put(x, space) if chosen else x

        return walk(state, move)

    def init(params: PyTree) -> PyTree:
        return to(jax.memory.Space.Host, tx.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        updates, state = tx.update(
            updates, to(jax.memory.Space.Device, state), params, **extra_args
        )
        return updates, to(jax.memory.Space.Host, state)

    return optax.GradientTransformationExtraArgs(init, update)
