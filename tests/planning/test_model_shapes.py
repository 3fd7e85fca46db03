"""Shapes of the paper's Llamas and of files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from examples.common import llama
from natgalore_jax.planning import model_shapes as shapes
from natgalore_jax.planning.cli import main


F32, BF16 = jnp.float32, jnp.bfloat16


@pytest.mark.parametrize("size", shapes.LLAMA)
def test_llamas_equal_those_of_the_examples(size):
    scanned = dataclasses.replace(llama.CONFIGS[size], scan=True)
    assert shapes.llama(size) == llama.abstract_params(scanned)


def test_read_shapes(tmp_path):
    plain = tmp_path / "shapes.json"
    plain.write_text('{"up/kernel": [64, 256], "norm/scale": [[64], "float32"], "scalar": []}')
    expected = {
        "up": {"kernel": jax.ShapeDtypeStruct((64, 256), BF16)},
        "norm": {"scale": jax.ShapeDtypeStruct((64,), F32)},
        "scalar": jax.ShapeDtypeStruct((), BF16),
    }
    assert shapes.read_shapes([plain], "bfloat16") == expected
    named = {
        "__metadata__": {"format": "pt"},
        "model.up.weight": {"dtype": "BF16", "shape": [256, 64], "data_offsets": [0, 32768]},
        "model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [32768, 33024]},
    }
    header = tmp_path / "header.json"
    header.write_text(json.dumps(named))
    model = tmp_path / "model.safetensors"
    text = json.dumps(named).encode()
    model.write_bytes(len(text).to_bytes(8, "little") + text + bytes(33024))
    tensors = {
        "model.up.weight": jax.ShapeDtypeStruct((256, 64), BF16),
        "model.norm.weight": jax.ShapeDtypeStruct((64,), F32),
    }
    for path in (header, model):
        assert shapes.read_shapes([path]) == tensors
    assert shapes.read_shapes([plain, model], "bfloat16") == expected | tensors


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "must hold a JSON object, name -> shape"),
        ("{", "is neither JSON nor a .safetensors file"),
        ('{"metadata": {}, "weight_map": {"w": "a.safetensors"}}', "is an index .* no shapes"),
        ('{"w": 3}', "'w' must have a shape, a list of sizes, got 3"),
        ('{"w": [3, -1]}', "'w' must have a shape"),
        ('{"w": [3, true]}', "'w' must have a shape"),
        ('{"w": {"dtype": "F32"}}', "'w' must have a shape"),
        ('{"w": [[3], "f33"]}', "'w' has an unknown dtype, 'f33'"),
        ('{"w": [[3], 7]}', "'w' has an unknown dtype, 7"),
        ('{"w": [3], "w/b": [3]}', "'w/b' is below another leaf"),
        ('{"w/b": [3], "w": [3]}', "'w' occurs twice"),
        ("{}", "list no shapes"),
    ],
)
def test_invalid_files_of_shapes(tmp_path, capsys, text, match):
    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        shapes.read_shapes([path])
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--shapes", str(path), "--budget", "1GB"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_invalid_safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"is neither JSON nor a .safetensors file: a header of"):
        shapes.read_shapes([path])
