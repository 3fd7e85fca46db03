"""The update of inner: one transformation over one tree of Cores and other leaves.

Its 8-bit state is decoded a few arrays at a time, its decoupled decay of whole weights is kept
apart, and a transformation that reads the params' boxes finds them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..quantization.quantized_array import dequantize, is_quantized, requantize
from ..quantization.staged_update import update_in_stages
from ..tree.cores import is_core
from ..tree.flax_boxes import unbox, with_boxes
from .learning_rate_check import RateFree
from .projection import to_working_dtype
from .weight_decay import refuse_evaluation, update_with_decay


class Inner:
    """A transformation in the subspace.

    Attributes:
      transformation: with extra arguments.
      rate_free: whether it is known to contain no learning rate.
    """

    def __init__(self, transformation: optax.GradientTransformation):
        self.transformation = optax.with_extra_args_support(transformation)
        self.rate_free = isinstance(transformation, RateFree)
        self._jitted = jax.jit(self._update, static_argnums=0)

    def update(
        self,
        boxes: PyTree,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, list[Any], PyTree]:
        """Inner's answer, its decay of each Core and its new state, decoded in stages."""
        proxies = None
        if params is not None:
            proxy = lambda x, w: (
                x.replace(jnp.zeros_like(x.value)) if is_core(x) else to_working_dtype(w)
            )
            proxies = jax.tree.map(proxy, updates, params, is_leaf=is_core)
        has_boxes = jax.tree.structure(boxes) != jax.tree.structure(unbox(boxes))
        box_def = jax.tree.structure(boxes) if has_boxes else None
        # Arrays and numbers are traced; functions, such as a loss, would need whole weights.
        static = {k: x for k, x in extra_args.items() if not _is_numeric(x)}
        static = {k: refuse_evaluation if callable(x) else x for k, x in static.items()}
        arrays = {k: x for k, x in extra_args.items() if k not in static}
        if static:
            update = jax.jit(
                lambda updates, state, params: self._update(
                    box_def, updates, state, params, arrays | static
                )
            )
        else:
            update = lambda *trees: self._jitted(box_def, *trees, arrays)

        leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
        coded = [i for i, x in enumerate(leaves) if is_quantized(x)]
        if not coded:
            return update_with_decay(update, updates, state, proxies)

        def on_leaves(leaves):
            now = treedef.unflatten(leaves)
            answer, decay, new = update_with_decay(update, updates, dequantize(now), proxies)
            return (answer, decay), treedef.flatten_up_to(requantize(new, now))

        (answer, decay), new = update_in_stages(on_leaves, leaves, coded)
        return answer, decay, treedef.unflatten(new)

    def _update(
        self, box_def: Any, updates: PyTree, state: PyTree, params: PyTree, extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        inner = self.transformation
        if box_def is not None:
            inner = with_boxes(inner, box_def.unflatten(range(box_def.num_leaves)))
        return inner.update(updates, state, params, **extra_args)


def _is_numeric(x: Any) -> bool:
    """Whether x is a tree of arrays and numbers."""
    return all(isinstance(leaf, jax.typing.ArrayLike) for leaf in jax.tree.leaves(x))
