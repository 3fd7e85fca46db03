"""What an optimizer does with each leaf of a tree, told from the state itself."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ..selection.select import decisions
from ..subspace.engine import SubspaceState
from ..tree.leaf_spec import LeafSpec, path_name
from ..util.text_tables import group_similar, human_bytes, rich_table, table
from .diagnostics import explained_energy, fisher_condition, skipped_steps
from .memory_report import bytes_by_leaf


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of the params in a :class:`Description`.

    Attributes:
      path: its name.
      shape: its shape.
      view: how it is seen, `3 x (64 x 256)` for three matrices, or why it is not projected.
      side: which side of the stored matrix is projected, `left` (its leading axes), `right` or
        `both`.
      rank: r, or None.
      full: whether r is the whole short side, because as much or more was asked for.
      adamw_bytes: what `optax.adamw` keeps for it: two moments in its own dtype.
      state_bytes: what this optimizer keeps for it.
      measured: what its state says, by column (see :func:`describe`): one number a matrix.
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
    """What :func:`describe` found; a table when printed, which fits the screen with `rich.print`.

    Attributes:
      rows: one for each leaf. In the table, leaves that differ by a number in their path alone
        share a line: `layers/*/mlp/up/kernel (24)`, with the bytes of all of them.
    """

    rows: list[Row]

    def __str__(self) -> str:
        cells = self._cells()
        return table(cells, numbers=len(cells[0]) - 4)

    def __rich__(self) -> Any:
        """What `rich.print` and its consoles show, where rich is installed."""
        cells = self._cells()
        without_rank = lambda row: not row[4]
        return rich_table(cells, len(cells[0]) - 4, wrapped=(0, 2), dim=without_rank)

    def _cells(self) -> list[tuple[str, ...]]:
        """The table's head, its lines and the line of totals."""
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
        said = lambda row: (str(row.shape), row.view, row.side, rank(row))
        body = [
            (
                name,
                *said(rows[0]),
                human_bytes(sum(row.adamw_bytes for row in rows)),
                human_bytes(sum(row.state_bytes for row in rows)),
                *(_measured(rows, name) for name in MEASURED),
            )
            for name, rows in group_similar(self.rows, lambda row: row.path, said)
        ]
        before, after = (
            sum(getattr(row, f) for row in self.rows) for f in ("adamw_bytes", "state_bytes")
        )
        total = ("total", "", "", "", "", human_bytes(before), human_bytes(after))
        rows = [head, *body, (*total, *[""] * len(MEASURED))]
        shown = [i for i, name in enumerate(head) if name not in MEASURED or self._has(name)]
        return [tuple(row[i] for i in shown) for row in rows]

    def _has(self, name: str) -> bool:
        return any(name in row.measured for row in self.rows)


def _measured(rows: list[Row], name: str) -> str:
    """A measured column's cell of rows that share a line."""
    values = [np.ravel(row.measured[name]) for row in rows if name in row.measured]
    return MEASURED[name](np.concatenate(values)) if values else ""


def _span(values: np.ndarray, spec: str) -> str:
    """The smallest and the largest, or the one number."""
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
    """Says of every leaf whether `tx` projects it, as which matrices, and what that saves.

    Listens to `tx` while it makes its state, so it cannot disagree with it.

    Args:
      tx: an optimizer with a `natgalore.project` somewhere in it.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`, of any size: nothing is allocated.
      state: of `tx`, to have its health in the table: the condition of the Fishers
        (:func:`fisher_condition`) and the steps skipped (:func:`skipped_steps`).
      grads: gradients, to have the share that the bases of `state` hold (:func:`explained_energy`).

    Returns:
      A :class:`Description`; `print` it.

    Raises:
      ValueError: if `tx` has no projection in it, or there are `grads` without a `state`.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((256, 64), jnp.float32)}}
      >>> print(describe(natgalore.galore(1e-3, rank=16), params))
      leaf       shape      matrix view, or why not projected  side   rank      AdamW      here
      up/kernel  (256, 64)  64 x 256                           right    16  128.0 KiB  36.0 KiB
      total                                                                 128.0 KiB  36.0 KiB
    """
    if grads is not None and state is None:
        raise ValueError("`grads` are measured against the bases of `state`: give it too.")
    measured: dict[str, dict[str, Any]] = {}
    if state is not None:
        measured["condition"] = fisher_condition(state)
        measured["skipped"] = skipped_steps(state)
    if grads is not None:
        measured["energy"] = explained_energy(state, grads)
    with warnings.catch_warnings(), decisions() as made:
        warnings.filterwarnings("ignore", "natgalore projects none")  # the table says why
        state = jax.eval_shape(lambda params: tx.init(params), params)  # traced, not remembered
    is_subspace = lambda x: isinstance(x, SubspaceState)
    if not any(map(is_subspace, jax.tree.leaves(state, is_leaf=is_subspace))):
        raise ValueError("`tx` has no natgalore.project in it: there is nothing to describe.")
    axes = _axis_names(params)
    held, own = (
        bytes_by_leaf(state, params),
        bytes_by_leaf(jax.eval_shape(optax.adamw(0.0).init, params), params),
    )
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        decision = made.get(name, "not given to natgalore")
        spec = decision if isinstance(decision, LeafSpec) else None
        rows.append(
            Row(
                path=name,
                shape=tuple(leaf.shape),
                view=decision if spec is None else _view(spec, axes.get(name)),
                side="" if spec is None else _side(spec),
                rank=None if spec is None else spec.rank,
                full=spec is not None and spec.rank == min(spec.m, spec.n),
                adamw_bytes=own[name],
                state_bytes=held[name],
                measured={k: np.asarray(v[name]) for k, v in measured.items() if name in v},
            )
        )
    return Description(rows)


def _axis_names(params: PyTree) -> dict[str, tuple[str | None, ...]]:
    """The names that a box around a leaf gives its axes: Linen's `with_partitioning`, NNX's own."""

    def names(box):
        for field in ("names", "out_sharding"):
            found = getattr(box, field, None)
            if isinstance(found, tuple) and all(isinstance(x, str | None) for x in found):
                return found
        return None

    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: names(x) is not None)
    return {path_name(path): found for path, box in boxes if (found := names(box))}


def _view(spec: LeafSpec, names: Sequence[str | None] | None) -> str:
    """`24 x (2048 x 16·128)`, each axis with its name where it has one."""
    if not names or spec.split or len(names) != len(spec.shape):
        names = [None] * len(spec.sizes)
    one = lambda axis: f"{names[axis]} {spec.sizes[axis]}" if names[axis] else f"{spec.sizes[axis]}"
    several = lambda axes: "·".join(
        one(axis) for axis in axes if spec.sizes[axis] > 1 or names[axis]
    )
    matrix = f"{several(spec.rows) or 1} x {several(spec.cols) or 1}"
    stack = several(spec.batch)
    view = f"{stack} x ({matrix})" if stack else matrix
    return f"{view}, a guess" if spec.guess else view


def _side(spec: LeafSpec) -> str:
    return "both" if spec.both else "left" if spec.rows < spec.cols else "right"
