"""Which leaves are projected, and as which matrices they are seen.

The last words of a leaf's path and its shape decide. Embeddings, heads, norms, biases, routers,
position tables and convolutions keep their inner optimizer's full state, and so does what is too
small to have a subspace. What is left is one matrix (2-D), a stack of matrices (a scanned layer's
leaf, experts) or an attention kernel of Flax: (d, heads, width) into the heads, (heads, width, d)
out of them. Which side of a matrix is projected, `side` says: GaLore's is the short one.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .spec import LeafSpec, path_name


SMALLEST_SIDE = 8  # below it a matrix has no subspace worth the name

NEVER = {
    "an embedding": {
        *("embed", "embeds", "emb", "embedding", "embeddings", "embedder"),
        *("wte", "wpe", "vocab", "shared", "codebook"),
    },
    "an output head": {"head", "lmhead", "logits", "unembed", "unembedding", "classifier"},
    "a norm": {
        *("norm", "norms", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "bn"),
        *("scale", "gamma", "beta"),
    },
    "a bias": {"bias", "biases"},
    "a router": {"router", "routers", "gating", "switch"},
    "a position table": {"pos", "posemb", "pe", "position", "positional", "positions"},
    "a convolution": {"conv", "convs"},
}
# They name a module around, and a dense kernel further in is something else: PreNorm/fn/Dense.
OUTER = {"a norm", "a position table", "a convolution"}
DENSE = {"dense", "linear", "fc", "fn", "mlp", "ffn"}
INTO_HEADS = {"query", "key", "value", "q", "k", "v", "qkv"}
OUT_OF_HEADS = {"out", "o", "output"}
ATTENTION = ("attention", "attn", "mha", "mhsa", "multihead", "selfattn")
STACKS = {"layers", "blocks", "stack", "stacked", "scan", "scanned"}


SIDES = ("short", "long", "left", "right", "both")


def select(params: PyTree, rank: int, side: str = "short") -> tuple[PyTree, dict[str, str]]:
    """The LeafSpec of every leaf that is projected, and why the others are not.

    Args:
      params: a tree of arrays, or of anything with a shape and a dtype.
      rank: r; a matrix whose short side is shorter has no more, and gets a basis as wide as that.
      side: one of `SIDES`.

    Returns:
      A tree like `params` with a LeafSpec at each projected leaf and None elsewhere, and a dict
      from the name of each other leaf to the reason.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    stacked = _stacks(leaves)
    specs: list[LeafSpec | None] = []
    reasons: dict[str, str] = {}
    index = 0
    for path, leaf in leaves:
        spec = _decide(path, leaf, stacked)
        if isinstance(spec, LeafSpec):
            specs.append(_oriented(spec, rank, side, index))
            index += spec.matrices
        else:
            reasons[path_name(path)] = spec
            specs.append(None)
    return treedef.unflatten(specs), reasons


def _decide(path: tuple, leaf: Any, stacked: set[tuple]) -> LeafSpec | str:
    """The leaf as matrices with rows left and columns right, as wide as they are; or why not."""
    shape = tuple(leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"not real floating point ({leaf.dtype})"
    if 0 in shape:
        return f"empty {shape}"
    if reason := _never(path):
        return reason
    batch = (0,) if _in_stack(path, len(shape), stacked) else ()
    rest = tuple(axis for axis in range(len(shape)) if axis not in batch)
    into_rows = 1
    if len(rest) == 3:
        words = _words(path)
        near = words[-3:]  # of a kernel, its module and the module around
        attention = any(word.startswith(ATTENTION) for word in words)
        role = next((w for w in reversed(near) if w in INTO_HEADS | OUT_OF_HEADS), None)
        if role in OUT_OF_HEADS and attention:
            into_rows = 2
        elif not (
            role in INTO_HEADS and (attention or near[-2:-1] in (["query"], ["key"], ["value"]))
        ):
            rest, batch = rest[1:], (*batch, rest[0])  # experts, or a stack nothing else betrays
    elif len(rest) != 2:
        return f"not a matrix ({len(rest)}-D)"
    spec = LeafSpec(path, shape, batch, rest[:into_rows], rest[into_rows:], rank=0)
    if min(spec.m, spec.n) < SMALLEST_SIDE:
        return f"too small ({min(spec.m, spec.n)} x {max(spec.m, spec.n)})"
    return spec


def _oriented(spec: LeafSpec, rank: int, side: str, index: int) -> LeafSpec:
    """The spec with the projected side first. A square has no short side: it stays as it is."""
    turn = {"short": spec.m > spec.n, "long": spec.m < spec.n, "right": True}.get(side, False)
    spec = spec.turned if turn else spec
    rank = min(rank, spec.m, spec.n)
    return dataclasses.replace(spec, rank=rank, index=index, both=side == "both")


def _never(path: tuple) -> str | None:
    """Why a leaf with such a name is never projected: the innermost telling word decides."""
    words = _words(path)
    if words[-1:] == ["b"]:
        return "a bias"
    if words[:1] == ["output"] and len(path) <= 2:
        return "an output head"
    if "gate" in words and any("moe" in word or word == "experts" for word in words):
        return "a router"
    for i in reversed(range(len(words))):
        for reason, names in NEVER.items():
            if words[i] not in names:
                continue
            if reason in OUTER and DENSE & set(words[i + 1 :]):
                continue
            if words[i] == "head" and _is_attention(words):
                continue  # a head of attention: MultiHeadDotProductAttention, head_0/query
            return reason
    return None


def _is_attention(words: list[str]) -> bool:
    return any(word.startswith(ATTENTION) for word in words) or bool(INTO_HEADS & set(words[-3:]))


def _stacks(leaves: list[tuple[tuple, Any]]) -> set[tuple]:
    """The paths below which every leaf carries a layer axis in front.

    A subtree is such a stack where its leaves agree on the size of their first axis and even its
    norms and biases, vectors by nature, have two.
    """
    below: dict[tuple, list[tuple[tuple, Any]]] = {}
    for path, leaf in leaves:
        for depth in range(len(path)):
            below.setdefault(path[:depth], []).append((path, leaf))
    stacks = set()
    for prefix, members in below.items():
        vectors = [leaf for path, leaf in members if _never(path) in ("a norm", "a bias")]
        if (
            vectors
            and all(len(leaf.shape) == 2 for leaf in vectors)
            and all(len(leaf.shape) >= 2 for _, leaf in members)
            and len({leaf.shape[0] for _, leaf in members}) == 1
        ):
            stacks.add(prefix)
    return stacks


def _in_stack(path: tuple, ndim: int, stacks: set[tuple]) -> bool:
    """Whether the leaf's first axis counts layers: siblings say so, or the path's own words.

    `layers/mlp/up` of three axes without a number is a scanned stack, `layers/0/mlp/up` and
    `blocks/block1/up` are each one of a list.
    """
    if any(path[:depth] in stacks for depth in range(len(path))):
        return True
    numbered = re.search(r"\d(/|_|$)", path_name(path))
    return ndim >= 3 and bool(STACKS & set(_words(path))) and not numbered


def _words(path: tuple) -> list[str]:
    """`Block_0/selfAttention/conv1/kernel` -> block self attention conv kernel.

    The `value` in which Flax boxes an array is no word, nor are numbers.
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path_name(path))
    words = [word.lower().rstrip("0123456789") for word in re.split(r"[^A-Za-z0-9]+", spaced)]
    return [word for word in words if word]
