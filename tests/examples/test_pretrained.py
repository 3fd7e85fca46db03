"""Hugging Face checkpoints: logits against NumPy, reading and writing, invalid files."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.common import bert, hugging_face, llama, pretrained, roberta
from tests.helpers import reference_models as reference
from tests.helpers.cases import slow


STORED = Path(__file__).parents[1] / "data" / "logits.npz"
LABELS = 3
LLAMA = reference.random_tensors(reference.llama_shapes(reference.LLAMA_CONFIG), seed=1)
ROBERTA = reference.random_tensors(
    reference.encoder_shapes(reference.ROBERTA_CONFIG, LABELS), seed=2
)
BERT = reference.random_tensors(reference.encoder_shapes(reference.BERT_CONFIG, LABELS), seed=4)
TOKENS = np.random.default_rng(3).integers(4, 30, size=(2, 9)).astype(np.int32)
SENTENCES = np.where(np.arange(9) < np.array([[9], [6]]), TOKENS, 3)  # the second one is padded
PAIRS = reference.pairs(SENTENCES)
ENCODERS = {  # config, tensors, tokens, logits in NumPy
    "roberta": (reference.ROBERTA_CONFIG, ROBERTA, SENTENCES, reference.roberta_logits),
    "bert": (reference.BERT_CONFIG, BERT, PAIRS, reference.bert_logits),
}
# Float32 against float64: a few hundred roundings of 6e-8 in logits of up to 5.
ROUNDING = 2e-5


def write(folder: Path, tensors, config) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama_folder(tmp_path):
    return write(tmp_path, LLAMA, reference.LLAMA_CONFIG)


@pytest.fixture
def roberta_folder(tmp_path):
    return write(tmp_path, ROBERTA, reference.ROBERTA_CONFIG)


def llama_logits(config, params, tokens=TOKENS):
    structure = llama.structure(config)
    return jax.jit(lambda params: nnx.merge(structure, params)(tokens))(params)


def encoder_logits(config, params, tokens=SENTENCES, dropout=None):
    if isinstance(config, bert.BertConfig):
        config = replace(config, separator=reference.BERT_SEPARATOR)
    structure = nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))[0]

    @jax.jit
    def logits(params):
        rngs = None if dropout is None else nnx.Rngs(dropout=dropout)
        return nnx.merge(structure, params)(tokens, rngs)

    return logits(params)


class TestLogits:
    @pytest.mark.slow
    def test_llama_equals_numpy(self, llama_folder):
        config, params = hugging_face.read_llama(llama_folder)
        expected = [reference.llama_logits(LLAMA, reference.LLAMA_CONFIG, row) for row in TOKENS]
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(llama_logits(config, params), expected, atol=ROUNDING)

    def test_stacking_layers_is_invertible(self, llama_folder):
        config, params = hugging_face.read_llama(llama_folder)
        stacked = hugging_face.stacked(params)
        scanned = llama_logits(replace(config, scan=True), stacked)
        np.testing.assert_allclose(scanned, llama_logits(config, params), atol=ROUNDING)
        jax.tree.map(np.testing.assert_array_equal, hugging_face.unstacked(stacked), params)

    @pytest.mark.parametrize("kind", ENCODERS)
    def test_encoder_equals_numpy(self, kind, tmp_path):
        shape, tensors, tokens, numpy_logits = ENCODERS[kind]
        config, params = hugging_face.read_encoder(write(tmp_path, tensors, shape), LABELS)
        expected = [numpy_logits(tensors, shape, row) for row in tokens]
        assert np.abs(expected).max() > 0.9
        np.testing.assert_allclose(encoder_logits(config, params, tokens), expected, atol=ROUNDING)

    @pytest.mark.parametrize("kind", ["llama", *slow("roberta"), "bert"])
    def test_logits_equal_stored_logits(self, kind, tmp_path):
        """Stored tensors and logits of the NumPy models, see data/README.md."""
        stored = np.load(STORED)
        prefix = f"{kind}/"
        tensors = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
        folder = write(tmp_path, tensors, json.loads(str(stored[f"{kind}_config"])))
        if kind == "llama":
            logits = llama_logits(*hugging_face.read_llama(folder), stored["llama_tokens"])
        else:
            read = hugging_face.read_encoder(folder, LABELS)
            logits = encoder_logits(*read, stored[f"{kind}_tokens"])
        np.testing.assert_allclose(logits, stored[f"{kind}_logits"], atol=ROUNDING)

    @pytest.mark.parametrize("kind", ["llama", *ENCODERS])
    def test_logits_equal_transformers(self, kind, tmp_path):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        configs = {"llama": reference.LLAMA_CONFIG} | {k: v[0] for k, v in ENCODERS.items()}
        config = transformers.AutoConfig.for_model(**configs[kind], num_labels=LABELS)
        classes = {"llama": transformers.AutoModelForCausalLM}
        model = classes.get(kind, transformers.AutoModelForSequenceClassification)
        model = model.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.eval().save_pretrained(tmp_path, safe_serialization=True)
        if kind == "llama":
            given = {"input_ids": TOKENS}
            logits = llama_logits(*hugging_face.read_llama(tmp_path))
        else:
            tokens = ENCODERS[kind][2]
            given = {"input_ids": tokens, "attention_mask": tokens != 3}
            if kind == "bert":
                # The tokenizer's types: 1 after the first separator, at the third token.
                given["token_type_ids"] = (np.arange(9) > 2) & (tokens != 3)
            logits = encoder_logits(*hugging_face.read_encoder(tmp_path, LABELS), tokens)
        given = {k: torch.tensor(v, dtype=torch.long) for k, v in given.items()}
        with torch.no_grad():
            expected = model(**given).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=2 * ROUNDING)


class TestBert:
    def test_parameters_of_bert_base(self):
        leaves = jax.tree.leaves(roberta.abstract_params(bert.BertConfig()))
        assert sum(leaf.size for leaf in leaves) == 109_483_778  # BertForSequenceClassification
        assert bert.BertConfig().longest == 512

    def test_padding_does_not_change_logits(self, tmp_path):
        read = hugging_face.read_encoder(write(tmp_path, BERT, reference.BERT_CONFIG), LABELS)
        short = encoder_logits(*read, PAIRS[1:, :6])
        # Sums of the same terms in another order.
        np.testing.assert_allclose(short, encoder_logits(*read, PAIRS)[1:], atol=ROUNDING)

    def test_gradients_of_embeddings_are_sums_in_float32(self):
        config = bert.BertConfig(
            hidden=4, intermediate=4, heads=1, layers=1, vocabulary=9, dtype=jnp.bfloat16
        )
        model = config.build(nnx.Rngs(0))
        tokens = jnp.full((30, 20), 7)
        grads = nnx.jit(nnx.grad(lambda model: model.embed(tokens).sum()))(model)
        # In bfloat16 a sum of ones stops at 256.
        np.testing.assert_array_equal(grads.kinds.embedding[0], 600)
        np.testing.assert_array_equal(grads.words.embedding[7], 600)
        assert nnx.eval_shape(lambda: model(tokens)).dtype == jnp.bfloat16


class TestRoberta:
    def test_parameters_of_roberta_base(self):
        sizes = [
            leaf.size for leaf in jax.tree.leaves(roberta.abstract_params(roberta.RobertaConfig()))
        ]
        assert sum(sizes) == 124_647_170  # of RobertaForSequenceClassification, two labels
        assert roberta.RobertaConfig().longest == 512

    def test_position_ids_skip_padding(self):
        tokens = jnp.array([[5, 6, 3, 3], [3, 5, 3, 7]])
        np.testing.assert_array_equal(roberta.position_ids(tokens, 3), [[4, 5, 3, 3], [3, 4, 3, 5]])

    def test_padding_does_not_change_logits(self, roberta_folder):
        config, params = hugging_face.read_encoder(roberta_folder, LABELS)
        short = encoder_logits(config, params, SENTENCES[1:, :6])
        # Sums of the same terms in another order.
        np.testing.assert_allclose(short, encoder_logits(config, params)[1:], atol=ROUNDING)

    def test_each_layer_has_its_own_dropout(self):
        config = roberta.RobertaConfig(
            hidden=16, intermediate=24, heads=2, layers=3, vocabulary=9, positions=4, dropout=0.5
        )
        output = lambda model: model.encode(jnp.array([[7]]), nnx.Rngs(dropout=1))
        weights = np.random.default_rng(0).standard_normal(config.hidden)
        loss = lambda model: output(model)[0, 0] @ weights
        grads = nnx.jit(nnx.grad(loss))(config.build(nnx.Rngs(0)))
        # With one token, the gradient of an output bias is zero where the output is dropped.
        kept = np.asarray(grads.layers.down.bias[...] != 0)
        assert len(np.unique(kept, axis=0)) == config.layers
        assert 0 < kept.mean() < 1

    @pytest.mark.slow
    def test_dropout_needs_rngs_and_a_rate(self, roberta_folder):
        config, params = hugging_face.read_encoder(roberta_folder, LABELS)
        none = dict.fromkeys(("dropout", "attention_dropout", "classifier_dropout"), 0.0)
        plain = encoder_logits(config, params)
        for name in none:
            one = replace(config, **none | {name: 0.5})
            first, again, other = (encoder_logits(one, params, dropout=seed) for seed in (0, 0, 1))
            np.testing.assert_array_equal(first, again)
            assert np.abs(first - other).max() > 1e-2
        off = encoder_logits(replace(config, **none), params, dropout=0)
        np.testing.assert_allclose(off, plain, atol=ROUNDING)


def shards(folder: Path) -> Path:
    """The Llama in two files and an index."""
    halves = dict(list(LLAMA.items())[:7]), dict(list(LLAMA.items())[7:])
    weight_map = {}
    for i, half in enumerate(halves):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(half, folder / name)
        weight_map |= dict.fromkeys(half, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(reference.LLAMA_CONFIG))
    return folder


class TestFiles:
    def test_sharded_checkpoint_equals_one_file(self, tmp_path):
        (tmp_path / "one").mkdir()
        _, one = hugging_face.read_llama(write(tmp_path / "one", LLAMA, reference.LLAMA_CONFIG))
        _, several = hugging_face.read_llama(shards(tmp_path))
        jax.tree.map(np.testing.assert_array_equal, one, several)

    def test_bfloat16_tensors_are_cast(self, tmp_path):
        half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in LLAMA.items()}
        _, params = hugging_face.read_llama(write(tmp_path, half, reference.LLAMA_CONFIG))
        kernel = params["layers"][1]["mlp"]["down"]["kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(
            kernel, half["model.layers.1.mlp.down_proj.weight"].T.astype(np.float32)
        )

    def test_saved_llama_equals_the_original(self, llama_folder, tmp_path):
        config, params = hugging_face.read_llama(llama_folder)
        for name, tree in (("plain", params), ("stacked", hugging_face.stacked(params))):
            hugging_face.save_llama(tmp_path / name, config, tree)
            saved = load_file(tmp_path / name / "model.safetensors")
            assert saved.keys() == LLAMA.keys()
            for key, tensor in saved.items():
                np.testing.assert_array_equal(tensor, LLAMA[key])
            assert hugging_face.llama_config(tmp_path / name) == config

    def test_tied_llama(self, tmp_path):
        shape = reference.LLAMA_CONFIG | {"tie_word_embeddings": True}
        tensors = {k: v for k, v in LLAMA.items() if k != "lm_head.weight"}
        config, params = hugging_face.read_llama(write(tmp_path, tensors, shape))
        assert "head" not in params
        head = LLAMA["model.embed_tokens.weight"]
        expected = reference.llama_logits(LLAMA | {"lm_head.weight": head}, shape, TOKENS[0])
        logits = llama_logits(config, params, TOKENS[:1])
        np.testing.assert_allclose(logits[0], expected, atol=ROUNDING)
        hugging_face.save_llama(tmp_path / "again", config, params)
        assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()
        assert hugging_face.llama_config(tmp_path / "again") == config
        # A copy of the embedding as the head is ignored, as Transformers does.
        again, same = hugging_face.read_llama(write(tmp_path, LLAMA, shape))
        jax.tree.map(np.testing.assert_array_equal, (again, same), (config, params))

    @pytest.mark.parametrize("kind", ENCODERS)
    def test_saved_encoder_equals_the_original(self, kind, tmp_path):
        shape, tensors, *_ = ENCODERS[kind]
        (tmp_path / "one").mkdir()
        config, params = hugging_face.read_encoder(write(tmp_path / "one", tensors, shape), LABELS)
        hugging_face.save_encoder(tmp_path / "again", config, params, ["a", "b", "c"])
        saved = load_file(tmp_path / "again" / "model.safetensors")
        assert saved.keys() == tensors.keys()
        for key, tensor in saved.items():
            np.testing.assert_array_equal(tensor, tensors[key])
        again, _ = hugging_face.read_encoder(tmp_path / "again", LABELS)
        assert again == config
        names = json.loads((tmp_path / "again/config.json").read_text())["id2label"]
        assert names == {"0": "a", "1": "b", "2": "c"}

    def test_encoder_without_prefix_and_head_is_read(self, tmp_path):
        """A checkpoint of Sentence Transformers has the tensors of the encoder alone."""
        alone = {k.removeprefix("bert."): v for k, v in BERT.items() if k.startswith("bert.")}
        alone["embeddings.position_ids"] = np.arange(14)[None]
        config, params = hugging_face.read_encoder(
            write(tmp_path, alone, reference.BERT_CONFIG), LABELS
        )
        assert type(config) is bert.BertConfig
        assert sorted(pretrained.missing(params)) == [
            "classifier/head/bias",
            "classifier/head/kernel",
        ]
        np.testing.assert_array_equal(
            params["classifier"]["dense"]["kernel"], BERT["bert.pooler.dense.weight"].T
        )

    def test_error_lists_all_wrong_tensors(self, tmp_path):
        tensors = dict(LLAMA)
        for i in range(2):
            del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
        tensors["lm_head.weight"] = np.zeros((24, 30), np.float32)
        with pytest.raises(ValueError, match="do not fit the model") as error:
            hugging_face.read_llama(write(tmp_path, tensors, reference.LLAMA_CONFIG))
        assert str(error.value).partition("model: ")[2] == (
            "missing: model.layers.*.mlp.up_proj.weight (2), model.norm.weight; "
            "unknown: model.layers.2.mlp.up_proj.weight; "
            "lm_head.weight is (24, 30), not (30, 24)"
        )

    def test_unused_tensors_are_ignored(self, tmp_path):
        """Rotary frequencies in old Llamas; the head of a language model beside a classifier."""
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
        hugging_face.read_llama(write(tmp_path, LLAMA | extra, reference.LLAMA_CONFIG))
        tensors = {k: v for k, v in ROBERTA.items() if not k.startswith("classifier")}
        tensors |= {
            name: np.zeros(1, np.float32)
            for name in ("lm_head.bias", "roberta.pooler.dense.bias", "roberta.x.position_ids")
        }
        folder = write(tmp_path, tensors, reference.ROBERTA_CONFIG)
        _, params = hugging_face.read_encoder(folder, LABELS)
        assert sorted(pretrained.missing(params)) == [
            f"classifier/{part}/{leaf}" for part in ("dense", "head") for leaf in ("bias", "kernel")
        ]
        assert params["classifier"]["head"]["kernel"].shape == (24, 3)

    def test_head_with_other_labels_is_refused(self, roberta_folder):
        with pytest.raises(
            ValueError, match=r"classifier.out_proj.weight is \(3, 24\), not \(2, 24\)"
        ):
            hugging_face.read_encoder(roberta_folder, 2)

    def test_incomplete_download_is_refused(self, llama_folder, tmp_path):
        file = llama_folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(
            ValueError, match=r"model.safetensors is truncated .* download it again"
        ):
            hugging_face.read_llama(llama_folder)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"no model.safetensors at"):
            hugging_face.read_llama(llama_folder)
        (llama_folder / "pytorch_model.bin").touch()
        with pytest.raises(FileNotFoundError, match=r"PyTorch weights, .bin, are not supported"):
            hugging_face.read_llama(llama_folder)
        shards(tmp_path)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002.safetensors"):
            hugging_face.read_llama(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "bert"}, "config.json does not have model_type 'llama'"),
            ({"rope_scaling": {"type": "linear"}}, "has rope_scaling = {'type': 'linear'}"),
            ({"head_dim": 8}, "has head_dim = 8; this model supports only 4"),
            ({"attention_bias": True}, "has attention_bias = True"),
            ({"rope_parameters": {"rope_type": "yarn"}}, "has rope_type = 'yarn'"),
        ],
    )
    def test_unsupported_model_is_refused(self, tmp_path, change, message):
        write(tmp_path, LLAMA, reference.LLAMA_CONFIG | change)
        with pytest.raises(ValueError, match=message):
            hugging_face.read_llama(tmp_path)

    def test_invalid_config_json_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"it has no config.json"):
            hugging_face.read_llama(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config.json is not JSON"):
            hugging_face.read_llama(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ValueError, match="has no entry hidden_size"):
            hugging_face.read_llama(tmp_path)

    def test_rope_theta_of_newer_configs(self, tmp_path):
        config = {k: v for k, v in reference.LLAMA_CONFIG.items() if k != "rope_theta"}
        rotary = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "head_dim": None}
        (tmp_path / "config.json").write_text(json.dumps(config | rotary))
        assert hugging_face.llama_config(tmp_path).theta == 7.0

    def test_tinyllama_config(self, tmp_path):
        config = {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_hidden_layers": 22,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = hugging_face.llama_config(tmp_path)
        assert read == llama.CONFIGS["tinyllama"]
        sizes = [leaf.size for leaf in jax.tree.leaves(llama.abstract_params(read))]
        assert sum(sizes) == 1_100_048_384
