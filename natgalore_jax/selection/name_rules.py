"""Classifies a leaf by the words of its path, and an axis by the words of its name.

`Block_0/selfAttention/conv1/kernel` has the words block, self, attention, conv and kernel.
Embeddings, output heads, norms, biases, routers, position tables and similar leaves are never
projected.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..tree.leaf_spec import path_name


EMBEDDING, HEAD, NORM, BIAS = "an embedding", "an output head", "a norm", "a bias"
ROUTER, POSITION, DEPTHWISE = "a router", "a position table", "a depthwise convolution"
TOKEN, STATE, LORA = "a learned token", "a state-space parameter", "a LoRA factor"

# The innermost of these words decides. ANYWHERE applies to all words of a path, NEAR to those of
# the last two keys: a dense kernel below a norm or an embedding is neither (PreNorm/fn/Dense,
# time_embed/Dense).
ANYWHERE = {
    HEAD: {
        *("lmhead", "logits", "unembed", "unembedding", "classifier", "readout"),
        *("softmax", "predictor", "predictions"),
    },
    ROUTER: {"router", "routers"},
    LORA: {"lora", "loraa", "lorab"},
}
NEAR = {
    EMBEDDING: {
        *("embed", "embeds", "emb", "embedding", "embeddings", "embedder"),
        *("wte", "wpe", "vocab", "codebook", "table"),
    },
    NORM: {
        *("norm", "norms", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "bn"),
        *("scale", "gamma", "beta"),
    },
    BIAS: {"bias", "biases"},
    POSITION: {"pos", "posemb", "posembed", "pe", "position", "positional", "positions", "rpe"},
}
DENSE = {"dense", "linear", "fc", "fn", "mlp", "mlps", "ffn", "proj", "projection"}
# Words of the last key only.
OWN = {
    TOKEN: {"token", "tokens", "cls", "register", "registers", "latents", "probe", "prompt"},
    STATE: {"alog", "lambda", "logstep", "logdt", "decay", "timefaaaa", "timefirst"},
}

EXPERTS = {"moe", "expert", "experts"}
GATES = {"gate", "gating", "wg", "switch"}
NOT_HEADS = EXPERTS | {"mlp", "ffn", "ff", "feedforward"}
INTO_HEADS = {"query", "key", "value", "q", "k", "v", "qkv", "kv", "wq", "wk", "wv", "wqkv", "wkv"}
OUT_OF_HEADS = {"out", "o", "output", "wo"}
FUSED = {"qkv", "kv", "wqkv", "wkv"}
ATTENTION = ("attention", "attn", "mha", "mhsa", "multihead", "selfattn", "crossattn")
STACKS = {"layers", "blocks", "stack", "stacked", "scan", "scanned"}
CONVOLUTION = ("conv", "patch", "stem", "downsample", "upsample")


LAYER_AXIS, EXPERT_AXIS, FUSED_AXIS = "layers", "experts", "fused projections"
HEAD_AXIS, VOCABULARY_AXIS, FEATURE_AXIS = "heads", "vocabulary", "features"

# The last word of an axis name decides for these: `local_layers` and `num_experts` count matrices,
# `layer_norm` and `expert_mlp` do not.
LAST_WORD = {
    LAYER_AXIS: {
        *("layer", "layers", "block", "blocks", "stage", "stages", "repeat", "repeats"),
        *("scan", "depth"),
    },
    EXPERT_AXIS: {"exp", "expert", "experts"},
    FUSED_AXIS: {"qkv", "stack", "activations"},
}
# Any word of an axis name decides for these, in this order: `kv_lora` is no head axis. Names of
# mesh axes (`data`, `fsdp`, `tensor`, `model`) tell nothing.
ANY_WORD = {
    VOCABULARY_AXIS: {"vocab", "vocabulary"},
    FEATURE_AXIS: {"lora", "latent", "embed", "embedding", "mlp", "ffn", "hidden", "intermediate"},
    HEAD_AXIS: {"head", "heads", "kv"},
}


class Leaf:
    """A leaf with its classification by name.

    Attributes:
      path: path of the leaf, as `jax.tree_util` spells it.
      shape: shape of the leaf.
      axes: kind of each axis by its name, one of the `..._AXIS` constants; None if unknown.
      words: words of the path.
      near: words of its last two keys.
      own: words of its last key.
      role: INTO_HEADS, OUT_OF_HEADS or None, for a projection of an attention layer.
      attends: whether a word names an attention layer.
      convolves: whether a word names a convolution.
      kind: reason why the leaf is never projected, or None.
    """

    def __init__(
        self,
        path: tuple[Any, ...],
        shape: tuple[int, ...],
        axis_names: Sequence[str | None] | None = None,
    ):
        self.path = path
        self.shape = shape
        self.words = words(path)
        self.near = words(path[-2:])
        self.own = words(path[-1:])
        self.role = _role(self.near)
        self.attends = any(word.startswith(ATTENTION) for word in self.words)
        self.convolves = any(word.startswith(CONVOLUTION) for word in self.near)
        self.kind = _kind(self)
        self.axes = [axis_kind(name) for name in axis_names or [None] * len(shape)]
        if self.attends or not set(self.axes) - {EXPERT_AXIS, None}:
            # A mesh axis may be named `expert`, and dense kernels sharded over it.
            self.axes = [None if kind == EXPERT_AXIS else kind for kind in self.axes]


def words(path: tuple[Any, ...]) -> list[str]:
    """`Block_0/selfAttention/conv1/kernel` -> block self attention conv kernel."""
    return _split(path_name(path))


def _split(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    found = [word.lower().rstrip("0123456789") for word in re.split(r"[^A-Za-z0-9]+", spaced)]
    return [word for word in found if word]


def axis_kind(name: str | None) -> str | None:
    """One of the `..._AXIS` constants, by the name that a box gives an axis; None if unknown.

    Example:
      >>> [axis_kind(name) for name in ("local_layers", "exp", "kv_heads", "kv_lora", "fsdp", None)]
      ['layers', 'experts', 'heads', 'features', None, None]
    """
    found = _split(name or "")
    for kind, names in LAST_WORD.items():
        if names & set(found[-1:]):
            return kind
    return next((kind for kind, names in ANY_WORD.items() if names & set(found)), None)


def _kind(leaf: Leaf) -> str | None:
    """Reason why a leaf of this name is never projected, or None."""
    parent, key = path_name(leaf.path[-2:-1]), path_name(leaf.path[-1:])
    if key == "b":  # Haiku's bias; `wq_b` is a matrix
        return BIAS
    if parent == "shared":  # T5's table, shared by encoder and decoder
        return EMBEDDING
    outermost = [word for word in leaf.words if word != "params"][:1]
    if outermost in (["output"], ["decoder"]) and len(leaf.path) <= 2 + ("params" in leaf.words):
        return HEAD
    near = [word for word in leaf.near if word != "pe" or leaf.role is None]  # `k_pe` is a kernel
    if kind := _innermost(near, NEAR, DENSE):
        return kind
    for kind, names in OWN.items():
        if "".join(leaf.own) in names or names & set(leaf.own):
            return kind
    # An attention head is no output head, nor are attention and MLP layers inside a head.
    return _innermost(leaf.words, ANYWHERE, ()) or _innermost(
        [] if leaf.attends else leaf.words, {HEAD: {"head"}}, INTO_HEADS | {"mlp", "ffn"}
    )


def _innermost(
    found: Sequence[str], kinds: Mapping[str, set[str]], unless: Collection[str]
) -> str | None:
    """Kind of the last word that names one, or None if a word of `unless` comes after it."""
    for word in reversed(found):
        if word in unless:
            return None
        for kind, names in kinds.items():
            if word in names:
                return kind
    return None


def _role(near: Sequence[str]) -> Collection[str] | None:
    """INTO_HEADS or OUT_OF_HEADS, whichever the last such word belongs to."""
    for word in reversed(near):
        if word in INTO_HEADS:
            return INTO_HEADS
        if word in OUT_OF_HEADS:
            return OUT_OF_HEADS
    return None
