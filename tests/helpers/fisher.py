"""Trees of one core, and the updates of a Fisher stage for a list of cores."""

import jax
import numpy as np

from natgalore_jax.tree.cores import Core
from natgalore_jax.tree.leaf_spec import LeafSpec


R, N = 4, 6
HUGE, TINY = 1e25, 1e-25


def as_core(x):
    """A tree with one core: the array x of shape (*batch, r, n)."""
    batch = tuple(range(x.ndim - 2))
    path = (jax.tree_util.DictKey("w"),)
    return {"w": Core(x, LeafSpec(path, x.shape, batch, (x.ndim - 2,), (x.ndim - 1,), x.shape[-2]))}


def answers(tx, gradients):
    """The updates for each of `gradients` from the initial state, and the final state."""
    state, update, out = tx.init(as_core(gradients[0])), jax.jit(tx.update), []
    for g in gradients:
        updates, state = update(as_core(g), state)
        out.append(updates["w"].value)
    return out, state


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
