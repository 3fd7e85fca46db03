"""A loss and its gradients, with cores in place of whole gradients, on bases that may change."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core
from jax.sharding import AxisType
from jaxtyping import Array, PyTree

from ..quantization.quantized_array import decoded
from ..sharding.shard_map import varying_as
from ..subspace.lift import expanded
from ..subspace.projection import core_dtype, working_dtype
from ..tree.flax_boxes import rebox, unbox
from ..tree.leaf_spec import Basis, Core, cores
from ..util.linalg import max_abs
from .interpreter import Use, as_arrays, evaluate
from .tangent_weight import TangentWeight, tag


# (P,) or (P, Q) of each projected leaf, by its path
Bases = dict[tuple[Any, ...], tuple[Basis, ...]]
Result = tuple[tuple[Any, Any], PyTree]  # (value, aux), gradients


def backward(
    loss_fn: Callable[..., Any],
    params: PyTree,
    has_aux: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    micro_batches: int = 1,
) -> tuple[Callable[..., Result], dict[tuple[str, str], None]]:
    """A pass, as a function of the bases and, in a loop, of the turn; its gradients have Cores.

    And what fell back, once that is traced. Of micro-batches see :func:`mean`.
    """
    paths, weights = zip(*jax.tree_util.tree_leaves_with_path(unbox(params)), strict=True)
    split = tuple(args) if micro_batches > 1 else ()
    program, shapes = program_of(loss_fn, params, args, kwargs, split)
    fallbacks: dict[tuple[str, str], None] = {}

    def report(use: Use):
        if use.fell_back:
            fallbacks.setdefault((use.operation, use.weight.name))

    def run(bases: Bases, turn: Any = None) -> Result:
        bases = {path: tuple(map(decoded, sides)) for path, sides in bases.items()}
        # In a loop, a pass is tied to its turn: the compiler would take what does not depend on the
        # bases, such as the head's products, out of the loop and onto steps without a turn.
        tied = weights if turn is None else lax.optimization_barrier((weights, turn))[0]

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

        def loss(free: list[Array], part: PyTree):
            values = [*map(tagged, paths, tied, free), *jax.tree.leaves(part)]
            outputs = evaluate(program, values, report)
            outputs[:1] = as_arrays(outputs[:1], None, report)
            outputs = [x.weight if isinstance(x, TangentWeight) else x for x in outputs]
            value = jax.tree.structure(shapes).unflatten(outputs)
            return value if has_aux else (value, None)

        free = list(map(start, paths, tied))
        slopes_of = lambda part: jax.value_and_grad(loss, has_aux=True)(free, part)
        value, slopes = mean(slopes_of, split, micro_batches)
        node = lambda path, x: Core(x, bases[path][0].spec) if path in bases else x
        at = {path: node(path, x) for path, x in zip(paths, slopes, strict=True)}
        return value, like(params, at)

    return run, fallbacks


def program_of(
    loss_fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    split: tuple[Any, ...] = (),
) -> tuple[jax_core.ClosedJaxpr, PyTree]:
    """The program of a loss, and the form of its outputs.

    Its inputs are the leaves of `params`, and of one micro-batch of `split` where there are any.
    """
    treedef = jax.tree.structure(unbox(params))

    def of_leaves(leaves, part):
        return loss_fn(rebox(treedef.unflatten(leaves), params), *(part or args), **kwargs)

    part = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], split))
    return jax.make_jaxpr(of_leaves, return_shape=True)(jax.tree.leaves(unbox(params)), part)


def mean(f: Callable[[PyTree], Result], parts: PyTree, number: int) -> Result:
    """The mean of values and gradients over micro-batches, summed in float32 at least.

    Args:
      f: of a micro-batch.
      parts: arrays with micro-batches on their leading axes; whatever if there is one.
      number: of micro-batches.

    Returns:
      As `f` does; what is auxiliary has a leading axis of micro-batches, if there are several.
    """
    if number == 1:
        return f(parts)
    (value, _), grads = jax.eval_shape(lambda: f(jax.tree.map(lambda x: x[0], parts)))
    start = jax.tree.map(lambda x: blank(x.update(dtype=working_dtype(x))), (value, grads))

    def add(total, part):
        (value, aux), grads = f(part)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (value, grads)), aux

    total, aux = lax.scan(add, start, parts)
    mean = lambda t, x: (t / number).astype(x.dtype)
    value, grads = jax.tree.map(mean, total, (value, grads))
    return (value, aux), grads


def bases_of(states: Sequence[Any]) -> Bases:
    """The bases of each leaf that is projected in SubspaceStates."""
    by_path: Bases = {}
    for state in states:
        for side in (state.basis, state.right_basis):
            for P in bases_in(side):
                by_path[P.spec.path] = (*by_path.get(P.spec.path, ()), P)
    return by_path


def bases_in(tree: PyTree) -> list[Basis]:
    """The Bases of a tree, in order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_basis) if is_basis(x)]


def is_basis(x: Any) -> bool:
    return isinstance(x, Basis)


def largest(result: Result, state: Any) -> list[Array]:
    """The largest entries of each matrix of each core that is of a SubspaceState, in its order."""
    at = {R.spec: max_abs(R.value) for R in cores(result[1])}
    return [at[n.spec] for n in cores(state.refreshed)]


def blank(x: jax.ShapeDtypeStruct) -> Any:
    """Zeros of the type of x."""
    explicit = x.sharding is not None and AxisType.Explicit in x.sharding.mesh.axis_types
    return varying_as(lax.full_like(x, 0, sharding=x.sharding if explicit else None), x)


def like(params: PyTree, at: dict[tuple[Any, ...], Any]) -> PyTree:
    """What `at` holds for each path, in the structure of `params`; Cores come without boxes."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(unbox(params))
    return rebox(treedef.unflatten([at[path] for path, _ in flat]), params)
