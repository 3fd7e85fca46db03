"""Infers the batch, row and column axes of every leaf of a parameter tree.

Names of axes, which a Flax box or a Haliax NamedArray has, decide where they are known: layers and
experts are batch axes, heads are one side. For all other axes there are three kinds of evidence:
  * the *words* of a leaf's path give its purpose. Embeddings, output heads, norms, biases, routers,
    position tables and similar leaves are never projected;
  * its *siblings* give the layer axes. In a scanned stack even the vector of a norm has two axes,
    and all leaves share the size of one;
  * *sizes* give the two sides of an array of three axes or more. A bias has the shape of the output
    side, a norm the width of the model.

Where two readings fit, or none, the matrices are kept small: the last two axes are the matrix and
the axes before them are batch axes. Such a reading has `guess=True`, which `describe` shows.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..tree.leaf_spec import path_name, unboxed_path
from .name_rules import (
    BIAS,
    DEPTHWISE,
    EXPERT_AXIS,
    EXPERTS,
    FEATURE_AXIS,
    FUSED,
    FUSED_AXIS,
    HEAD,
    HEAD_AXIS,
    INTO_HEADS,
    ROUTER,
    VOCABULARY_AXIS,
    Leaf,
)
from .tree_evidence import Tree


SMALLEST_SIDE = 8  # a matrix with a smaller side is not projected

LARGEST_FUSED = 4  # most projections on an axis of their own
LARGEST_KERNEL = 16  # largest spatial extent of a convolution kernel


class Reading(NamedTuple):
    """The axes of a leaf seen as a stack of matrices.

    Attributes:
      batch: axes that count matrices.
      rows: axes of the leading side.
      cols: axes of the other side.
      guess: whether the two sides were chosen without evidence.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    guess: bool = False


def read(
    named_shapes: Sequence[tuple[tuple[Any, ...], tuple[int, ...]]],
    axis_names: Sequence[Sequence[str | None] | None] | None = None,
) -> list[Reading | str]:
    """The reading of each leaf, or the reason why it is not projected.

    Args:
      named_shapes: path, as `jax.tree_util` spells it, and shape of every leaf of a tree.
      axis_names: for each leaf the names of its axes, or None if it has none.
    """
    paths = [unboxed_path(path) for path, _ in named_shapes]
    if {path_name(path[-1:]) for path in paths} in ({"value"}, {"array"}):
        paths = [path[:-1] for path in paths]  # a last key that all leaves share is a box
    shapes = [shape for _, shape in named_shapes]
    axis_names = axis_names or [None] * len(paths)
    leaves = [Leaf(*x) for x in zip(paths, shapes, axis_names, strict=True)]
    names = {path_name(leaf.path) for leaf in leaves}
    for leaf in leaves:  # Haiku: `gating_b` beside `gating_w` is a bias, `wq_b` alone is not
        name = path_name(leaf.path)
        if name.endswith("_b") and f"{name[:-1]}w" in names:
            leaf.kind = BIAS
    tree = Tree(leaves)
    return [_read(leaf, tree) for leaf in leaves]


def _read(leaf: Leaf, tree: Tree) -> Reading | str:
    if 0 in leaf.shape:
        return f"empty {leaf.shape}"
    stack = tree.stack_axes(leaf)
    batch = tuple(a for a, size in enumerate(leaf.shape) if a in stack or size == 1)
    rest = tuple(a for a in range(len(leaf.shape)) if a not in batch)
    if kind := leaf.kind or _kind_by_axes(leaf, rest) or tree.kind_by_size(leaf, rest):
        return kind
    if len(rest) > 2:
        counted = {a for a in rest if _counts_matrices(leaf, a)}
        stack, batch = (tuple(sorted({*axes, *counted})) for axes in (stack, batch))
        rest = tuple(a for a in rest if a not in counted)
    if len(rest) < 2:
        return "a vector"
    reading = _convolution(leaf, stack) or _fold(leaf, batch, rest, tree)
    if isinstance(reading, str):
        return reading
    m, n = (_product(leaf.shape, side) for side in (reading.rows, reading.cols))
    if min(m, n) < SMALLEST_SIDE:
        return f"too small ({min(m, n)} x {max(m, n)})"
    return reading


