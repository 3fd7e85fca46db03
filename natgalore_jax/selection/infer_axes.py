"""Reads a tree of parameters that nobody annotated: what is each leaf, and as which matrices?

Three kinds of evidence, each used where it is strong. The *words* of a leaf's path say what it is
for: embeddings, heads, norms, biases, routers, position tables and the like are never projected.
Its *siblings* say which axes count layers: in a scanned stack even a norm's vector has two axes,
and all leaves share the size of one. And *sizes* say how an array of three axes or more folds
into a matrix: a bias has the shape of the output side, a norm the width of the model.

Where nothing tells, the last two axes are the matrix and those before them count matrices; such a
reading is marked as a guess, and `describe` says so.
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
    EXPERTS,
    FUSED,
    GATES,
    HEAD,
    INTO_HEADS,
    NEAR,
    NORM,
    NOT_HEADS,
    OUT_OF_HEADS,
    POSITION,
    ROUTER,
    STACKS,
    Leaf,
    words,
)


SMALLEST_SIDE = 8  # below it a matrix has no subspace worth the name

LARGEST_KERNEL = 16  # spatial extent of a convolution's kernel
SMALLEST_VOCABULARY = 4096  # a smaller one is not told from other sizes
TABLES = {EMBEDDING, POSITION, HEAD}


class Reading(NamedTuple):
    """A leaf as matrices: rows are the leading side, columns the other.

    Attributes:
      batch, rows, cols: axes.
      guess: whether nothing told how the axes belong together.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    guess: bool = False


def read(named_shapes: Sequence[tuple[tuple[Any, ...], tuple[int, ...]]]) -> list[Reading | str]:
    """What each leaf is seen as, or why it is left whole.

    Args:
      named_shapes: path, as `jax.tree_util` spells it, and shape of every leaf of a tree.
    """
    paths = [unboxed_path(path) for path, _ in named_shapes]
    if {path_name(path[-1:]) for path in paths} in ({"value"}, {"array"}):
        paths = [path[:-1] for path in paths]  # boxes too, where all leaves have them
    leaves = [Leaf(path, shape) for path, (_, shape) in zip(paths, named_shapes, strict=True)]
    names = {path_name(leaf.path) for leaf in leaves}
    for leaf in leaves:  # Haiku's `gating_b` beside `gating_w`, where `wq_b` has no `wq_w`
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
    if kind := leaf.kind or tree.kind_by_size(leaf, rest):
        return kind
    if len(rest) < 2:
        return "a vector"
    reading = _convolution(leaf, stack) or _fold(leaf, batch, rest, tree)
    if isinstance(reading, str):
        return reading
    m, n = (_product(leaf.shape, side) for side in (reading.rows, reading.cols))
    if min(m, n) < SMALLEST_SIDE:
        return f"too small ({min(m, n)} x {max(m, n)})"
    return reading


def _convolution(leaf: Leaf, stack: Collection[int]) -> Reading | str | None:
    """A convolution's kernel: Flax's (*space, in, out) or torch's (out, in, *space)."""
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
        return None  # only a square window betrays a convolution without the name
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
    """The axes that count no layers, `rest`, as two sides."""
    # Two or three projections may be stacked on an axis of their own: gate and up; q, k and v.
    attention = tree.in_attention(leaf)
    own = next((a for a in rest[:-1] if leaf.shape[a] in (2, 3)), None)
    if attention:
        apart = FUSED & set(leaf.near) and len(rest) + sum(leaf.shape[a] == 1 for a in batch) > 3
    else:
        apart = len(rest) == 3
    if own is not None and apart:
        batch = tuple(sorted((*batch, own)))
        rest = tuple(a for a in rest if a != own)
    if len(rest) == 2:
        return Reading(batch, rest[:1], rest[1:])
    side = tree.output_side(leaf, rest)
    if side is None and attention:
        side = tree.width_axis(leaf, rest)
        if side is None and leaf.role is not None:
            side = rest[:1] if leaf.role is INTO_HEADS else rest[-1:]
    if side is not None:
        rows, cols = sorted([side, tuple(a for a in rest if a not in side)])
        return Reading(batch, rows, cols)
    batch = tuple(sorted((*batch, *rest[:-2])))
    known = len(rest) == 3 and bool(EXPERTS & set(leaf.words))
    return Reading(batch, rest[-2:-1], rest[-1:], guess=not known)


