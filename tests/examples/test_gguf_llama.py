"""gguf_llama.py: a Llama and its tokenizer from a GGUF file; invalid files; the real model."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.common import chat_format, gguf_llama, hugging_face, llama
from examples.pretraining import generate
from tests.helpers import reference_models as reference


CONFIG = reference.LLAMA_CONFIG | {
    "hidden_size": 64,  # quantized blocks have 32 weights
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
TENSORS = reference.random_tensors(reference.llama_shapes(CONFIG), seed=5)
LAYER = {  # names in llama.cpp's gguf-py/gguf/constants.py
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{
        f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{ours}.weight"
        for i in range(CONFIG["num_hidden_layers"])
        for theirs, ours in LAYER.items()
    },
}
TEXT = "The 1st of 12 cafés:\n  f(x=345)<|im_end|>\n"


def by_neighbours(weight: np.ndarray, width: int) -> np.ndarray:
    """The rows of a query or key matrix in llama.cpp's order, one at a time."""
    rows = []
    for head in range(len(weight) // width):
        for i in range(width // 2):
            rows += [weight[head * width + i], weight[head * width + width // 2 + i]]
    return np.array(rows)


def small_tokenizer() -> Tokenizer:
    """A tokenizer as SmolLM2's, trained on a line of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [
        f"{a}{b} {b}{a} the of café" for a in ("ab", "cde", "fg", "hij") for b in ("klm", "no")
    ]
    tokenizer.train_from_iterator(words * 3, trainer)
    return tokenizer


def write(file: Path, *, tied: bool = False, kind=gguf.GGMLQuantizationType.F32, **entries) -> Path:
    """Writes the model as llama.cpp's converter does; `entries` replace entries, None drops one."""
    state = small_tokenizer()
    vocabulary = sorted(state.get_vocab(), key=state.get_vocab().get)
    vocabulary += [f"[PAD{i}]" for i in range(CONFIG["vocab_size"] - len(vocabulary))]
    vocabulary[-1] = "12"  # never used: digits are separate tokens
    merges = json.loads(state.to_str())["model"]["merges"]
    given = {
        "llama.embedding_length": CONFIG["hidden_size"],
        "llama.feed_forward_length": CONFIG["intermediate_size"],
        "llama.attention.head_count": CONFIG["num_attention_heads"],
        "llama.attention.head_count_kv": CONFIG["num_key_value_heads"],
        "llama.block_count": CONFIG["num_hidden_layers"],
        "llama.vocab_size": CONFIG["vocab_size"],
        "llama.rope.freq_base": CONFIG["rope_theta"],
        "llama.rope.dimension_count": 8,
        "llama.attention.layer_norm_rms_epsilon": CONFIG["rms_norm_eps"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.merges": [*map(" ".join, merges), "1 2"],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(vocabulary) - 3),
    } | {name.replace("__", "."): value for name, value in entries.items()}
    writer = gguf.GGUFWriter(file, given.pop("architecture", "llama"))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in given.items():
        if value is not None:
            add.get(type(value), writer.add_array)(name, value)
    for name, tensor in TENSORS.items():
        if name == "lm_head.weight" and tied:
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = by_neighbours(tensor, 8)
        if tensor.ndim == 2:
            tensor = gguf.quantize(tensor, kind)
            writer.add_tensor(NAMES[name], tensor, raw_dtype=kind)
        else:
            writer.add_tensor(NAMES[name], tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_numpy(tied, tmp_path):
    config, params, _ = gguf_llama.read(write(tmp_path / "model.gguf", tied=tied))
    assert config.tied == tied
    assert config.epsilon == CONFIG["rms_norm_eps"]  # not its float32
    head = TENSORS["model.embed_tokens.weight" if tied else "lm_head.weight"]
    tokens = np.random.default_rng(1).integers(320, size=9).astype(np.int32)
    expected = reference.llama_logits(TENSORS | {"lm_head.weight": head}, CONFIG, tokens)
    structure = llama.structure(config)
    logits = jax.jit(lambda params: nnx.merge(structure, params)(tokens[None])[0])(params)
    # Float32 against float64: logits of up to 20, a few hundred roundings of 6e-8 of them.
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_converted_model_is_read_as_hugging_faces(tmp_path):
    file = write(tmp_path / "model.gguf", tied=True)
    config = gguf_llama.convert(file, tmp_path / "model")
    again, params = hugging_face.read_llama(tmp_path / "model")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, gguf_llama.read(file).params)
    for name, tensor in TENSORS.items():
        if name.endswith("q_proj.weight"):
            i = int(name.split(".")[2])
            kernel = params["layers"][i]["attention"]["query"]["kernel"]
            np.testing.assert_array_equal(kernel, tensor.T)
    tokenizer = hugging_face.read_tokenizer(tmp_path / "model", config.vocabulary)
    assert tokenizer.encode(TEXT).ids == small_tokenizer().encode(TEXT).ids


def test_quantized_weights_are_those_of_the_file(tmp_path):
    """Q4_1: blocks of 32 weights w = d q + m, with 16 levels q."""
    file = write(tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType.Q4_1)
    found = gguf_llama.read(file).params["layers"][1]["mlp"]["up"]["kernel"].T
    blocks = TENSORS["model.layers.1.mlp.up_proj.weight"].astype(np.float64).reshape(-1, 32)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    step = (high - low) / 15
    # The nearest level; d and m are float16, 11 bits of a magnitude of up to 1.5.
    error = np.abs(found.reshape(-1, 32) - blocks)
    assert np.all(error <= step / 2 + 16 * 2**-11)
    assert np.mean(error > step / 8) > 0.5
    assert max(len(np.unique(block)) for block in found.reshape(-1, 32)) <= 16


def test_tokenizer_equals_the_original(tmp_path):
    tokenizer, original = (
        gguf_llama.read(write(tmp_path / "model.gguf")).tokenizer,
        small_tokenizer(),
    )
    ids = tokenizer.encode(TEXT).ids
    assert ids == original.encode(TEXT).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.decode(ids) == TEXT.replace("<|im_end|>", "")
    assert [tokenizer.id_to_token(i) for i in ids].count("<|im_end|>") == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architecture": "qwen2"}, "has general.architecture = 'qwen2'; supported is 'llama'"),
        ({"tokenizer__ggml__pre": "tekken"}, "has tokenizer.ggml.pre = 'tekken'"),
        ({"tokenizer__ggml__model": "llama"}, "has tokenizer.ggml.model = 'llama'"),
        ({"llama__rope__dimension_count": 4}, "has llama.rope.dimension_count = 4; supported is 8"),
        ({"llama__rope__freq_base": None}, "has no entry llama.rope.freq_base"),
        (
            {"llama__block_count": 1},
            "has other tensors than a Llama: blk.1.attn_k.weight, blk.1.attn_",
        ),
        ({"llama__feed_forward_length": 64}, "is (64, 96), not (64, 64)"),
    ],
    ids=range(7),
)
def test_unsupported_file_is_refused(tmp_path, entries, message):
    with pytest.raises(ValueError, match=r".") as error:
        gguf_llama.read(write(tmp_path / "model.gguf", **entries))
    assert message in str(error.value)


def test_damaged_file_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(FileNotFoundError):
        gguf_llama.read(file)
    file.write_bytes(b"no model" * 9)
    with pytest.raises(ValueError, match=r"model.gguf is truncated or not a GGUF file"):
        gguf_llama.read(file)
    write(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model.gguf is truncated or not a GGUF file"):
        gguf_llama.read(file)


MODEL = Path(gguf_llama.__file__).parents[2] / "runs/calls/model"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="examples/finetuning/fetch_calls.py fetches it")
def test_smollm2_answers():
    writer = generate.read(MODEL)
    assert sum(w.size for w in jax.tree.leaves(writer.params)) == 134_515_008
    asked = chat_format.CHATML.prompt([("user", "What is the capital of France?")])
    drawn = generate.generate(
        writer.config,
        writer.params,
        writer.encode(asked),
        count=12,
        temperature=0.0,
        seed=0,
        end=writer.end,
    )
    assert writer.decode(list(drawn)) == "The capital of France is Paris."
