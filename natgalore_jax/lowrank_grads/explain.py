"""Reports how a loss uses each weight, and which gradients `value_and_grad` forms as cores."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core as jax_core
from jaxtyping import Array, PyTree

from ..sharding.array_partitions import use_mesh_of
from ..subspace.projection import core_dtype, expand_bases
from ..subspace.state import Bases, bases_in, bases_of, decisions_of, subspace_states
from ..tree.cores import Basis
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec, path_name
from ..util.text_tables import group_similar, human_bytes, rich_table, table
from .interpreter import Use, as_arrays, evaluate
from .loss import program_of
from .tangent_weight import TangentWeight, reshape, tag
from .value_and_grad import check_states


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight in an :class:`Explanation`.

    Attributes:
      path: name of the weight.
      shape: shape of the weight.
      operations: operations that use it, with their number of executions in a step.
      in_while: whether one of them is in a `while`, where one iteration is counted.
      core: whether its gradient is a core and no use of it falls back.
      reason: the operations that fall back, or why it is not projected; empty if `core`.
      full_bytes: bytes of its full gradient.
      core_bytes: bytes of its core; 0 if it is not projected.
      formed_bytes: bytes of the gradients formed: its core, and the full gradient of each use that
        falls back; its full gradient if it is not projected.
    """

    path: str
    shape: tuple[int, ...]
    operations: dict[str, int]
    in_while: bool
    core: bool
    reason: str
    full_bytes: int
    core_bytes: int
    formed_bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Result of :func:`explain`; prints as a table, with `rich.print` fitted to the screen.

    Attributes:
      rows: one per weight. In the table, weights whose paths differ only by a number share a line,
        `layers/*/mlp/up/kernel (24)`, with their bytes added up.
    """

    rows: list[Row]

    def __str__(self) -> str:
        return table(self._cells(), numbers=2)

    def __rich__(self) -> Any:
        """The table for `rich.print`."""
        return rich_table(self._cells(), 2, wrapped=(0, 1, 2), dim=lambda row: row[2] != "core")

    def _cells(self) -> list[tuple[str, ...]]:
        """Head, lines and totals of the table."""
        text = lambda row: (_operations(row), "core" if row.core else f"full: {row.reason}")
        sums = lambda rows: (
            human_bytes(sum(row.full_bytes for row in rows)),
            human_bytes(sum(row.formed_bytes for row in rows)),
        )
        body = [
            (name, *text(rows[0]), *sums(rows))
            for name, rows in group_similar(
                self.rows, lambda row: row.path, lambda row: (row.shape, *text(row))
            )
        ]
        head = ("weight", "used by", "gradient", "full", "formed")
        return [head, *body, ("total", "", "", *sums(self.rows))]


def _operations(row: Row) -> str:
    """Cell of the operations, such as `gather, dot_general x 24`."""
    each = [name if n == 1 else f"{name} x {n}" for name, n in row.operations.items()]
    return (", ".join(each) or "nothing") + ("; one iteration of a while" if row.in_while else "")


def explain(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    has_aux: bool = False,
) -> Callable[..., Explanation]:
    """Reports for each weight how a loss uses it, and whether its gradient is formed as a core.

    The loss is evaluated abstractly by the rules of :func:`value_and_grad`; nothing is computed.
    Arrays may be `jax.ShapeDtypeStruct`, and the state `jax.eval_shape(tx.init, params)`.

    An operation in a `scan` counts once per iteration, in a `while` once, in each branch of a
    `cond` once, under `remat` once. Bytes of a use that falls back in a loop are of one iteration.

    Args:
      loss_fn: as for :func:`value_and_grad`.
      tx: the optimizer.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      A function `(params, opt_state, *args, **kwargs) -> Explanation`, which prints as a table.

    Raises:
      ValueError: when called, if the loss is not a real number, or if :func:`value_and_grad`
        refuses the state.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
      >>> tx = natgalore.galore(1e-3, rank=16)
      >>> opt_state = jax.eval_shape(tx.init, params)
      >>> x = jax.ShapeDtypeStruct((100, 64), jnp.float32)
      >>> (row,) = natgalore.explain(loss_fn, tx)(params, opt_state, x).rows
      >>> row.operations, row.core
      ({'dot_general': 1}, True)
      >>> row.full_bytes, row.formed_bytes  # 4·64·256, 4·16·256
      (65536, 16384)
    """

    def fn(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any) -> Explanation:
        leaves, treedef = jax.tree.flatten((params, opt_state, args, kwargs))
        is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
        rows: list[Row] = []

        def trace(arrays):  # other leaves, such as a string argument, stay static
            arguments = treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
            rows.extend(_rows(loss_fn, tx, has_aux, *arguments))

        jax.eval_shape(trace, {i: x for i, x in enumerate(leaves) if is_array(x)})
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
    check_states(opt_state, params)
    states = subspace_states(opt_state)
    _, decisions = decisions_of(tx, params)
    if any(decisions.get(P.spec.name) != P.spec for x in states for P in bases_in(x.basis)):
        raise ValueError("`opt_state` is not a state of `tx`: their projections differ.")
    bases = bases_of(states)
    leaves = jax.tree_util.tree_leaves_with_path(unbox(params))
    with use_mesh_of(params):
        program, outputs = program_of(loss_fn, params, args, kwargs)
        _check_loss(outputs[0] if has_aux else outputs)
        uses = _uses(program, leaves, bases)
    rows = []
    for path, w in leaves:
        name = path_name(path)
        decision = decisions.get(name, "not passed to natgalore")
        reason = "not projected" if isinstance(decision, LeafSpec) else decision
        rows.append(_row(name, w, uses[name], bases.get(path, ()), reason))
    return rows


def _check_loss(loss: Any) -> None:
    """Raises if the loss is not a real number."""
    shape, dtype = getattr(loss, "shape", None), getattr(loss, "dtype", None)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        found = jax.tree.map(lambda x: f"{x.dtype}{[*x.shape]}", loss)
        raise ValueError(f"`loss_fn` must return a real number, got {found}; see `has_aux`.")


def _uses(
    program: jax_core.ClosedJaxpr, leaves: Sequence[tuple[Any, Array]], bases: Bases
) -> dict[str, list[Use]]:
    """The uses of each leaf in a program, by the leaf's name.

    Args:
      program: program of the leaves; its first output is the loss.
      leaves: paths and traced arrays.
      bases: bases of the projected leaves.
    """
    found: dict[Any, Use] = {}

    def report(use: Use):  # JAX may trace the body of a loop twice: each place counts once
        found[*map(id, use.enclosing), id(use.eqn), use.operand] = use

    for projected in (True, False):  # two passes: a product of two TangentWeights has no rule
        values = [
            _tagged(path, w, bases.get(path, ())) if (path in bases) == projected else w
            for path, w in leaves
        ]
        as_arrays(evaluate(program, values, report)[:1], None, report)
    uses: dict[str, list[Use]] = {path_name(path): [] for path, _ in leaves}
    for use in found.values():
        uses[use.weight.name].append(use)
    return uses


def _tagged(path: tuple[Any, ...], w: Array, sides: Sequence[Basis]) -> TangentWeight:
    """The weight W + P B Qᵀ; without bases W + B, so that its uses are reported too."""
    if sides:
        P, *_ = sides
        dtype, stored = core_dtype(P.value, w), tuple(side.value for side in sides)
        bases = expand_bases(P.spec.unnamed, dtype, stored)
        return tag(P.spec, w, jnp.zeros(P.spec.core_shape, dtype), *bases)
    labels = tuple(range(w.ndim))
    axes = tuple((label,) for label in labels)
    v = TangentWeight(w, jnp.zeros_like(w), (), axes, labels, (), path_name(path))
    v = reshape(v, w.shape)  # axes of length 1 lose their labels
    assert v is not None
    return v


def _row(name: str, w: Array, uses: list[Use], sides: Sequence[Basis], reason: str) -> Row:
    """The row of one weight; `reason` is why it is not projected."""
    operations: Counter[str] = Counter()
    for use in uses:
        operations[use.operation] += _times(use)
    fell_back = [use for use in uses if use.fell_back]
    full_bytes = formed_bytes = _nbytes(w)
    core_bytes = 0
    if sides:
        P, *_ = sides
        core_bytes = math.prod(P.spec.core_shape) * core_dtype(P.value, w).itemsize
        formed_bytes = core_bytes + sum(_nbytes(use.weight.weight) for use in fell_back)
        reason = ", ".join(dict.fromkeys(use.operation for use in fell_back))
    return Row(
        path=name,
        shape=tuple(w.shape),
        operations=dict(operations),
        in_while=any(_is_in(use, "while") for use in uses),
        core=bool(sides) and not fell_back,
        reason=reason,
        full_bytes=full_bytes,
        core_bytes=core_bytes,
        formed_bytes=formed_bytes,
    )


def _times(use: Use) -> int:
    """Executions in a step: the product of the lengths of the scans around the operation."""
    scans = [eqn for eqn in use.enclosing if eqn.primitive.name == "scan"]
    return math.prod(eqn.params["length"] for eqn in scans)


def _is_in(use: Use, primitive: str) -> bool:
    return any(eqn.primitive.name == primitive for eqn in use.enclosing)


def _nbytes(x: Array) -> int:
    return x.size * np.dtype(x.dtype).itemsize
