"""seven_billion.py at a small size: dtypes of weights and state, training step, memory limit."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgalore_jax as natgalore
from examples.common import llama, run_log, training_loop
from examples.pretraining import pretrain, seven_billion
from tests.helpers.example_runs import (
    TEXT,
    assert_same_run,
    interrupt,
    log_without_times,
    refused,
    stop_at,
)


make_functions = functools.cache(pretrain.make_functions)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line in a temporary folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(TEXT)
    tiny = dataclasses.replace(llama.CONFIGS["tiny"], hidden=128, intermediate=160, layers=2)
    monkeypatch.setitem(llama.CONFIGS, "tiny", tiny)
    monkeypatch.setattr(seven_billion, "LAYERS_IN_A_STACK", 2)
    monkeypatch.setattr(training_loop, "LOG_EVERY", 2)
    monkeypatch.setattr(pretrain, "SAMPLE_TOKENS", 20)
    monkeypatch.setattr(pretrain, "VALIDATION_BATCHES", 2)

    def once(config):
        fixed = config.fixed() | {"micro_batches": config.micro_batches}
        return make_functions(seven_billion.Config(**fixed))

    monkeypatch.setattr(pretrain, "make_functions", once)
    small = "--size tiny --text text --steps 6 --seq-len 16 --rank 32 --vocabulary 256"
    small += " --batch-size 2 --micro-batches 2"

    def run(*arguments: str) -> int:
        given = arguments if "--resume" in arguments else (*small.split(), *arguments)
        monkeypatch.setattr(sys, "argv", ["seven_billion.py", *given])
        try:
            seven_billion.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def config(**settings) -> seven_billion.Config:
    given = {"size": "tiny", "seq_len": 16, "rank": 32, "steps": 6, "vocabulary": 256}
    given |= {"batch_size": 2, "micro_batches": 2} | settings
    return seven_billion.Config(**given).runs()[0]


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(2, 17)).astype(np.int32)


def test_weights_are_bfloat16_and_state_8_bit(run, monkeypatch):
    four = dataclasses.replace(llama.CONFIGS["tiny"], layers=4)
    monkeypatch.setitem(llama.CONFIGS, "small", four)
    state = jax.eval_shape(make_functions(config(size="small")).init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert len(state.params["layers"]) == 2  # stacks
    sizes = {}
    for x in jax.tree.leaves(state.opt_state):
        sizes[x.dtype.name] = sizes.get(x.dtype.name, 0) + x.size * x.dtype.itemsize
    # Twice two layers of 4 x 128² and 3 x 128 x 160: cores of 32 rows, bases of 128, in bytes.
    cores = 4 * 32 * (4 * 128 + 3 * 160)
    bases = 4 * 7 * 128 * 32
    ends = 2 * 256 * 128
    assert sizes["uint8"] == cores + ends
    assert sizes["int8"] == cores + ends + bases
    # Blocks of 32 numbers at least have a scale in float32; norms are too small to be worth it.
    assert sizes["float32"] <= 4 * (sizes["uint8"] + sizes["int8"]) / 32 + 2 * 4 * 9 * 128


@pytest.mark.slow
def test_step_equals_that_of_full_gradients(run):
    """Up to rounding: the bases come from passes in one case and from the gradient in the other."""
    # 32 tokens make gradients of rank 32, whose last directions are bfloat16's rounding: take 16.
    settings = config(dtype="float32", rank=16)
    functions = make_functions(settings)
    state = functions.init(jax.random.key(0))
    tx = settings.make_optimizer()
    structure = llama.structure(settings.model)

    def loss_fn(params, tokens):
        each = lambda one: llama.next_token_loss(nnx.merge(structure, params), one[None])
        return jax.lax.map(each, tokens).mean()

    @jax.jit
    def step(params, opt_state, tokens):
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        loss, grads = jax.value_and_grad(
            lambda wide: loss_fn(jax.tree.map(lambda w: w.astype(jnp.bfloat16), wide), tokens)
        )(wide)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = jax.jit(tx.init)(state.params)
    moved, _, loss = step(state.params, opt_state, tokens(0))
    begun = jax.tree.map(np.asarray, state.params)
    state, ours = functions.train_step(state, tokens(0))
    np.testing.assert_allclose(ours, loss, rtol=1e-6)  # the same program, summed in another order
    cosines = []
    for old, one, other in zip(*map(jax.tree.leaves, (begun, moved, state.params)), strict=True):
        a, b = (np.asarray(x, np.float32) - np.asarray(old, np.float32) for x in (one, other))
        # Adam's first answer is a sign, which rounding turns where a gradient is nearly zero.
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        cosines.append(cosine)
    assert min(cosines) > 0.98, cosines  # the least is value's, 0.988


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--limit -1", "--limit must not be negative, got -1.0"),
        ("--limit 81", "--limit is 81 GiB, but the GPU has 80.0 GiB"),
        ("--residual whitened", "--residual needs full gradients: drop --low-rank-gradients"),
        ("--optimizer adamw", "--optimizer must be one of galore, got 'adamw'"),
        ("--rank 0", "--rank must be at least 1"),
    ],
)
def test_invalid_input_gives_one_line(run, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(seven_billion, "gpu_bytes", lambda: 80 * 2**30)
    assert run(*arguments.split()) == 2
    assert message in refused(capsys)


@pytest.mark.slow
def test_resumed_run_is_bitwise_equal(run, monkeypatch, capsys):
    arguments = ["--refresh-every", "2", "--validate-every", "4", "--limit", "0"]
    assert run(*arguments, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4, interrupt)
        assert run(*arguments, "--out", "parts") == 130
    assert run("--out", "parts", "--resume") == 0
    assert_same_run("parts", "whole")
    records = log_without_times("whole")[1:]
    assert records[-1]["validation_loss"] < records[0]["validation_loss"]


@pytest.mark.slow
def test_memory_limit_is_set_before_jax_starts(tmp_path):
    program = """
import os, sys
from jax._src import xla_bridge
from examples.pretraining import seven_billion
seven_billion.gpu_bytes = lambda: 96 * 2**30
sys.argv = ["seven_billion.py"]
config = seven_billion.from_command_line()
print(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"], xla_bridge.backends_are_initialized())
print(config.vocabulary)
"""
    folder = str(Path(seven_billion.__file__).parent)
    path = os.pathsep.join([folder, str(Path(natgalore.__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert result.stdout.split() == ["0.250000", "False", "32000"]


def test_peak_memory_from_the_allocator(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 20, "bytes_limit": 24, "num_allocs": 3}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert run_log.peak_bytes() == {"peak_bytes_in_use": 20, "bytes_limit": 24}
    Device.memory_stats = lambda self: None
    assert run_log.peak_bytes() == {}
