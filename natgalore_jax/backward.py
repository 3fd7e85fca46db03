"""A loss and its gradients, with cores in place of whole gradients: a step without a refresh."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .boxes import rebox, unbox
from .lift import expanded
from .lower import core_dtype
from .lowrank import arrays, evaluate
from .manual import varying_as
from .spec import Basis, Core
from .tagged import Tagged, tag


# (P,) or (P, Q) of each projected leaf, by its path
Bases = dict[tuple[Any, ...], tuple[Basis, ...]]


def backward(
    loss_fn: Callable[..., Any],
    params: PyTree,
    bases: Bases,
    has_aux: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Callable[[], tuple[Any, PyTree]], dict[tuple[str, str], None]]:
    """Computes the value and the gradients, with Cores; and what fell back, once that is traced."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(unbox(params))
    paths, weights = zip(*flat, strict=True)
    of_leaves = lambda leaves: loss_fn(rebox(treedef.unflatten(leaves), params), *args, **kwargs)
    program, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(list(weights))
    fallbacks: dict[tuple[str, str], None] = {}
    report = lambda *use: fallbacks.setdefault(use)

    def start(path, w):
        if path not in bases:
            return w
        P = bases[path][0]
        return varying_as(jnp.zeros(P.spec.core_shape, core_dtype(P, w)), w)

    def tagged(path, w, free):
        if path not in bases:
            return free
        sides = bases[path]
        return tag(sides[0].spec, w, free, *expanded(free.dtype, *sides))

    def loss(free: list[Array]):
        outputs = evaluate(program, list(map(tagged, paths, weights, free)), report)
        outputs[:1] = arrays(outputs[:1], "output", report)
        outputs = [x.weight if isinstance(x, Tagged) else x for x in outputs]
        value = jax.tree.structure(shapes).unflatten(outputs)
        return value if has_aux else (value, None)

    def hot():
        free = list(map(start, paths, weights))
        (value, aux), slopes = jax.value_and_grad(loss, has_aux=True)(free)
        node = lambda path, x: Core(x, bases[path][0].spec) if path in bases else x
        at = {path: node(path, x) for path, x in zip(paths, slopes, strict=True)}
        return (value, aux) if has_aux else value, like(params, at)

    return hot, fallbacks


def like(params: PyTree, at: dict[tuple[Any, ...], Any]) -> PyTree:
    """What `at` holds for each path, in the structure of `params`; Cores come without boxes."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(unbox(params))
    return rebox(treedef.unflatten([at[path] for path, _ in flat]), params)
