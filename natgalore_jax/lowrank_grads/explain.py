"""Which weight is used how by a loss, and what the gradient of each costs: whole, and as it is."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ..selection.select import decisions
from ..sharding.partitioning import use_mesh_of
from ..subspace.engine import SubspaceState
from ..subspace.projection import core_dtype
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec, path_name
from ..util.text_tables import group_similar, human_bytes, human_count, rich_table, table
from .flops import Cost, costs_of, projecting
from .loss import bases_of, program_of
from .value_and_grad import check_paths, engines_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight in an :class:`Explanation`.

    Attributes:
      path: its name.
      shape: its shape.
      operations: where it becomes part of an array, and how often in a step.
      in_while: whether some of them are in a `while`, whose turns count as one.
      core: whether its gradient is a core, of which nothing is formed whole.
      why: if it is not: the operations that fell back, or why it is not projected.
      whole_bytes: of its whole gradient.
      core_bytes: of its core; 0 where it is not projected.
      here_bytes: of the core, and of the whole gradient of each use that fell back; or of the whole
        gradient, where it is not projected.
      whole_flops: of the products of its whole gradient, and of projecting it.
      here_flops: of those that `value_and_grad` takes.
    """

    path: str
    shape: tuple[int, ...]
    operations: dict[str, int]
    in_while: bool
    core: bool
    why: str
    whole_bytes: int
    core_bytes: int
    here_bytes: int
    whole_flops: int
    here_flops: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; a table when printed, which fits the screen with `rich.print`.

    Attributes:
      rows: one for each weight. In the table, those that differ by a number in their path alone
        share a line: `layers/*/mlp/up/kernel (24)`, with the sums of all of them.
    """

    rows: list[Row]

    def __str__(self) -> str:
        return table(self._cells(), numbers=len(SUMS))

    def __rich__(self) -> Any:
        """What `rich.print` and its consoles show, where rich is installed."""
        not_core = lambda row: row[2] != "core"
        return rich_table(self._cells(), len(SUMS), wrapped=(0, 1, 2), dim=not_core)

    def _cells(self) -> list[tuple[str, ...]]:
        """The table's head, its lines and the line of totals."""
        said = lambda row: (_operations(row), "core" if row.core else f"whole: {row.why}")
        sums = lambda rows: [
            human(sum(getattr(row, field) for row in rows)) for field, human in SUMS.values()
        ]
        of = lambda row: (row.shape, *said(row))
        lines = [
            (name, *said(rows[0]), *sums(rows))
            for name, rows in group_similar(self.rows, lambda row: row.path, of)
        ]
        head = ("weight", "used by", "gradient", *SUMS)
        return [head, *lines, ("total", "", "", *sums(self.rows))]


SUMS: dict[str, tuple[str, Callable[[int], str]]] = {
    "whole": ("whole_bytes", human_bytes),
    "here": ("here_bytes", human_bytes),
    "FLOPs whole": ("whole_flops", human_count),
    "FLOPs here": ("here_flops", human_count),
}


def _operations(row: Row) -> str:
    each = [name if n == 1 else f"{name} x {n}" for name, n in row.operations.items()]
    return (", ".join(each) or "nothing") + ("; of a while, one turn" if row.in_while else "")


