"""Reads a Llama and its tokenizer from a GGUF file, the format of llama.cpp.

    config, params, tokenizer = read(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))

The package `gguf` parses and dequantizes the file. Quantized weights become float32 with the values
of the quantized file, not those before its quantization.

Rows of the query and key matrices have another order in the file. llama.cpp rotates neighbours,
(x_2i, x_2i+1), where Hugging Face and `llama.rotate` rotate halves, (x_i, x_i+half): row 2 i + j of
a head in the file is row i + half j of ours (`LlamaModel.permute` in llama.cpp's converter).
"""

from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from flax import traverse_util
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.common import hugging_face, llama, pretrained


NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers/{}/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/{}/attention/query/kernel": "blk.{}.attn_q.weight",
    "layers/{}/attention/key/kernel": "blk.{}.attn_k.weight",
    "layers/{}/attention/value/kernel": "blk.{}.attn_v.weight",
    "layers/{}/attention/out/kernel": "blk.{}.attn_output.weight",
    "layers/{}/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/{}/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/{}/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/{}/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
# By tokenizer.ggml.pre: the splitting of text before BPE, as in Hugging Face's tokenizer.json.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


class Checkpoint(NamedTuple):
    """A model with its tokenizer; weights are float32."""

    config: llama.LlamaConfig
    params: pretrained.Params
    tokenizer: Tokenizer


def by_halves(weight: Float[np.ndarray, "m n"], heads: int) -> Float[np.ndarray, "m n"]:
    """A query or key matrix of `heads` heads with its rows in our order.

    Example:
        >>> by_halves(np.arange(8.0)[:, None], heads=2)[:, 0].tolist()
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    m, n = weight.shape
    return weight.reshape(heads, m // heads // 2, 2, n).swapaxes(1, 2).reshape(m, n)


def read(file: Path) -> Checkpoint:
    """Reads a Llama.

    Raises:
        OSError: the file is missing.
        ValueError: the file is damaged, or its model or tokenizer is not implemented here.
    """
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is truncated or not a GGUF file: {error}") from error

    def entry(name: str) -> Any:
        if name not in reader.fields:
            raise ValueError(f"{file} has no entry {name}")
        return reader.fields[name].contents()

    def demand(name: str, *supported: Any) -> None:
        if (found := entry(name)) not in supported:
            known = " or ".join(map(repr, supported))
            raise ValueError(f"{file} has {name} = {found!r}; supported is {known}")

    demand("general.architecture", "llama")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = llama.LlamaConfig(
        hidden=entry("llama.embedding_length"),
        intermediate=entry("llama.feed_forward_length"),
        heads=entry("llama.attention.head_count"),
        layers=entry("llama.block_count"),
        vocabulary=entry("llama.vocab_size"),
        kv_heads=entry("llama.attention.head_count_kv"),
        theta=entry("llama.rope.freq_base"),
        # A float32 in the file: 1e-5, not 9.9999997e-6.
        epsilon=float(str(np.float32(entry("llama.attention.layer_norm_rms_epsilon")))),
        tied="output.weight" not in tensors,
    )
    demand("llama.rope.dimension_count", config.head_dim)

    wanted = pretrained.parts(llama.abstract_params(config), NAMES)
    if different := wanted.keys() ^ tensors.keys():
        names = pretrained.grouped(sorted(different))
        raise ValueError(f"{file} has other tensors than a Llama: {names}")
    leaves = {}
    for name, part in wanted.items():
        weight = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        if weight.shape != part.shape:
            raise ValueError(f"{name} is {weight.shape}, not {part.shape}")
        if "query" in part.path or "key" in part.path:
            weight = by_halves(weight, len(weight) // config.head_dim)
        leaves[part.path] = pretrained.converted(weight, part)

    demand("tokenizer.ggml.model", "gpt2")
    demand("tokenizer.ggml.pre", *PRE_TOKENIZERS)
    tokenizer = byte_level_bpe(
        entry("tokenizer.ggml.tokens"),
        entry("tokenizer.ggml.merges"),
        entry("tokenizer.ggml.token_type"),
        PRE_TOKENIZERS[entry("tokenizer.ggml.pre")](),
    )
    return Checkpoint(config, traverse_util.unflatten_dict(leaves), tokenizer)


def byte_level_bpe(
    tokens: list[str], merges: list[str], kinds: list[int], pre_tokenizer: Any
) -> Tokenizer:
    """The tokenizer with these tokens and merges ("a b"); control tokens are special."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, k in zip(tokens, kinds, strict=True) if k == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def convert(file: Path, folder: Path) -> llama.LlamaConfig:
    """Writes the model of a GGUF file in Hugging Face's format, for `hugging_face.read_llama`.

    Raises:
        OSError: the file is missing, or the folder cannot be written.
        ValueError: see `read`.
    """
    config, params, tokenizer = read(file)
    hugging_face.save_llama(folder, config, params)
    tokenizer.save(str(folder / "tokenizer.json"))
    return config
