"""Storage of optimizer state in host memory between steps."""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from ..tree.state_roles import SQUARES, walk
from ..util.validation import check_choice
from .state_shardings import Sharded


OFFLOADED_ROLES = {"all": None, "moments": ("linear", "full", *SQUARES), "window": ("window",)}


def offload(
    tx: optax.GradientTransformation, what: str = "all"
) -> optax.GradientTransformationExtraArgs:
    """Keeps part of the state of `tx` in host memory (`pinned_host`) between steps.

    Each update copies that part to the device and back. The results are the same, bit by bit.
    `docs/sharding.md` has the cost and the saving on one GPU.

    A `jax.jit` that donates the state needs `out_shardings`: JAX otherwise matches donated arrays
    to results by shape, whether on the host or not, and may crash. Use those of
    :func:`state_shardings` for the state, with a mesh of one device on a single device, and
    shardings with `memory_kind="device"` for all other results.

    Args:
      tx: any optimizer made of this library's and Optax's transformations.
      what: the part to offload. `"window"`: the s cores per matrix of the window Fisher.
        `"moments"`: arrays linear in the gradient or its square, of all leaves. `"all"`: all
        arrays. Vectors and scalars stay on the device: they are small, and each copy has a fixed
        cost.

    Returns:
      A transformation with the state of `tx`. To combine it with :func:`sharded`, wrap the
      sharded transformation.

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
    check_choice("what", what, OFFLOADED_ROLES)
    roles = OFFLOADED_ROLES[what]
    param_partitions = getattr(tx, "param_partitions", None)
    tx = optax.with_extra_args_support(tx)

    def move_to(space: jax.memory.Space, state: PyTree) -> PyTree:
        def move(x, role, spec):
            offloaded = x.ndim > 1 and (roles is None or role in roles)
            return jax.device_put(x, space) if offloaded else x

        return walk(state, move)

    def init(params: PyTree) -> PyTree:
        return move_to(jax.memory.Space.Host, tx.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        on_device = move_to(jax.memory.Space.Device, state)
        updates, state = tx.update(updates, on_device, params, **extra_args)
        return updates, move_to(jax.memory.Space.Host, state)

    transformation = Sharded(init, update)
    transformation.param_partitions = param_partitions
    return transformation