def _counts_matrices(leaf: Leaf, axis: int) -> bool:
    """Whether an axis counts experts or fused projections, by its name."""
    kind, size = leaf.axes[axis], leaf.shape[axis]
    return kind == EXPERT_AXIS or (kind == FUSED_AXIS and size <= LARGEST_FUSED)


def _kind_by_axes(leaf: Leaf, rest: tuple[int, ...]) -> str | None:
    """HEAD or ROUTER, by the names of a matrix's axes; else None."""
    kinds = {leaf.axes[axis] for axis in rest}
    if len(rest) != 2:
        return None
    if VOCABULARY_AXIS in kinds:
        return HEAD
    return ROUTER if kinds == {EXPERT_AXIS, FEATURE_AXIS} else None


def _convolution(leaf: Leaf, stack: Collection[int]) -> Reading | str | None:
    """Reading of a convolution kernel: (*space, in, out) in Flax, (out, in, *space) in PyTorch."""
    axes = [a for a in range(len(leaf.shape)) if a not in stack]
    sizes = [leaf.shape[a] for a in axes]
    if len(axes) < (3 if leaf.convolves else 4):
        return None
    space = len(axes) - 2
    leading, trailing = max(sizes[:space]), max(sizes[-space:])
    if min(leading, trailing) > LARGEST_KERNEL:
        return None
    window = sizes[:space] if leading <= trailing else sizes[-space:]
    if not leaf.convolves and (leaf.attends or leaf.role or len(set(window)) > 1):
        return None  # without the name, only a square window is evidence of a convolution
    if leading <= trailing:
        spatial, (fan_in, fan_out) = axes[:space], axes[space:]
    else:
        spatial, (fan_out, fan_in) = axes[-space:], axes[:2]
    if 1 in (leaf.shape[fan_in], leaf.shape[fan_out]) and _product(leaf.shape, spatial) > 1:
        return DEPTHWISE
    contracted = tuple(sorted((*spatial, fan_in)))
    rows, cols = sorted([contracted, (fan_out,)])
    return Reading(tuple(stack), rows, cols)


def _fold(leaf: Leaf, batch: tuple[int, ...], rest: tuple[int, ...], tree: Tree) -> Reading:
    """Splits the axes `rest`, which count no layers, into two sides."""
    # Two or three projections may be stacked on an axis: gate and up; query, key and value.
    attention = tree.in_attention(leaf)
    unknown = [a for a in rest[:-1] if leaf.axes[a] is None]
    fused = next((a for a in unknown if leaf.shape[a] in (2, 3)), None)
    if attention:
        stacked = FUSED & set(leaf.near) and len(rest) + sum(leaf.shape[a] == 1 for a in batch) > 3
    else:
        stacked = len(rest) == 3
    if fused is not None and stacked:
        batch = tuple(sorted((*batch, fused)))
        rest = tuple(a for a in rest if a != fused)
    if len(rest) == 2:
        return Reading(batch, rest[:1], rest[1:])
    side = _head_side(leaf, rest)
    expert_bias = not attention and tree.has_expert_bias(leaf, rest)
    by_bias = tree.output_side(leaf, rest)
    if side is None and not expert_bias:
        side = by_bias
    if side is None and attention:
        side = tree.width_axis(leaf, rest)
        if side is None and leaf.role is not None:
            side = rest[:1] if leaf.role is INTO_HEADS else rest[-1:]
    if side is not None:
        rows, cols = sorted([side, tuple(a for a in rest if a not in side)])
        return Reading(batch, rows, cols)
    batch = tuple(sorted((*batch, *rest[:-2])))
    experts = bool(EXPERTS & set(leaf.words)) or (expert_bias and by_bias is None)
    return Reading(batch, rest[-2:-1], rest[-1:], guess=not (experts and len(rest) == 3))


def _head_side(leaf: Leaf, rest: tuple[int, ...]) -> tuple[int, ...] | None:
    """The side of the head axes, by the names of axes; None if they do not settle it."""
    heads = tuple(a for a in rest if leaf.axes[a] == HEAD_AXIS)
    features = tuple(a for a in rest if leaf.axes[a] == FEATURE_AXIS)
    if heads and features:
        return tuple(a for a in rest if a not in features)
    return heads if len(rest) - len(heads) == 1 else None


def _product(shape: tuple[int, ...], axes: Collection[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
