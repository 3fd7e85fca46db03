"""Reports how an optimizer projects each leaf of the params, read from the optimizer itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ..selection.select import check_arrays
from ..subspace.state import decisions_of, subspace_states
from ..tree.flax_boxes import axis_names
from ..tree.leaf_spec import LeafSpec, path_name
from ..util.text_tables import group_similar, human_bytes, rich_table, table
from .diagnostics import explained_energy, fisher_condition, skipped_steps
from .memory_report import bytes_by_leaf


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of the params in a :class:`Description`.

    Attributes:
      path: name of the leaf.
      shape: shape of the leaf.
      view: its matrix view, such as `3 x (64 x 256)` for three matrices, or the reason why it is
        not projected.
      side: the projected side of the stored matrix: `left` (its leading axes), `right` or `both`.
      rank: r, or None.
      full: whether r is the full short side, because the requested rank was at least that.
      adamw_bytes: bytes of its `optax.adamw` state: two moments in the leaf's dtype.
      state_bytes: bytes of its state in this optimizer.
      measured: columns measured from a state (see :func:`describe`): one number per matrix.
    """

    path: str
    shape: tuple[int, ...]
    view: str
    side: str
    rank: int | None
    full: bool
    adamw_bytes: int
    state_bytes: int
    measured: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Description:
    """Result of :func:`describe`; prints as a table, with `rich.print` fitted to the screen.

    Attributes:
      rows: one per leaf. In the table, leaves whose paths differ only by a number share a line,
        `layers/*/mlp/up/kernel (24)`, with their bytes added up.
    """

    rows: list[Row]

    def __str__(self) -> str:
        cells = self._cells()
        return table(cells, numbers=len(cells[0]) - 4)

    def __rich__(self) -> Any:
        """The table for `rich.print`."""
        cells = self._cells()
        without_rank = lambda row: not row[4]
        return rich_table(cells, len(cells[0]) - 4, wrapped=(0, 2), dim=without_rank)

    def _cells(self) -> list[tuple[str, ...]]:
        """Head, lines and totals of the table."""
        head = (
            "leaf",
            "shape",
            "matrix view, or why not projected",
            "side",
            "rank",
            "AdamW",
            "here",
            *MEASURED,
        )
        rank = lambda row: (
            "" if row.rank is None else f"{row.rank} (full)" if row.full else str(row.rank)
        )
        text = lambda row: (str(row.shape), row.view, row.side, rank(row))
        body = [
            (
                name,
                *text(rows[0]),
                human_bytes(sum(row.adamw_bytes for row in rows)),
                human_bytes(sum(row.state_bytes for row in rows)),
                *(_measured(rows, name) for name in MEASURED),
            )
            for name, rows in group_similar(self.rows, lambda row: row.path, text)
        ]
        adamw = sum(row.adamw_bytes for row in self.rows)
        state = sum(row.state_bytes for row in self.rows)
        total = ("total", "", "", "", "", human_bytes(adamw), human_bytes(state))
        rows = [head, *body, (*total, *[""] * len(MEASURED))]
        is_measured = lambda name: any(name in row.measured for row in self.rows)
        visible = [i for i, name in enumerate(head) if name not in MEASURED or is_measured(name)]
        return [tuple(row[i] for i in visible) for row in rows]


def _measured(rows: list[Row], name: str) -> str:
    """Cell of a measured column, for rows that share a line."""
    values = [np.ravel(row.measured[name]) for row in rows if name in row.measured]
    return MEASURED[name](np.concatenate(values)) if values else ""


def _span(values: np.ndarray, spec: str) -> str:
    """The range of values, such as `0.42-0.57`; one number if both ends print the same."""
    ends = [format(float(x), spec) for x in (values.min(), values.max())]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)


MEASURED: dict[str, Callable[[np.ndarray], str]] = {
    "energy": lambda values: _span(values, ".2f"),
    "condition": lambda values: _span(values, ".0e"),
    "skipped": lambda values: str(int(values.sum())),
}


