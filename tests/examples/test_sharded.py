"""sharded.py on simulated devices: losses of pretrain.py, shardings, resuming, signals."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.common.hlo import collectives
from examples.common import llama, training_loop
from examples.pretraining import llama_sharding, pretrain, sharded
from tests.helpers.example_runs import (
    TEXT,
    CompiledOnce,
    assert_same_run,
    contents,
    interrupt,
    log_without_times,
    refused,
    stop_at,
)


SETTINGS = """--text text --steps 4 --refresh-every 2 --save-every 3 --rank 4
    --batch-size 8 --seq-len 16 --lr 1e-3"""
ROWS = 8 // 4  # of the batch, on each of data x fsdp


@pytest.fixture
def run(monkeypatch, small):
    """Runs the command line of an example, and returns its exit status.

    `run.functions` has the functions of each config of sharded.py.
    """
    Path("text").write_text(TEXT)
    monkeypatch.setattr(training_loop, "LOG_EVERY", 1)
    for name, value in {"SAMPLE_TOKENS": 20, "VALIDATION_BATCHES": 1}.items():
        monkeypatch.setattr(pretrain, name, value)
    make = sharded.make_functions

    def make_once(config):
        config = replace(config, out=None, resume=False)
        if config not in run.functions:
            functions = make(config)
            step = CompiledOnce(functions.train_step)
            run.functions[config] = functions._replace(train_step=step)
        return run.functions[config]

    def run(example, *arguments: str) -> int:
        given = arguments if "--resume" in arguments else (*SETTINGS.split(), *arguments)
        monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *given])
        try:
            example.main()
        except SystemExit as end:
            return end.code
        return 0

    run.functions = {}
    monkeypatch.setattr(sharded, "make_functions", make_once)
    return run


def losses(folder: str) -> list[float]:
    return [x["train_loss"] for x in log_without_times(folder) if "train_loss" in x]


@pytest.mark.slow
def test_mesh_run_equals_one_device_and_resumes_its_checkpoint(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, interrupt)
        assert run(pretrain, "--out", "one") == 130
    assert run(sharded, "--mesh", "2,2,2", "--out", "whole") == 0

    with monkeypatch.context() as patch:
        stop_at(patch, 3, interrupt)
        assert run(sharded, "--mesh", "2,2,2", "--out", "stopped") == 130
    assert "sharded.py --out stopped --resume" in capsys.readouterr().err
    assert run(sharded, "--out", "stopped", "--resume") == 0
    assert_same_run("stopped", "whole")

    assert run(sharded, "--out", "one", "--resume", "--mesh", "2,2,2") == 0
    # Sums in another order: some units in the last place of float32, through two refreshes. A row
    # of the batch or a shard in the wrong place changes the third digit.
    np.testing.assert_allclose(losses("one"), losses("whole"), rtol=2e-6)

    # A device stores its shards and communicates activations of its own rows only.
    (functions,) = run.functions.values()
    program = functions.train_step.compile()
    state = jax.eval_shape(functions.init, jax.random.key(0))
    shapes = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state)]
    tokens = ROWS * (16 + 1)
    expected = 4 * (sum(map(math.prod, shapes)) + tokens)
    assert program.memory_analysis().argument_size_in_bytes == expected
    activations = [
        (one.kind, shape[0])
        for one in collectives(program.as_text())
        for shape in one.shapes
        if len(shape) > 2 and shape[-1] >= 32  # but for lookups of half of an embedding each
    ]
    assert {rows for _, rows in activations} == {ROWS}
    # The residual stream is put together once; then each layer only sums over the axis tensor.
    assert [kind for kind, _ in activations].count("all-gather") == 1


@pytest.mark.slow
def test_checkpoint_resumes_on_any_mesh(run):
    assert run(sharded, "--scan", "--mesh", "2,2,2", "--out", "whole") == 0
    Path("whole").rename("here")
    for mesh in ("1,4,2", "8,1,1"):
        assert run(sharded, "--out", "here", "--resume", "--mesh", mesh) == 0
    before = losses("here")
    assert run(sharded, "--scan", "--zero", "--mesh=4,-1,1", "--out", "other") == 0
    np.testing.assert_allclose(losses("other"), before, rtol=2e-6)  # as above


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Two processes with two devices each; a signal to one stops both after the same step."""
    (tmp_path / "text").write_text(TEXT)
    command = [
        sys.executable,
        sharded.__file__,
        *f"{SETTINGS} --steps 200 --optimizer adamw".split(),
    ]
    command += ["--save-every", "1000", "--mesh", "2,1,2"]
    job = os.getpid() % 4096  # JAX takes the port from it
    cluster = {
        "OMPI_MCA_orte_hnp_uri": f"{4096 * job}.0;tcp://127.0.0.1:1234",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, "--devices", "2", "--distributed", "--out", "two"],
                    env=os.environ
                    | cluster
                    | {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank},
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in ("0", "1")
        ]
        log = tmp_path / "two" / "log.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert both[0].poll() is None
            time.sleep(0.05)
        both[1].send_signal(signal.SIGINT)
        (out, err), (other_out, other_err) = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [130, 130]
    assert "interrupted at step" in err
    assert "interrupted at step" in other_err
    assert "tokens/s" in out
    assert other_out == "" or "Gloo" in other_out
    step = int(re.search(r"interrupted at step (\d+)", err)[1])
    assert step % 10 == 0
    assert step < 200
    again = [sys.executable, sharded.__file__, "--out", "two", "--resume", "--devices", "4"]
    subprocess.run(again, cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(
        [*command, "--devices", "4", "--out", "one"], cwd=tmp_path, check=True, capture_output=True
    )
    with contextlib.chdir(tmp_path):
        np.testing.assert_array_equal(losses("two"), losses("one"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh 3,2,1", "a mesh of 3 x 2 x 1 does not fit 8 devices"),
        ("--mesh 3,-1,1", "a mesh of 3 x -1 x 1 does not fit 8 devices"),
        ("--mesh 16,-1,1", "a mesh of 16 x -1 x 1 does not fit 8 devices"),
        ("--mesh 2,2", "--mesh must be three sizes, e.g. 2,2,2 or 1,-1,1, got 2,2"),
        ("--mesh 2,2,0", "--mesh must be three sizes"),
        ("--mesh 2,2,x", "--mesh must be three sizes"),
        ("--mesh=-1,-1,1", "--mesh can have only one -1, got -1,-1,1"),
        ("--batch-size 6", "--batch-size must be a multiple of data x fsdp, 8, got 6"),
        ("--batch-size 6 --mesh 2,2,2", "--batch-size must be a multiple of data x fsdp, 4, got"),
        ("--devices 0", "--devices must be at least 1 and below 2**10, got 0"),
        ("--steps 0", "--steps must be at least 1"),
        ("--resume --out nowhere", "nowhere has no run to resume"),
    ],
)
def test_invalid_input_gives_one_line(run, capsys, arguments, message):
    before = contents()
    assert run(sharded, *arguments.split()) == 2
    assert message in refused(capsys)
    assert contents() == before


class TestShards:
    def specs(self, size, shape, **settings):
        mesh = llama_sharding.make_mesh(shape)
        params = llama.abstract_params(replace(llama.CONFIGS[size], **settings))
        return jax.tree.map(lambda s: s.spec, llama_sharding.param_shardings(mesh, params))

    @pytest.mark.slow
    def test_sharding_rules_by_name(self):
        specs = self.specs("350m", (2, 2, 2))
        into, out = P("fsdp", "tensor"), P("tensor", "fsdp")
        assert specs["embed"]["embedding"] == specs["head"]["kernel"] == into
        assert specs["norm"]["scale"] == P()
        layer = specs["layers"][23]
        assert {name: x["kernel"] for name, x in layer["attention"].items()} == {
            **dict.fromkeys(("query", "key", "value"), into),
            "out": out,
        }
        assert {name: x["kernel"] for name, x in layer["mlp"].items()} == {
            **dict.fromkeys(("gate", "up"), into),
            "down": out,
        }
        assert layer["attention_norm"]["scale"] == layer["mlp_norm"]["scale"] == P()

    def test_stacked_layers_are_sharded_alike(self):
        layers = self.specs("350m", (2, 2, 2), scan=True)["layers"]
        assert layers["mlp"]["gate"]["kernel"] == P(None, "fsdp", "tensor")
        assert layers["attention"]["out"]["kernel"] == P(None, "tensor", "fsdp")
        assert layers["mlp_norm"]["scale"] == P()

    def test_indivisible_axes_are_replicated(self):
        mlp = self.specs("1b", (1, 4, 2))["layers"][0]["mlp"]  # 2048 x 5461
        assert mlp["gate"]["kernel"] == P("fsdp")
        assert mlp["down"]["kernel"] == P(None, "fsdp")

    def test_mesh_size_of_minus_one(self):
        assert tuple(llama_sharding.make_mesh((2, -1, 2)).shape.values()) == (2, 2, 2)
        assert llama_sharding.make_mesh((-1, 1, 1)).axis_names == ("data", "fsdp", "tensor")
