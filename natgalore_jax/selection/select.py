"""Selects the leaves to project: a LeafSpec with matrix view, side and rank for each.

The argument `select` has priority; `infer_axes.py` infers the axes of all other leaves.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import PyTree

from ..tree.leaf_spec import LeafSpec, path_name
from ..util.validation import INT32_MAX, as_float, as_int, check_int
from .infer_axes import Reading, read
from .per_leaf import Argument


Axes = int | Sequence[int]
SIDES = ("short", "long", "left", "right", "both")
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A leaf as a matrix, or a stack of matrices.

    Attributes:
      rows: the axis or axes of one side. Negative axes count from the last, so that one view fits
        both a layer and a scanned stack of layers.
      cols: the axis or axes of the other side.
      batch: the axes that count matrices (layers, experts), by default all remaining axes.
      blocks: {axis: k} for an axis of k equal blocks side by side, as in a fused query, key and
        value kernel: `MatrixView(0, 1, blocks={1: 3})` views (d, 3 d) as three d x d matrices,
        each with its own basis.

    Example:
      >>> import jax, natgalore_jax as natgalore
      >>> params = {"qkv": jax.ShapeDtypeStruct((64, 192), "float32")}
      >>> view = natgalore.MatrixView(rows=0, cols=1, blocks={1: 3})
      >>> print(natgalore.describe(natgalore.galore(1e-3, 16, select=view), params))
      leaf   shape      matrix view, or why not projected  side  rank     AdamW      here
      qkv    (64, 192)  3 x (64 x 64)                      left    16  96.0 KiB  36.0 KiB
      total                                                            96.0 KiB  36.0 KiB
    """

    rows: Axes
    cols: Axes
    batch: Axes | None = None
    blocks: Mapping[int, int] | tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name in ("rows", "cols", "batch"):
            axes = getattr(self, name)
            if axes is not None:
                axes = (axes,) if as_int(axes) is not None else axes
                object.__setattr__(self, name, _integers(name, axes))
        try:
            blocks = self.blocks.items() if isinstance(self.blocks, Mapping) else self.blocks
            blocks = sorted((operator.index(axis), operator.index(k)) for axis, k in blocks)
        except (TypeError, ValueError):
            raise TypeError(
                "`blocks` of a MatrixView must be {axis: number of equal blocks}, got "
                f"{self.blocks!r}."
            ) from None
        object.__setattr__(self, "blocks", tuple(blocks))


def _integers(name: str, axes: Any) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, axes))
    except TypeError:
        message = f"`{name}` of a MatrixView must be an axis or axes, got {axes!r}."
        raise TypeError(message) from None


VIEWS = (MatrixView, optax.contrib.GaLoreDimensionNumbers, optax.contrib.MuonDimensionNumbers)
View = MatrixView | optax.contrib.GaLoreDimensionNumbers | optax.contrib.MuonDimensionNumbers
Rules = Sequence[tuple[str, Any]]
Select = View | Rules | PyTree | Callable[[PyTree], PyTree] | None
Rank = int | float | Rules | PyTree | Callable[[PyTree], PyTree]


def _is_view(x: Any) -> bool:
    return x is None or isinstance(x, VIEWS) or (isinstance(x, str) and x == AUTO)


def _as_rank(x: Any) -> int | float | None:
    """`x` as an int of at least 1 or a fraction in (0, 1]; None if it is neither."""
    integer, fraction = as_int(x), as_float(x)
    if integer is not None:
        return integer if 1 <= integer <= INT32_MAX else None
    return fraction if isinstance(fraction, float) and 0 < fraction <= 1 else None


def _is_rank(x: Any) -> bool:
    return _as_rank(x) is not None


SELECT = Argument(
    "select",
    _is_view,
    "a MatrixView, Optax's GaLoreDimensionNumbers or MuonDimensionNumbers, None (not projected) or "
    "'auto'",
    default=AUTO,
)
RANK = Argument("rank", _is_rank, "an int of at least 1 or a fraction in (0, 1]", default=None)


def check_rank(rank: Any) -> Any:
    """Returns one number as an int or float in range; rules and trees are checked at init."""
    if as_int(rank) is None and isinstance(as_float(rank), float):
        return as_float(RANK.checked(rank))
    if rank is None or (not callable(rank) and jax.tree_util.all_leaves([rank])):
        return check_int("rank", rank, minimum=1)
    return rank


