"""Reads and writes Llama, RoBERTa and BERT checkpoints in Hugging Face's format.

    config, params = read_llama(folder)             e.g. TinyLlama; `save_llama` writes one
    config, params = read_encoder(folder, labels)   a RoBERTa or a BERT

`config.json` gives the shape of the model. Options that our models do not implement raise a
ValueError with their name, so a checkpoint never runs as a different model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

from examples.common import bert, llama, pretrained, roberta


LLAMA_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/{}/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/{}/attention/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/{}/attention/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/{}/attention/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/{}/attention/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/{}/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/{}/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/{}/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/{}/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

SIZES = {  # entries of every config.json, by the fields of our configs
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "vocabulary": "vocab_size",
}


class EncoderFormat(NamedTuple):
    """The checkpoint of an encoder with a classifier.

    Attributes:
        config: our class of shapes.
        architecture: Transformers' class.
        dense, head: tensors of the two linears of the classifier.
        epsilon: Transformers' default of layer_norm_eps.
        unused: pattern of tensors of other heads.
        optional: pattern of tensors that an encoder without this classifier lacks.
    """

    config: type[roberta.RobertaConfig]
    architecture: str
    dense: str
    head: str
    epsilon: float
    unused: str
    optional: str


ENCODERS = {  # by model_type, which is also the prefix of the tensors
    "roberta": EncoderFormat(
        roberta.RobertaConfig,
        "RobertaForSequenceClassification",
        "classifier.dense",
        "classifier.out_proj",
        1e-5,
        unused=r"^lm_head\.|^roberta\.pooler\.|\.position_ids$",
        optional=r"^classifier\.",
    ),
    "bert": EncoderFormat(
        bert.BertConfig,
        "BertForSequenceClassification",
        "bert.pooler.dense",
        "classifier",
        1e-12,
        unused=r"^cls\.|\.position_ids$",
        optional=r"^classifier\.|pooler\.",
    ),
}


def encoder_names(kind: str) -> dict[str, str]:
    """Tensor names of an encoder by parameter name."""
    layer, embeddings = f"{kind}.encoder.layer.{{}}", f"{kind}.embeddings"
    about = ENCODERS[kind]
    linears = {
        "layers/{}/query": f"{layer}.attention.self.query",
        "layers/{}/key": f"{layer}.attention.self.key",
        "layers/{}/value": f"{layer}.attention.self.value",
        "layers/{}/out": f"{layer}.attention.output.dense",
        "layers/{}/up": f"{layer}.intermediate.dense",
        "layers/{}/down": f"{layer}.output.dense",
        "classifier/dense": about.dense,
        "classifier/head": about.head,
    }
    norms = {
        "norm": f"{embeddings}.LayerNorm",
        "layers/{}/attention_norm": f"{layer}.attention.output.LayerNorm",
        "layers/{}/mlp_norm": f"{layer}.output.LayerNorm",
    }
    return {
        "words/embedding": f"{embeddings}.word_embeddings.weight",
        "positions/embedding": f"{embeddings}.position_embeddings.weight",
        "kinds/embedding": f"{embeddings}.token_type_embeddings.weight",
        **{f"{ours}/kernel": f"{theirs}.weight" for ours, theirs in linears.items()},
        **{f"{ours}/scale": f"{theirs}.weight" for ours, theirs in norms.items()},
        **{f"{ours}/bias": f"{theirs}.bias" for ours, theirs in (linears | norms).items()},
    }


def demand(file: Path, config: Mapping[str, Any], **expected: Any) -> None:
    """Raises a ValueError if an entry of the config has an unsupported value; it may be absent."""
    for name, value in expected.items():
        if (found := config.get(name)) is not None and found != value:
            raise ValueError(f"{file} has {name} = {found!r}; this model supports only {value!r}")


def required(file: Path, config: Mapping[str, Any], name: str) -> Any:
    """A required entry of the config."""
    if name not in config:
        raise ValueError(f"{file} has no entry {name}")
    return config[name]


def open_tokenizer(file: Path) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no exception type of its own
        raise ValueError(f"{file} is damaged: {error}") from error


def read_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """Reads the tokenizer of a model with `vocabulary` tokens.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ValueError: the tokenizer has more tokens than the model.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}")
    tokenizer = open_tokenizer(file)
    if (size := tokenizer.get_vocab_size()) > vocabulary:
        raise ValueError(f"{file} has {size} tokens, the model {vocabulary}")
    tokenizer.no_padding()
    return tokenizer


def llama_config(folder: Path) -> llama.LlamaConfig:
    """Reads the shape of a Llama from the `config.json` in the folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it describes a model that ours does not implement.
    """
    config, file = pretrained.read_config(folder, "llama"), folder / "config.json"
    demand(file, config, hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)
    # Newer files have the rotary embedding in a dict of its own.
    rotary = config.get("rope_parameters") or {}
    demand(file, rotary, rope_type="default")
    shape = llama.LlamaConfig(
        **{ours: required(file, config, theirs) for ours, theirs in SIZES.items()},
        kv_heads=config.get("num_key_value_heads"),
        theta=float(rotary.get("rope_theta", config.get("rope_theta", 10_000.0))),
        epsilon=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings") or False,
    )
    demand(file, config, head_dim=shape.head_dim)
    return shape


