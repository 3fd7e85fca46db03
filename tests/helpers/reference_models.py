"""Llama, RoBERTa and BERT in NumPy and float64, on tensors as Hugging Face names and lays them out.

Written from the papers and from what `config.json` means, one sentence and one head at a time; they
share nothing with the examples, which they check, the table of names included.

    python -m tests.helpers.reference_models      writes what they compute into data/logits.npz
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import erf, expit


Tensors = dict[str, np.ndarray]
BERT_SEPARATOR = 5  # index of [SEP] in the small models


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def rms(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding of (length, width): the pairs (i, i + width / 2) as complex numbers."""
    half = x.shape[1] // 2
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=1)


def llama_logits(t: Tensors, config: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits (length, vocabulary) of one sequence of tokens."""
    t = {name: tensor.astype(np.float64) for name, tensor in t.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    epsilon, width = config["rms_norm_eps"], config["hidden_size"] // config["num_attention_heads"]
    x = t["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        w = lambda name, i=i: t[f"model.layers.{i}.{name}.weight"]
        y = rms(x, w("input_layernorm"), epsilon)
        q, k, v = (y @ w(f"self_attn.{name}_proj").T for name in "qkv")
        mixed = np.zeros_like(q)
        for h in range(heads):
            mine = slice(h * width, (h + 1) * width)
            g = h * groups // heads
            shared = slice(g * width, (g + 1) * width)
            query = turned(q[:, mine], config["rope_theta"])
            key = turned(k[:, shared], config["rope_theta"])
            for at in range(len(tokens)):
                weights = softmax(key[: at + 1] @ query[at] / np.sqrt(width))
                mixed[at, mine] = weights @ v[: at + 1, shared]
        x = x + mixed @ w("self_attn.o_proj").T
        y = rms(x, w("post_attention_layernorm"), epsilon)
        gate = y @ w("mlp.gate_proj").T
        x = x + (gate * expit(gate) * (y @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return rms(x, t["model.norm.weight"], epsilon) @ t["lm_head.weight"].T


def linear(t: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def norm(t: Tensors, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * t[f"{name}.weight"] + t[f"{name}.bias"]


def encoder_layers(t: Tensors, config: dict, kind: str, x: np.ndarray) -> np.ndarray:
    """The embeddings (length, hidden) of one sentence after all layers."""
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    width = config["hidden_size"] // heads
    for i in range(config["num_hidden_layers"]):
        layer = f"{kind}.encoder.layer.{i}"
        q, k, v = (linear(t, f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value"))
        mixed = np.zeros_like(q)
        for h in range(heads):
            mine = slice(h * width, (h + 1) * width)
            for at in range(len(x)):
                weights = softmax(k[:, mine] @ q[at, mine] / np.sqrt(width))
                mixed[at, mine] = weights @ v[:, mine]
        mixed = linear(t, f"{layer}.attention.output.dense", mixed)
        x = norm(t, f"{layer}.attention.output.LayerNorm", x + mixed, epsilon)
        y = linear(t, f"{layer}.intermediate.dense", x)
        y = linear(t, f"{layer}.output.dense", y * (1 + erf(y / np.sqrt(2))) / 2)
        x = norm(t, f"{layer}.output.LayerNorm", x + y, epsilon)
    return x


def embedded(
    t: Tensors, config: dict, kind: str, tokens: np.ndarray, positions: np.ndarray, types: Any
) -> np.ndarray:
    """The normalised embeddings of one sentence."""
    base = f"{kind}.embeddings"
    x = t[f"{base}.word_embeddings.weight"][tokens]
    x = x + t[f"{base}.position_embeddings.weight"][positions]
    x = x + t[f"{base}.token_type_embeddings.weight"][types]
    return norm(t, f"{base}.LayerNorm", x, config["layer_norm_eps"])


def roberta_logits(t: Tensors, config: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits (labels,) of one sentence, whose padding counts for nothing."""
    t = {name: tensor.astype(np.float64) for name, tensor in t.items()}
    tokens = tokens[tokens != config["pad_token_id"]]
    positions = config["pad_token_id"] + 1 + np.arange(len(tokens))
    x = embedded(t, config, "roberta", tokens, positions, 0)
    x = encoder_layers(t, config, "roberta", x)
    return linear(t, "classifier.out_proj", np.tanh(linear(t, "classifier.dense", x[0])))


def bert_logits(
    t: Tensors, config: dict, tokens: np.ndarray, separator: int = BERT_SEPARATOR
) -> np.ndarray:
    """Logits (labels,) of one sentence or pair; each text ends with the separator."""
    t = {name: tensor.astype(np.float64) for name, tensor in t.items()}
    tokens = tokens[tokens != config["pad_token_id"]]
    first = list(tokens).index(separator) + 1 if separator in tokens else len(tokens)
    types = np.array([0] * first + [1] * (len(tokens) - first))
    x = embedded(t, config, "bert", tokens, np.arange(len(tokens)), types)
    x = encoder_layers(t, config, "bert", x)
    return linear(t, "classifier", np.tanh(linear(t, "bert.pooler.dense", x[0])))


LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 30,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-2,  # large, so that it counts
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ROBERTA_CONFIG = {
    "model_type": "roberta",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 30,
    "max_position_embeddings": 14,
    "type_vocab_size": 1,
    "pad_token_id": 3,
    "layer_norm_eps": 1e-2,
    "hidden_act": "gelu",
}
BERT_CONFIG = ROBERTA_CONFIG | {"model_type": "bert", "type_vocab_size": 2, "pad_token_id": 3}


def llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of Transformers' LlamaForCausalLM."""
    m, n, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = m // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (m,),
        "self_attn.q_proj": (m, m),
        "self_attn.k_proj": (keys, m),
        "self_attn.v_proj": (keys, m),
        "self_attn.o_proj": (m, m),
        "post_attention_layernorm": (m,),
        "mlp.gate_proj": (n, m),
        "mlp.up_proj": (n, m),
        "mlp.down_proj": (m, n),
    }
    return {
        "model.embed_tokens.weight": (v, m),
        **{
            f"model.layers.{i}.{name}.weight": shape
            for i in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "model.norm.weight": (m,),
        "lm_head.weight": (v, m),
    }


def encoder_shapes(config: dict, labels: int) -> dict[str, tuple[int, ...]]:
    """The tensors of Transformers' RobertaForSequenceClassification or BertFor….

    The config's `model_type` decides which.
    """
    m, n, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    if kind == "roberta":
        linears = {"classifier.dense": (m, m), "classifier.out_proj": (labels, m)}
    else:
        linears = {"bert.pooler.dense": (m, m), "classifier": (labels, m)}
    base = f"{kind}.embeddings"
    norms = [f"{base}.LayerNorm"]
    for i in range(config["num_hidden_layers"]):
        layer = f"{kind}.encoder.layer.{i}"
        linears |= {f"{layer}.attention.self.{x}": (m, m) for x in ("query", "key", "value")}
        linears[f"{layer}.attention.output.dense"] = (m, m)
        linears[f"{layer}.intermediate.dense"] = (n, m)
        linears[f"{layer}.output.dense"] = (m, n)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    return {
        f"{base}.word_embeddings.weight": (config["vocab_size"], m),
        f"{base}.position_embeddings.weight": (config["max_position_embeddings"], m),
        f"{base}.token_type_embeddings.weight": (config["type_vocab_size"], m),
        **{f"{name}.weight": shape for name, shape in linears.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linears.items()},
        **{f"{name}.{leaf}": (m,) for name in norms for leaf in ("weight", "bias")},
    }


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Every tensor another, of a size at which each part of the model counts."""
    random = np.random.default_rng(seed)
    return {
        name: (0.3 * random.standard_normal(shape) + ("norm" in name.lower())).astype(np.float32)
        for name, shape in shapes.items()
    }


def pairs(tokens: np.ndarray) -> np.ndarray:
    """The sentences as pairs: separators end at the third token and at the last one."""
    tokens = tokens.copy()
    for row in tokens:
        row[[2, np.sum(row != BERT_CONFIG["pad_token_id"]) - 1]] = BERT_SEPARATOR
    return tokens


def main() -> None:
    """Stores small models, what they are given, and their logits."""
    llama = LLAMA_CONFIG | {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    roberta = ROBERTA_CONFIG | {"hidden_size": 16, "intermediate_size": 24}
    bert = BERT_CONFIG | {"hidden_size": 16, "intermediate_size": 24}
    tokens = np.random.default_rng(3).integers(4, 30, size=(2, 9)).astype(np.int32)
    padded = np.where(np.arange(9) < np.array([[9], [6]]), tokens, roberta["pad_token_id"])
    stored = {}
    for kind, config, shapes, given, logits in (
        ("llama", llama, llama_shapes(llama), tokens, llama_logits),
        ("roberta", roberta, encoder_shapes(roberta, labels=3), padded, roberta_logits),
        ("bert", bert, encoder_shapes(bert, labels=3), pairs(padded), bert_logits),
    ):
        tensors = {k: v.astype(np.float16) for k, v in random_tensors(shapes, seed=9).items()}
        stored |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        stored |= {
            f"{kind}_config": np.array(json.dumps(config)),
            f"{kind}_tokens": given,
            f"{kind}_logits": np.array([logits(tensors, config, row) for row in given]),
        }
    np.savez_compressed(Path(__file__).parents[1] / "data" / "logits.npz", **stored)


if __name__ == "__main__":
    main()