def check_arrays(params: PyTree) -> None:
    """Raises TypeError if a leaf of `params` is not an array, as in an unfiltered Equinox model."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"The leaf {path_name(path)!r} of the params is not an array but of type "
                f"{type(leaf).__name__!r}: give arrays only, such as "
                "`eqx.filter(model, eqx.is_array)` of an Equinox model."
            )


def select(
    params: PyTree,
    rank: Rank,
    side: str = "short",
    chosen: Select = None,
    axis_names: Mapping[str, Sequence[str | None]] | None = None,
) -> tuple[PyTree, dict[str, str]]:
    """The LeafSpec of every projected leaf, and the reason for every other leaf.

    Args:
      params: a tree of arrays, or of anything with a shape and a dtype.
      rank: see :func:`project`.
      side: one of `SIDES`.
      chosen: `select` of :func:`project`.
      axis_names: the names of a leaf's axes, by the name of the leaf, where they are known.

    Returns:
      A tree like `params` with a LeafSpec at each projected leaf and None elsewhere, and a dict
      from the names of the other leaves to the reasons why they are not projected.

    Raises:
      ValueError: if a rule matches no leaf, or a view does not fit its leaf.
      TypeError: if a leaf is not an array.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    check_arrays(params)
    views = SELECT.per_leaf(AUTO if chosen is None else chosen, params)
    ranks = RANK.per_leaf(rank, params)
    names = [(axis_names or {}).get(path_name(path)) for path, _ in leaves]
    automatic = read([(path, tuple(leaf.shape)) for path, leaf in leaves], names)
    specs: list[LeafSpec | None] = []
    reasons: dict[str, str] = {}
    index = 0
    for (path, leaf), view, r, reading in zip(leaves, views, ranks, automatic, strict=True):
        spec = _spec(path, leaf, view, reading)
        if isinstance(spec, LeafSpec):
            spec = _oriented(spec, _as_rank(r), side, index)
            index += spec.matrices
        else:
            reasons[path_name(path)] = spec
        specs.append(spec if isinstance(spec, LeafSpec) else None)
    return treedef.unflatten(specs), reasons


def _spec(path: tuple, leaf: Any, view: Any, reading: Reading | str) -> LeafSpec | str:
    """The LeafSpec of a leaf, without side and rank yet, or the reason why it has none."""
    shape = tuple(leaf.shape)
    if view is None:
        return "excluded by `select`"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"not real floating point ({leaf.dtype})"
    if view != AUTO:
        return _viewed(path, shape, view)
    if isinstance(reading, str):
        return reading
    batch, rows, cols, guess = reading
    return LeafSpec(path, shape, batch, rows, cols, rank=0, guess=guess)


def _viewed(path: tuple, shape: tuple[int, ...], view: View) -> LeafSpec:
    """The LeafSpec of a view given by the user."""
    if not isinstance(view, MatrixView):
        view = MatrixView(view.reduction_axis, view.output_axis)
    error = lambda reason: ValueError(
        f"`select` views {path_name(path)!r}, of shape {shape}, as {view}, but {reason}."
    )
    nonnegative = lambda axes: tuple(range(len(shape))[axis] for axis in axes)
    try:
        rows, cols = nonnegative(view.rows), nonnegative(view.cols)
        batch = None if view.batch is None else nonnegative(view.batch)
        blocks = {nonnegative((axis,))[0]: count for axis, count in view.blocks}
    except IndexError:
        raise error(f"it has {len(shape)} axes") from None
    named = (*rows, *cols, *(batch or ()))
    remaining = tuple(axis for axis in range(len(shape)) if axis not in named)
    if len(set(named)) < len(named) or not rows or not cols or (batch is not None and remaining):
        raise error("each axis must be named once, and each side needs at least one axis")
    if 0 in shape:
        raise error("it is empty")
    batch = remaining if batch is None else batch
    for axis, count in blocks.items():
        if axis in batch or count < 1 or shape[axis] % count:
            raise error(f"axis {axis} cannot be split into {count} equal blocks")
    return _split(LeafSpec(path, shape, batch, rows, cols, rank=0), blocks)


def _split(spec: LeafSpec, blocks: dict[int, int]) -> LeafSpec:
    """The spec with every axis of `blocks` split in two: (blocks, size), the first a batch axis."""
    sizes: list[int] = []
    new_axis: dict[int, int] = {}
    block_axes: list[int] = []
    for axis, size in enumerate(spec.shape):
        if axis in blocks:
            block_axes.append(len(sizes))
            sizes.append(blocks[axis])
        new_axis[axis] = len(sizes)
        sizes.append(size // blocks.get(axis, 1))
    renumbered = lambda axes: tuple(new_axis[axis] for axis in axes)
    return dataclasses.replace(
        spec,
        batch=(*renumbered(spec.batch), *block_axes),
        rows=renumbered(spec.rows),
        cols=renumbered(spec.cols),
        split=tuple(sizes) if block_axes else (),
    )


def _oriented(spec: LeafSpec, rank: int | float | None, side: str, index: int) -> LeafSpec:
    """The spec with rank and index, and the projected side as rows; a square is not transposed."""
    if rank is None:
        raise ValueError(
            f"`rank` has no rule for {spec.name!r}: end the list with a rule for all leaves, "
            "such as ('', 128)."
        )
    transpose = {"short": spec.m > spec.n, "long": spec.m < spec.n, "right": True}.get(side, False)
    spec = spec.transposed if transpose else spec
    short = min(spec.m, spec.n)
    rank = max(1, round(rank * short)) if isinstance(rank, float) else min(rank, short)
    return dataclasses.replace(spec, rank=rank, index=index, both=side == "both")
