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

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..tree.leaf_spec import path_name, unboxed_path
from .name_rules import (
    ATTENTION,
    BIAS,
    DEPTHWISE,
    EMBEDDING,
    EXPERT_AXIS,
    EXPERTS,
    FEATURE_AXIS,
    FUSED,
    FUSED_AXIS,
    GATES,
    HEAD,
    HEAD_AXIS,
    INTO_HEADS,
    LAYER_AXIS,
    NEAR,
    NORM,
    NOT_HEADS,
    OUT_OF_HEADS,
    POSITION,
    ROUTER,
    STACKS,
    VOCABULARY_AXIS,
    Leaf,
    words,
)


SMALLEST_SIDE = 8  # a matrix with a smaller side is not projected

LARGEST_FUSED = 4  # most projections on an axis of their own
LARGEST_KERNEL = 16  # largest spatial extent of a convolution kernel
SMALLEST_VOCABULARY = 4096  # smaller vocabularies are indistinguishable from other sizes
TABLES = {EMBEDDING, POSITION, HEAD}


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
    tree = _Tree(leaves)
    return [_read(leaf, tree) for leaf in leaves]


def _read(leaf: Leaf, tree: "_Tree") -> Reading | str:
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


def _fold(leaf: Leaf, batch: tuple[int, ...], rest: tuple[int, ...], tree: "_Tree") -> Reading:
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


class _Tree:
    """Evidence from the leaves of a tree taken together."""

    def __init__(self, leaves: list[Leaf]):
        self.subtrees: dict[tuple, list[Leaf]] = {}  # the leaves below each prefix of a path
        for leaf in leaves:
            for depth in range(len(leaf.path)):
                self.subtrees.setdefault(leaf.path[:depth], []).append(leaf)
        self.stacks: dict[tuple, tuple[int, ...]] = {(): _common_axes(leaves, ())}
        for leaf in leaves:
            for depth in range(1, len(leaf.path)):
                prefix = leaf.path[:depth]
                if prefix not in self.stacks:
                    outer = self.stacks[prefix[:-1]]
                    self.stacks[prefix] = _common_axes(self.subtrees[prefix], outer) or outer
        tables = [
            x
            for x in leaves
            if x.kind == EMBEDDING and len(x.shape) == 2 and not NEAR[POSITION] & set(x.words)
        ]
        self.vocabularies = {max(x.shape) for x in tables if max(x.shape) >= SMALLEST_VOCABULARY}
        self.vocabularies |= _vocabularies(leaves)
        norms = [x for x in leaves if x.kind == NORM and x.role is None]  # no query norms
        self.widths = {min(x.shape) for x in tables}
        self.widths |= {max(_without(x.shape, self.stack_axes(x)), default=0) for x in norms}

    def stack_axes(self, leaf: Leaf) -> tuple[int, ...]:
        """The axes that count layers."""
        named = tuple(a for a, kind in enumerate(leaf.axes) if kind == LAYER_AXIS)
        inferred = self.stacks[leaf.path[:-1]] or (() if named else self._stack_by_words(leaf))
        return tuple(
            a for a, kind in enumerate(leaf.axes) if a in named or (kind is None and a in inferred)
        )

    def _stack_by_words(self, leaf: Leaf) -> tuple[int, ...]:
        """The axes that count layers in a stack without norms and biases, by its name."""
        # `layers/mlp/up` with three axes and no number is a scanned stack; `layers/0/mlp/up` and
        # `blocks/block1/up` are items of a list.
        numbered = re.search(r"\d(/|_|$)", path_name(leaf.path))
        if len(leaf.shape) < 3 or numbered or leaf.convolves:
            return ()
        for depth in range(1, len(leaf.path)):
            if STACKS & set(words(leaf.path[depth - 1 : depth])):
                members = [x for x in self.subtrees[leaf.path[:depth]] if len(x.shape) > 1]
                shapes = [x.shape for x in members]
                first, second = ({shape[axis] for shape in shapes} for axis in (0, 1))
                return _extended((1,) if len(second) == 1 < len(first) else (0,), members)
        return ()

    def in_attention(self, leaf: Leaf) -> bool:
        """Whether the leaf may have head axes: by its words, or by a query projection beside it."""
        after = [i for i, word in enumerate(leaf.words) if word.startswith(ATTENTION)][-1:] or [0]
        if NOT_HEADS & set(leaf.words[after[0] :]):
            return False
        siblings = self.subtrees.get(leaf.path[:-2], []) if leaf.role is OUT_OF_HEADS else [leaf]
        return leaf.attends or any(x.role is INTO_HEADS for x in siblings)

    def kind_by_size(self, leaf: Leaf, rest: tuple[int, ...]) -> str | None:
        """HEAD or ROUTER, by the size of a vocabulary or the number of experts; else None."""
        sizes = {leaf.shape[a] for a in rest}
        if len(rest) != 2:
            return None
        if self.vocabularies & sizes and len(leaf.shape) == 2:
            return HEAD
        if not GATES & set(leaf.words):
            return None
        beside = self.subtrees.get(leaf.path[:-2], [])
        axes = [pair for x in beside for pair in zip(x.axes, x.shape, strict=True)]
        if {n for kind, n in axes if kind == EXPERT_AXIS} & sizes and EXPERT_AXIS not in leaf.axes:
            return ROUTER
        if any(word in leaf.words for word in ("expert", "experts")):
            return None
        if any("moe" in word for word in leaf.words):
            return ROUTER
        for x in beside:  # experts
            *_, count, m, n = (0, 0, 0, *_without(x.shape, self.stack_axes(x)))
            if not self.in_attention(x) and 0 < count < min(m, n) and count in sizes:
                return ROUTER
        return None

    def output_side(self, leaf: Leaf, rest: tuple[int, ...]) -> tuple[int, ...] | None:
        """The axes that a kernel shares with the bias beside it."""
        for bias in self.subtrees.get(leaf.path[:-1], []):
            if bias.kind != BIAS or len(bias.path) != len(leaf.path):
                continue
            sizes = [n for n in _without(bias.shape, self.stack_axes(bias)) if n > 1]
            k = len(sizes)
            if 0 < k < len(rest):
                first, last = rest[:k], rest[-k:]
                fits = [side for side in (first, last) if [leaf.shape[a] for a in side] == sizes]
                if len(fits) == 1:
                    return fits[0]
        return None

    def has_expert_bias(self, leaf: Leaf, rest: tuple[int, ...]) -> bool:
        """Whether a bias (E, n) is beside the leaf (E, m, n)."""
        ends = [leaf.shape[rest[0]], leaf.shape[rest[-1]]]
        return len(rest) == 3 and any(
            _without(x.shape, self.stack_axes(x)) == tuple(ends)
            for x in self.subtrees.get(leaf.path[:-1], [])
            if x.kind == BIAS and len(x.path) == len(leaf.path)
        )

    def width_axis(self, leaf: Leaf, rest: tuple[int, ...]) -> tuple[int, ...] | None:
        """The axis of the model's width: the longest that a norm or an embedding has too."""
        longest = max((leaf.shape[a] for a in rest if leaf.shape[a] in self.widths), default=0)
        fits = [a for a in rest if leaf.shape[a] == longest]
        return (fits[0],) if len(fits) == 1 else None