def read_llama(folder: Path) -> tuple[llama.LlamaConfig, pretrained.Params]:
    """Reads the shape and the weights of a Llama.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or describes another model.
    """
    config = llama_config(folder)
    shapes = llama.abstract_params(config)
    # Old files also contain the rotary frequencies, or a copy of a tied embedding as the head.
    unused = r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if config.tied else "")
    return config, pretrained.load(folder, shapes, LLAMA_NAMES, unused=unused)


def save_llama(folder: Path, config: llama.LlamaConfig, params: pretrained.Params) -> None:
    """Writes a Llama for Hugging Face's libraries and `read_llama`."""
    pretrained.save(
        folder,
        unstacked(params),
        LLAMA_NAMES,
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
            "num_key_value_heads": config.kv_heads or config.heads,
            "rope_theta": config.theta,
            "rms_norm_eps": config.epsilon,
            "hidden_act": "silu",
            "tie_word_embeddings": config.tied,
            "torch_dtype": str(params["norm"]["scale"].dtype),
        },
    )


def stacked(params: pretrained.Params) -> pretrained.Params:
    """Stacks the weights of the layers, for an encoder or a Llama with `scan=True`."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return params | {"layers": jax.tree.map(lambda *ws: np.stack(ws), *layers)}


def unstacked(params: pretrained.Params) -> pretrained.Params:
    """The inverse of `stacked`; returns weights that are not stacked unchanged."""
    layers = params["layers"]
    if 0 in layers:
        return params
    depth = len(jax.tree.leaves(layers)[0])
    return params | {"layers": {i: jax.tree.map(lambda w, i=i: w[i], layers) for i in range(depth)}}


def encoder_kind(config: roberta.RobertaConfig) -> str:
    """The model_type of an encoder."""
    return next(kind for kind, about in ENCODERS.items() if type(config) is about.config)


def encoder_config(folder: Path) -> roberta.RobertaConfig:
    """Reads the shape of a RoBERTa or BERT from the `config.json` in the folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it describes a model that ours does not implement.
    """
    config, file = pretrained.read_config(folder, *ENCODERS), folder / "config.json"
    about = ENCODERS[config["model_type"]]
    demand(
        file,
        config,
        hidden_act="gelu",
        position_embedding_type="absolute",
        type_vocab_size=about.config.kinds,
    )
    dropout = config.get("hidden_dropout_prob", 0.1)
    return about.config(
        **{ours: required(file, config, theirs) for ours, theirs in SIZES.items()},
        positions=required(file, config, "max_position_embeddings"),
        padding=config.get("pad_token_id", about.config.padding),
        epsilon=config.get("layer_norm_eps", about.epsilon),
        dropout=dropout,
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        classifier_dropout=dropout
        if config.get("classifier_dropout") is None
        else config["classifier_dropout"],
    )


def read_encoder(folder: Path, labels: int) -> tuple[roberta.RobertaConfig, pretrained.Params]:
    """Reads the shape and the weights of a RoBERTa or BERT with a classifier of `labels` outputs.

    A checkpoint of the language model has no classifier: its leaves are then ShapeDtypeStructs,
    which `pretrained.missing` lists. Heads for other tasks are ignored. Tensors of an encoder
    alone, as Sentence Transformers saves it, have no prefix.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or describes another model.
    """
    config = replace(encoder_config(folder), labels=labels)
    kind = encoder_kind(config)
    names = encoder_names(kind)
    if not any(name.startswith(f"{kind}.") for name in pretrained.tensor_names(folder)):
        names = {ours: theirs.removeprefix(f"{kind}.") for ours, theirs in names.items()}
    params = pretrained.load(
        folder,
        jax.eval_shape(unstacked, roberta.abstract_params(config)),
        names,
        unused=ENCODERS[kind].unused,
        optional=ENCODERS[kind].optional,
    )
    return config, stacked(params)


def save_encoder(
    folder: Path,
    config: roberta.RobertaConfig,
    params: pretrained.Params,
    labels: Sequence[str] = (),
) -> None:
    """Writes a RoBERTa or BERT for Hugging Face's libraries and `read_encoder`.

    Args:
        folder: output folder.
        config: shape of the model.
        params: weights as a nested dict.
        labels: names of the labels; by default LABEL_0, LABEL_1, … as Transformers names them.
    """
    kind = encoder_kind(config)
    labels = labels or [f"LABEL_{i}" for i in range(config.labels)]
    pretrained.save(
        folder,
        unstacked(params),
        encoder_names(kind),
        {
            "architectures": [ENCODERS[kind].architecture],
            "model_type": kind,
            **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
            "max_position_embeddings": config.positions,
            "type_vocab_size": config.kinds,
            "pad_token_id": config.padding,
            "layer_norm_eps": config.epsilon,
            "hidden_act": "gelu",
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "classifier_dropout": config.classifier_dropout,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        },
    )