def explain(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    has_aux: bool = False,
) -> Callable[..., Explanation]:
    """Says of every weight how a loss uses it, and what `value_and_grad` makes of its gradient.

    It reads the program as `natgalore.value_and_grad` does, with the same rules, and computes
    nothing: arrays may be `jax.ShapeDtypeStruct`, the state `jax.eval_shape(tx.init, params)`.

    Counted are the products of a hot step for the gradient of each weight, x P among them. In a
    `scan` they count as often as it turns, in a `while` once, in each branch of a `cond` once, and
    under `remat` once. What follows an operation that is not a product, and fell back, is the same
    either way and is in neither column.

    Args:
      loss_fn: as for :func:`value_and_grad`.
      tx: the optimizer.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      A function `(params, opt_state, *args, **kwargs) -> Explanation`; `print` what it returns.

    Raises:
      ValueError: when called, if the loss is no real number, or for what :func:`value_and_grad`
        refuses of a state.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
      >>> tx = natgalore.galore(1e-3, rank=16)
      >>> opt_state = jax.eval_shape(tx.init, params)
      >>> x = jax.ShapeDtypeStruct((100, 64), jnp.float32)
      >>> (row,) = natgalore.explain(loss_fn, tx)(params, opt_state, x).rows
      >>> row.whole_flops, row.here_flops  # 2·100·64·256 + 2·64·256·16, 2·100·16·(64 + 256)
      (3801088, 1024000)
    """

    def fn(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any) -> Explanation:
        leaves, treedef = jax.tree.flatten((params, opt_state, args, kwargs))
        is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
        rows: list[Row] = []

        def read(arrays):
            given = treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
            rows.extend(_rows(loss_fn, tx, has_aux, *given))

        jax.eval_shape(read, {i: x for i, x in enumerate(leaves) if is_array(x)})
        return Explanation(rows)

    return fn


def _rows(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    has_aux: bool,
    params: PyTree,
    opt_state: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Row]:
    is_subspace = lambda x: isinstance(x, SubspaceState)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_subspace) if is_subspace(x)]
    with decisions() as made:
        engines_of(tx, params, opt_state)
    check_paths(states, params)
    bases = bases_of(states)
    flat = jax.tree_util.tree_leaves_with_path(unbox(params))
    with use_mesh_of(params):
        program, form = program_of(loss_fn, params, args, kwargs)
        _check_loss(form[0] if has_aux else form)
        costs = costs_of(program, flat, bases)
    rows = []
    for path, w in flat:
        name, (P, *_) = path_name(path), bases.get(path, (None,))
        if P is None:
            decision = made.get(name, "not given to natgalore")
            why = "not projected" if isinstance(decision, LeafSpec) else decision
            rows.append(_row(name, w, costs[name], why))
        else:
            nbytes = math.prod(P.spec.core_shape) * core_dtype(P, w).itemsize
            rows.append(_projected(_row(name, w, costs[name], ""), costs[name], P.spec, nbytes))
    return rows


def _check_loss(form: Any) -> None:
    """Raises if the loss is no real number."""
    of = (getattr(form, "shape", None), getattr(form, "dtype", None))
    if of[0] != () or not jnp.issubdtype(of[1], jnp.floating):
        found = jax.tree.map(lambda x: f"{x.dtype}{[*x.shape]}", form)
        raise ValueError(f"`loss_fn` must return a real number, got {found}; see `has_aux`.")


def _row(name: str, w: Array, costs: list[Cost], why: str) -> Row:
    """The row of a weight that is not projected."""
    operations: Counter[str] = Counter()
    for each in costs:
        operations[each.operation] += each.times
    nbytes = w.size * np.dtype(w.dtype).itemsize
    flops = sum(each.whole_flops for each in costs)
    return Row(
        path=name,
        shape=tuple(w.shape),
        operations=dict(operations),
        in_while=any(each.in_while for each in costs),
        core=False,
        why=why,
        whole_bytes=nbytes,
        core_bytes=0,
        here_bytes=nbytes,
        whole_flops=flops,
        here_flops=flops,
    )


def _projected(row: Row, costs: list[Cost], spec: LeafSpec, nbytes: int) -> Row:
    """The row of a weight that is."""
    fell_back = [each for each in costs if each.fell_back]
    return dataclasses.replace(
        row,
        core=not fell_back,
        why=", ".join(dict.fromkeys(each.operation for each in fell_back)),
        core_bytes=nbytes,
        here_bytes=nbytes + sum(each.whole_bytes for each in fell_back),
        whole_flops=row.whole_flops + projecting(spec),
        here_flops=sum(each.core_flops for each in costs),
    )