def _vocabularies(leaves: list[Leaf]) -> set[int]:
    """Sizes of vocabularies: large, much larger than the other side, and not in every layer."""
    matrices = [sorted(x.shape) for x in leaves if len(x.shape) == 2 and x.kind not in (NORM, BIAS)]
    count = Counter(size for shape in matrices for size in set(shape))
    return {
        large
        for small, large in matrices
        if large >= 4 * SMALLEST_VOCABULARY and large > 8 * small > 0 and count[large] <= 3
    }


def _common_axes(members: list[Leaf], outer: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that count layers in a subtree, `outer` and at least one more; () if there are none.

    A subtree is a stack if even its norms and biases, vectors by nature, have more axes than one,
    all leaves have the same sizes on all but one of these axes, and there is no table. A stack
    within a stack must have a matrix too.
    """
    least = min(
        (
            sum(size > 1 for size in leaf.shape)
            for leaf in members  # but the biases of attention may have two axes by nature
            if leaf.kind == NORM or (leaf.kind == BIAS and leaf.role is None)
        ),
        default=0,
    )
    if least < 2 + len(outer) or any(
        len(leaf.shape) < least or (leaf.kind in TABLES and len(leaf.shape) == 2)
        for leaf in members
    ):
        return ()
    if outer and max(len(leaf.shape) for leaf in members) == least:
        return ()
    for axes in itertools.combinations(range(least), least - 1):
        if (
            set(outer) <= set(axes)
            and len({tuple(leaf.shape[a] for a in axes) for leaf in members}) == 1
        ):
            return axes
    return ()


def _extended(axes: tuple[int, ...], members: list[Leaf]) -> tuple[int, ...]:
    """The layer axes with those after them that all leaves of a stack share too.

    Attention is no evidence, since its leaves may share the number of heads.
    """
    while True:
        after = axes[-1] + 1
        others = {leaf.shape[after:] for leaf in members if not (leaf.attends or leaf.role)}
        deep = all(len(leaf.shape) >= after + 3 for leaf in members)
        if not deep or len({leaf.shape[after] for leaf in members}) > 1 or len(others) < 2:
            return axes
        axes = (*axes, after)


def _without(shape: tuple[int, ...], axes: Collection[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _product(shape: tuple[int, ...], axes: Collection[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
