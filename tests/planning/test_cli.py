"""The command line `python -m natgalore_jax plan`."""

import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import natgalore_jax as natgalore
from natgalore_jax.planning.cli import main
from natgalore_jax.planning.model_shapes import llama


def test_command_prints_a_plan(capsys):
    assert main(["plan", "--model", "60m", "--rank", "128", "--budget", "300MB"]) == 0
    params = llama("60m", "bfloat16")
    planned = natgalore.plan(params, "300MB", rank=128, side="short")
    assert capsys.readouterr().out == f"{planned}\n"


def test_command_options(tmp_path, capsys):
    path = tmp_path / "shapes.json"
    path.write_text('{"up/kernel": [64, 256]}')
    words = "--budget 70KiB --reserve 1KiB --dtype float32 --bits 32 --whole-gradients"
    words += " --recipe natural_galore --side long --multiple 32 --tpu"
    assert main(["plan", "--shapes", str(path), *words.split()]) == 1
    planned = natgalore.plan(
        {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}},
        "70KiB",
        reserve=1024,
        bits=32,
        low_rank_gradients=False,
        recipe=natgalore.natural_galore,
        side="long",
        multiple=32,
        tpu=True,
    )
    assert capsys.readouterr().out == f"{planned}\n"
    assert main(["plan", "--shapes", str(path), "--rank", "0.25"]) == 0
    assert "rank=0.25" in capsys.readouterr().out
    assert main(["plan", "--shapes", str(path), "--rank", "24"]) == 0
    assert "rank=24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--model 60m", "one of the arguments --budget --rank is required"),
        ("--budget 1GB", "one of the arguments --model --shapes is required"),
        ("--model 60m --shapes x --rank 8", "not allowed with argument --model"),
        ("--model 9b --rank 8", "invalid choice: '9b'"),
        ("--model 60m --rank many", "'many' is not a number"),
        ("--model 60m --rank 1.5", "`rank` of a leaf is 1.5"),
        ("--model 60m --rank 8 --dtype f33", "unknown dtype 'f33'"),
        ("--model 60m --budget 24XB", "`budget` must be a number of bytes"),
        ("--shapes no.json --rank 8", "No such file or directory: 'no.json'"),
    ],
)
def test_errors_are_one_line_with_status_2(capsys, words, text):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *words.split()])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("python -m natgalore_jax plan: error: ")
    assert captured.err.count("\n") == 1
    assert text in captured.err
    assert not captured.out


@pytest.mark.parametrize(("words", "text"), [([], "plan"), (["plan"], "--budget BYTES")])
def test_help(capsys, words, text):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(("budget", "status"), [("300MB", 0), ("1MB", 1)])
def test_exit_status_of_the_module(monkeypatch, budget, status):
    words = ["natgalore_jax", "plan", "--model", "60m", "--rank", "8", "--budget", budget]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("natgalore_jax", run_name="__main__")
    assert stopped.value.code == status


@pytest.mark.slow
def test_module_as_a_program():
    command = [sys.executable, "-m", "natgalore_jax", "plan", "--model", "7b", "--budget", "24GiB"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "fits in 24.0 GiB" in ran.stdout
