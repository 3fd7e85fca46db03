"""The state of an optimizer as a dict of arrays by name."""

import warnings
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree


def plain_state(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with a state that is one dict of arrays, for checkpointers that work by name.

    Such as safetensors, big_vision's and clu's. Orbax, pickle and `flax.serialization` take the
    state of `tx` as it is. An array's name is its path in the state of `tx`, such as
    `0/basis/up/kernel`, so it is stable between runs with the same optimizer and params.

    Args:
      tx: any optimizer. :func:`sharded` and :func:`quantized` go inside: what reads a state, such
        as :func:`state_shardings`, :func:`value_and_grad` and the diagnostics, reads that of `tx`.

    Returns:
      A transformation with the updates of `tx`. `update` needs `params`, from which the structure
      of the state is found.

    Raises:
      ValueError: at update, without `params`, or if the names of the state are not those of
        `tx.init(params)`; the message lists both.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore
      >>> tx = plain_state(natgalore.galore(1e-3, rank=4))
      >>> state = tx.init({"up": jnp.ones((8, 16))})
      >>> sorted(state)[:3], state["0/basis/up"].shape
      (['0/basis/up', '0/count', '0/inner_state/1/count'], (8, 4))
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> dict[str, Array]:
        return _named(tx.init(params))

    def update(updates: PyTree, state: dict[str, Array], params: PyTree = None, **extra_args: Any):
        if params is None:
            raise ValueError("`plain_state` needs `params`: update(updates, state, params).")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given at init
            like = jax.eval_shape(tx.init, params)
        names = list(_named(like))
        if {*names} != {*state}:
            missing, unknown = sorted({*names} - {*state}), sorted({*state} - {*names})
            raise ValueError(
                f"the state is not that of `tx.init(params)`: it lacks {missing}, and has "
                f"{unknown} beside it."
            )
        arrays = [state[name] for name in names]
        updates, new = tx.update(
            updates, jax.tree.structure(like).unflatten(arrays), params, **extra_args
        )
        return updates, _named(new)

    return optax.GradientTransformationExtraArgs(init, update)


def _named(state: PyTree) -> dict[str, Any]:
    """The arrays of a state by name, in its order; a part of an array has the name of the part."""
    named: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        # A Core repeats the last key of its leaf.
        keys = [key for i, key in enumerate(path) if i == 0 or key != path[i - 1]]
        name = jax.tree_util.keystr(tuple(keys), simple=True, separator="/")
        if name in named:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
        named[name] = x
    return named
