"""Llama and RoBERTa in NumPy and float64, on tensors as Hugging Face names and lays them out.

Written from the papers and from what `config.json` means, one sentence and one head at a time; they
share nothing with the examples, which they check, the table of names included.

    python -m tests.helpers.reference_models      writes what they compute into data/logits.npz
"""

import json
from pathlib import Path

import numpy as np
from scipy.special import erf, expit


Tensors = dict[str, np.ndarray]


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


def roberta_logits(t: Tensors, config: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits (labels,) of one sentence, whose padding counts for nothing."""
    t = {name: tensor.astype(np.float64) for name, tensor in t.items()}
    tokens = tokens[tokens != config["pad_token_id"]]

    def linear(name, x):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(centred**2, axis=-1, keepdims=True)
        normal = centred / np.sqrt(variance + config["layer_norm_eps"])
        return normal * t[f"{name}.weight"] + t[f"{name}.bias"]

    heads = config["num_attention_heads"]
    width = config["hidden_size"] // heads
    base = "roberta.embeddings"
    positions = config["pad_token_id"] + 1 + np.arange(len(tokens))
    x = t[f"{base}.word_embeddings.weight"][tokens]
    x = x + t[f"{base}.position_embeddings.weight"][positions]
    x = norm(f"{base}.LayerNorm", x + t[f"{base}.token_type_embeddings.weight"][0])
    for i in range(config["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{i}"
        q, k, v = (linear(f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value"))
        mixed = np.zeros_like(q)
        for h in range(heads):
            mine = slice(h * width, (h + 1) * width)
            for at in range(len(tokens)):
                weights = softmax(k[:, mine] @ q[at, mine] / np.sqrt(width))
                mixed[at, mine] = weights @ v[:, mine]
        mixed = linear(f"{layer}.attention.output.dense", mixed)
        x = norm(f"{layer}.attention.output.LayerNorm", x + mixed)
        y = linear(f"{layer}.intermediate.dense", x)
        y = linear(f"{layer}.output.dense", y * (1 + erf(y / np.sqrt(2))) / 2)
        x = norm(f"{layer}.output.LayerNorm", x + y)
    return linear("classifier.out_proj", np.tanh(linear("classifier.dense", x[0])))


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


def roberta_shapes(config: dict, labels: int) -> dict[str, tuple[int, ...]]:
    """The tensors of Transformers' RobertaForSequenceClassification."""
    m, n = config["hidden_size"], config["intermediate_size"]
    linears = {"classifier.dense": (m, m), "classifier.out_proj": (labels, m)}
    norms = ["roberta.embeddings.LayerNorm"]
    for i in range(config["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{i}"
        linears |= {f"{layer}.attention.self.{x}": (m, m) for x in ("query", "key", "value")}
        linears[f"{layer}.attention.output.dense"] = (m, m)
        linears[f"{layer}.intermediate.dense"] = (n, m)
        linears[f"{layer}.output.dense"] = (m, n)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    base = "roberta.embeddings"
    return {
        f"{base}.word_embeddings.weight": (config["vocab_size"], m),
        f"{base}.position_embeddings.weight": (config["max_position_embeddings"], m),
        f"{base}.token_type_embeddings.weight": (1, m),
        **{f"{name}.weight": shape for name, shape in linears.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linears.items()},
        **{f"{name}.{kind}": (m,) for name in norms for kind in ("weight", "bias")},
    }


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Every tensor another, of a size at which each part of the model counts."""
    random = np.random.default_rng(seed)
    return {
        name: (0.3 * random.standard_normal(shape) + ("norm" in name.lower())).astype(np.float32)
        for name, shape in shapes.items()
    }


def main() -> None:
    """Stores small models, what they are given, and their logits."""
    llama = LLAMA_CONFIG | {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    roberta = ROBERTA_CONFIG | {"hidden_size": 16, "intermediate_size": 24}
    tokens = np.random.default_rng(3).integers(4, 30, size=(2, 9)).astype(np.int32)
    padded = np.where(np.arange(9) < np.array([[9], [6]]), tokens, roberta["pad_token_id"])
    stored = {}
    for kind, config, shapes, given, logits in (
        ("llama", llama, llama_shapes(llama), tokens, llama_logits),
        ("roberta", roberta, roberta_shapes(roberta, labels=3), padded, roberta_logits),
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