def describe(
    tx: optax.GradientTransformation,
    params: PyTree,
    state: PyTree = None,
    grads: PyTree = None,
) -> Description:
    """Reports for each leaf whether `tx` projects it, as which matrices, and the bytes saved.

    Runs `tx.init` on shapes, so the report always matches the optimizer.

    Args:
      tx: an optimizer that contains a `natgalore.project`.
      params: a tree of arrays or of `jax.ShapeDtypeStruct`, of any size: nothing is allocated.
      state: a state of `tx`; adds columns for the condition number of each Fisher
        (:func:`fisher_condition`) and the skipped steps (:func:`skipped_steps`). Shapes, as from
        `jax.eval_shape(tx.init, params)`, add nothing.
      grads: full gradients; adds the share of their energy inside the bases of `state`
        (:func:`explained_energy`).

    Returns:
      A :class:`Description`; `print` it.

    Raises:
      ValueError: if `tx` contains no projection, if `grads` come without a `state`, or if they are
        the cores of :func:`value_and_grad`.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((256, 64), jnp.float32)}}
      >>> print(describe(natgalore.galore(1e-3, rank=16), params))
      leaf       shape      matrix view, or why not projected  side   rank      AdamW      here
      up/kernel  (256, 64)  64 x 256                           right    16  128.0 KiB  36.0 KiB
      total                                                                 128.0 KiB  36.0 KiB
    """
    if grads is not None and (state is None or _is_abstract((state, grads))):
        raise ValueError(
            "`grads` are measured against the bases of `state`: pass `state` too, both as arrays."
        )
    measured: dict[str, dict[str, Any]] = {}
    if state is not None and not _is_abstract(state):
        measured["condition"] = fisher_condition(state)
        measured["skipped"] = skipped_steps(state)
    if grads is not None:
        measured["energy"] = explained_energy(state, grads)
    check_arrays(params)
    state, decisions = decisions_of(tx, params)
    if not subspace_states(state):
        raise ValueError("`tx` contains no natgalore.project: there is nothing to describe.")
    axes = axis_names(params)
    state_bytes = bytes_by_leaf(state, params)
    adamw_bytes = bytes_by_leaf(jax.eval_shape(optax.adamw(0.0).init, params), params)
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        decision = decisions.get(name, "not given to natgalore")
        spec = decision if isinstance(decision, LeafSpec) else None
        rows.append(
            Row(
                path=name,
                shape=tuple(leaf.shape),
                view=decision if spec is None else _view(spec, axes.get(name)),
                side="" if spec is None else _side(spec),
                rank=None if spec is None else spec.rank,
                full=spec is not None and spec.rank == min(spec.m, spec.n),
                adamw_bytes=adamw_bytes[name],
                state_bytes=state_bytes[name],
                measured={k: np.asarray(v[name]) for k, v in measured.items() if name in v},
            )
        )
    return Description(rows)


def _is_abstract(tree: PyTree) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _view(spec: LeafSpec, names: Sequence[str | None] | None) -> str:
    """`24 x (2048 x 16·128)`, each axis with its name if it has one."""
    if not names or spec.split or len(names) != len(spec.shape):
        names = [None] * len(spec.sizes)
    one = lambda axis: f"{names[axis]} {spec.sizes[axis]}" if names[axis] else f"{spec.sizes[axis]}"
    product = lambda axes: "·".join(
        one(axis) for axis in axes if spec.sizes[axis] > 1 or names[axis]
    )
    matrix = f"{product(spec.rows) or 1} x {product(spec.cols) or 1}"
    stack = product(spec.batch)
    view = f"{stack} x ({matrix})" if stack else matrix
    return f"{view}, a guess" if spec.guess else view


def _side(spec: LeafSpec) -> str:
    return "both" if spec.both else "left" if spec.rows < spec.cols else "right"
