"""Evidence on the axes of a leaf from the other leaves of its tree.

Layer axes are those that all leaves of a scanned stack share; a vocabulary, the width of the model
and a number of experts are sizes that other leaves have; a bias has the output side of the kernel
beside it.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection

from ..tree.leaf_spec import path_name
from .name_rules import (
    ATTENTION,
    BIAS,
    EMBEDDING,
    EXPERT_AXIS,
    GATES,
    HEAD,
    INTO_HEADS,
    LAYER_AXIS,
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


SMALLEST_VOCABULARY = 4096  # smaller vocabularies are indistinguishable from other sizes
TABLES = {EMBEDDING, POSITION, HEAD}


class Tree:
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
