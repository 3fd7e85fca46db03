"""What the name of a leaf says of it, before anything is known of its shape.

The words of a path decide: `Block_0/selfAttention/conv1/kernel` -> block self attention conv
kernel. Embeddings, heads, norms, biases, routers, position tables and the like are never projected.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..tree.leaf_spec import path_name


EMBEDDING, HEAD, NORM, BIAS = "an embedding", "an output head", "a norm", "a bias"
ROUTER, POSITION, DEPTHWISE = "a router", "a position table", "a depthwise convolution"
TOKEN, STATE, LORA = "a learned token", "a state-space parameter", "a LoRA factor"

# The innermost of these words decides: of a whole path, or of its last two keys, since a dense
# kernel further in is something else (PreNorm/fn/Dense, time_embed/Dense).
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
# These only name the parameter itself.
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


class Leaf:
    """What is looked at of a leaf: its path, shape, the words of the path, and what they say."""

    def __init__(self, path: tuple[Any, ...], shape: tuple[int, ...]):
        self.path = path
        self.shape = shape
        self.words = words(path)
        self.near = words(path[-2:])
        self.own = words(path[-1:])
        self.role = _role(self.near)
        self.attends = any(word.startswith(ATTENTION) for word in self.words)
        self.convolves = any(word.startswith(CONVOLUTION) for word in self.near)
        self.kind = _kind(self)


def words(path: tuple[Any, ...]) -> list[str]:
    """`Block_0/selfAttention/conv1/kernel` -> block self attention conv kernel."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path_name(path))
    found = [word.lower().rstrip("0123456789") for word in re.split(r"[^A-Za-z0-9]+", spaced)]
    return [word for word in found if word]


def _kind(leaf: Leaf) -> str | None:
    """Why a leaf with such a name is never projected."""
    parent, key = path_name(leaf.path[-2:-1]), path_name(leaf.path[-1:])
    if key == "b":  # Haiku's; `wq_b` is a matrix
        return BIAS
    if parent == "shared":  # T5's, of encoder and decoder
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
    # A head of attention is none, nor is what attends or mixes within one.
    return _innermost(leaf.words, ANYWHERE, ()) or _innermost(
        [] if leaf.attends else leaf.words, {HEAD: {"head"}}, INTO_HEADS | {"mlp", "ffn"}
    )


def _innermost(
    found: Sequence[str], kinds: Mapping[str, set[str]], unless: Collection[str]
) -> str | None:
    """The kind of the last word that names one, unless one of `unless` comes after it."""
    for word in reversed(found):
        if word in unless:
            return None
        for kind, names in kinds.items():
            if word in names:
                return kind
    return None


def _role(near: Sequence[str]) -> Collection[str] | None:
    for word in reversed(near):
        if word in INTO_HEADS:
            return INTO_HEADS
        if word in OUT_OF_HEADS:
            return OUT_OF_HEADS
    return None
