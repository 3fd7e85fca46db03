"""Whether gradients, and a restored state, fit the projection that updates them."""

import jax
from jaxtyping import PyTree

from ..quantization.quantized_array import is_quantized
from ..tree.cores import is_core
from ..tree.leaf_spec import path_name
from ..tree.state_roles import fits, roles_of
from .refresh import Refresh
from .state import SubspaceState


def check_tree(updates: PyTree, state: SubspaceState) -> None:
    """Raises if the gradients have another tree than the params at `init`.

    Raises:
      ValueError: the message names a leaf that only one of the trees has.
    """
    given, known = (jax.tree.structure(x, is_leaf=is_core) for x in (updates, state.skipped))
    if given == known:
        return
    named = jax.tree_util.tree_leaves_with_path
    names = lambda tree: {path_name(path) for path, _ in named(tree, is_leaf=is_core)}
    apart = names(updates) ^ names(state.skipped)
    found = f"; only one of them has `{min(apart)}`" if apart else f": {given} and {known}"
    raise ValueError(
        "the gradients are another tree than the params at `init`" + found + ". A mask, or the "
        "labels of optax.partition, must be the same at `init` and `update`."
    )


def check_cores(updates: PyTree, bases: PyTree, refresh: Refresh) -> None:
    """Raises if a gradient is a core of another state, or has another shape than its leaf's core.

    Raises:
      ValueError: the message names the leaf.
    """

    def check(G, P):
        if not is_core(G):
            return
        if P is None or P.spec != G.spec or G.value.shape != G.spec.core_shape:
            raise ValueError(
                f"the gradient of `{G.spec.name}` is a core of another state, or of another shape "
                f"than {G.spec.core_shape}: `update` takes the state that value_and_grad returned."
            )
        if P.settings.refresh != refresh:
            raise ValueError(
                f"the state of `{G.spec.name}` was made by a projection with other settings, by "
                "which value_and_grad refreshed its basis; jax.tree.unflatten(jax.tree.structure("
                "tx.init(params)), jax.tree.leaves(state)) continues with those of `tx`."
            )

    jax.tree.map(check, updates, bases, is_leaf=is_core)


def check_fits(state: SubspaceState) -> None:
    """Raises if an array of the state has another rank than its leaf's spec.

    A checkpoint of another rank, restored without a check, would train on where shapes agree.

    Raises:
      ValueError: the message names the leaf, its rank and the shape.
    """
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
    for x, (role, spec) in zip(leaves, roles_of(leaves, treedef), strict=True):
        if spec is None or is_quantized(x) or fits(x, role, spec):
            continue
        raise ValueError(
            f"the state of `{spec.name}`, {spec.m} x {spec.n} at rank {spec.rank}, holds an array "
            f"of shape {x.shape} ({role}): it is from a run with another `rank` or `side`, or its "
            "arrays are in another order, as those of an Orbax checkpoint restored without an item "
            "are: restore with `item=tx.init(params)`."
        )