class _Tree:
    """What only the leaves together can tell."""

    def __init__(self, leaves: list[Leaf]):
        self.below: dict[tuple, list[Leaf]] = {}
        for leaf in leaves:
            for depth in range(len(leaf.path)):
                self.below.setdefault(leaf.path[:depth], []).append(leaf)
        self.stacks = {prefix: _common_axes(members) for prefix, members in self.below.items()}
        tables = [
            x
            for x in leaves
            if x.kind == EMBEDDING and len(x.shape) == 2 and not NEAR[POSITION] & set(x.words)
        ]
        self.vocabularies = {max(x.shape) for x in tables if max(x.shape) >= SMALLEST_VOCABULARY}
        self.vocabularies |= _vocabularies(leaves)
        norms = [x for x in leaves if x.kind == NORM and x.role is None]  # not those of queries
        self.widths = {min(x.shape) for x in tables}
        self.widths |= {max(_without(x.shape, self.stack_axes(x)), default=0) for x in norms}

    def stack_axes(self, leaf: Leaf) -> tuple[int, ...]:
        """The axes that count layers."""
        for depth in range(len(leaf.path)):
            if axes := self.stacks[leaf.path[:depth]]:
                return axes
        # `layers/mlp/up` of three axes without a number is a scanned stack; `layers/0/mlp/up` and
        # `blocks/block1/up` are each one of a list.
        numbered = re.search(r"\d(/|_|$)", path_name(leaf.path))
        if len(leaf.shape) < 3 or numbered or leaf.convolves:
            return ()
        for depth in range(1, len(leaf.path)):
            if STACKS & set(words(leaf.path[depth - 1 : depth])):
                shapes = [x.shape for x in self.below[leaf.path[:depth]] if len(x.shape) > 1]
                first, second = ({shape[axis] for shape in shapes} for axis in (0, 1))
                return (1,) if len(second) == 1 < len(first) else (0,)
        return ()

    def in_attention(self, leaf: Leaf) -> bool:
        """Whether its axes may be heads: its words say so, or queries beside it do."""
        after = [i for i, word in enumerate(leaf.words) if word.startswith(ATTENTION)][-1:] or [0]
        if NOT_HEADS & set(leaf.words[after[0] :]):
            return False
        beside = self.below.get(leaf.path[:-2], []) if leaf.role is OUT_OF_HEADS else [leaf]
        return leaf.attends or any(x.role is INTO_HEADS for x in beside)

    def kind_by_size(self, leaf: Leaf, rest: tuple[int, ...]) -> str | None:
        """Whether a matrix makes logits: of the vocabulary, or of experts."""
        sizes = {leaf.shape[a] for a in rest}
        if len(rest) != 2:
            return None
        if self.vocabularies & sizes and len(leaf.shape) == 2:
            return HEAD
        if not GATES & set(leaf.words) or any(word in leaf.words for word in ("expert", "experts")):
            return None
        if any("moe" in word for word in leaf.words):
            return ROUTER
        for x in self.below.get(leaf.path[:-2], []):  # experts beside it
            *_, count, m, n = (0, 0, 0, *_without(x.shape, self.stack_axes(x)))
            if not self.in_attention(x) and 0 < count < min(m, n) and count in sizes:
                return ROUTER
        return None

    def output_side(self, leaf: Leaf, rest: tuple[int, ...]) -> tuple[int, ...] | None:
        """The axes that the bias beside a kernel has too."""
        for bias in self.below.get(leaf.path[:-1], []):
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

    def width_axis(self, leaf: Leaf, rest: tuple[int, ...]) -> tuple[int, ...] | None:
        """The axis that has the width of a model: the longest that norms or embeddings have too."""
        longest = max((leaf.shape[a] for a in rest if leaf.shape[a] in self.widths), default=0)
        fits = [a for a in rest if leaf.shape[a] == longest]
        return (fits[0],) if len(fits) == 1 else None


def _vocabularies(leaves: list[Leaf]) -> set[int]:
    """Sizes that only a vocabulary has: large, out of proportion, and not in every layer."""
    matrices = [sorted(x.shape) for x in leaves if len(x.shape) == 2 and x.kind not in (NORM, BIAS)]
    count = Counter(size for shape in matrices for size in set(shape))
    return {
        large
        for small, large in matrices
        if large >= 4 * SMALLEST_VOCABULARY and large > 8 * small > 0 and count[large] <= 3
    }


def _common_axes(members: list[Leaf]) -> tuple[int, ...]:
    """The axes that count layers in a subtree that is a stack, else ().

    It is one where even its norms and biases, vectors by nature, have more axes than one, all
    leaves have the same sizes on all but one of those, and there is no table.
    """
    least = min(
        (
            sum(size > 1 for size in leaf.shape)
            for leaf in members  # but the biases of attention may have two axes by nature
            if leaf.kind == NORM or (leaf.kind == BIAS and leaf.role is None)
        ),
        default=0,
    )
    if least < 2 or any(
        len(leaf.shape) < least or (leaf.kind in TABLES and len(leaf.shape) == 2)
        for leaf in members
    ):
        return ()
    for axes in itertools.combinations(range(least), least - 1):
        if len({tuple(leaf.shape[a] for a in axes) for leaf in members}) == 1:
            return axes
    return ()


def _without(shape: tuple[int, ...], axes: Collection[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _product(shape: tuple[int, ...], axes: Collection[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
