"""What XLA:TPU makes of the library: compiled ahead of time, on a machine without a TPU.

`test_tpu.py` reads the programs that the compiler is given; these are the programs that it returns.
They need libtpu (`pip install "natgalore_jax[tpu-compile]"`), in processes of their own.
"""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.tpu_compiler import ENVIRONMENT
from tests.helpers.cases import quick
from tests.helpers.tpu_worker import LAYERS, OPTIMIZERS, RANK, SHAPES, M, N


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
ROOT = Path(__file__).parents[2]
V5E = "v5e:2x4"
ONE_CHIP = [f"one_chip/{name}/{V5E}" for name in ("galore", "natural_galore")]
QUICK = (f"update/galore/{V5E}", f"update/natural_galore/{V5E}", f"padding/{V5E}", ONE_CHIP[0])
UPDATES = [
    *(f"update/{name}/{V5E}" for name in OPTIMIZERS if name not in ("adamw", "cores")),
    *(f"update/natural_galore/{name}" for name in ("v5e:4x4", "v5p:2x2x1", "v6e:2x4")),
]
STEPS = [
    *(f"training/{name}/{V5E}" for name in ("galore", "natural_galore", "cores")),
    f"example/{V5E}",
]


@functools.cache
def compiled(*cases):
    environment = os.environ | ENVIRONMENT | {"PYTHONWARNINGS": "error"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "tests.helpers.tpu_worker", *cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def facts_of(case):
    return compiled(*QUICK)[case] if case in QUICK else compiled(case)[case]


@pytest.mark.parametrize("case", quick(QUICK[:2], UPDATES))
def test_update_compiles_for_tpus(case):
    facts = facts_of(case)
    assert not facts["float64"]
    assert facts["host"] == (["host memory"] if "offload" in case else [])
    # Three passes for products with gradients and cores, six for bases; no choice for bfloat16.
    assert facts["precisions"] == ["high,high", "highest,highest"]
    # Weights and state are updated in place: only the table of results has memory of its own.
    assert facts["unaliased"] <= 1024
    # Padding included, to the byte. The compiler counts no arguments in the host's memory.
    if "offload" not in case:
        assert facts["arguments"] == facts["planned"]


@pytest.mark.parametrize("name", ["galore", "natural_galore"])
def test_bytes_moved_are_those_of_the_sharding_page(name):
    """Under FSDP over 8 chips: R summed and U gathered, or P gathered twice.

    `divided` shards the m side of up and gate and the n side of down. XLA:TPU sums R on all chips.
    The orthogonalised residual gathers R or P once more, for P R, and exchanges each matrix in
    bfloat16: its rows or columns on every chip, the whole matrix on one, and back.
    """
    received = 7 / 8 * 4 * LAYERS  # of one number per layer
    expected, largest = received * (2 * 3 * RANK * N + 2 * M * RANK), RANK * N
    if name == "natural_galore":
        expected += received * (2 * RANK * N + M * RANK + 3 * 2 * M * N / 8 / 2)
        largest = M * N
    facts = facts_of(f"update/{name}/{V5E}")
    # Beside them, the finite masks and largest entries of the cores: a percent at this small size.
    assert expected <= facts["moved"] <= 1.02 * expected
    # One layer at a time, and in the exchange one matrix a chip, not the whole stack.
    assert max(math.prod(shape) for _, shape, _ in facts["hot"]) == largest
    assert facts["gathered"] == RANK * N  # at a refresh too


@pytest.mark.slow
@pytest.mark.parametrize("name", ["galore", "natural_galore"])
def test_cores_and_moments_keep_their_layout(name):
    facts = facts_of(f"layouts/{name}/{V5E}")
    assert [LAYERS, 256, 342] not in facts["copied"]


@pytest.mark.parametrize("case", quick(QUICK[3:], ONE_CHIP))
def test_bytes_on_one_chip_are_those_of_the_plan(case):
    """Weights, gradients and state, with padding. The table of results and code are not counted."""
    facts = facts_of(case)
    assert facts["arguments"] == facts["planned"]
    assert facts["unaliased"] <= 1024
    assert facts["hot"] == []
    # The refresh reads the gradients where they are, whatever their layout.
    stacks = [list(shape) for shape in SHAPES.values() if len(shape) == 3]
    assert not [shape for shape in facts["copied"] if shape in stacks]


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_training_step_compiles_for_tpus(case):
    facts = facts_of(case)
    assert not facts["float64"]
    assert facts["host"] == []
    assert facts["unaliased"] <= 2048  # and the loss, padded


@pytest.mark.slow
def test_peak_of_a_training_step_is_the_plan_and_activations():
    """Llama 60m on one chip: the plan has weights, gradients and state, AdamW's step the rest."""
    found = facts_of(f"peak/{V5E}")
    for facts in (found["galore"], found["natural_galore"]):
        planned, tokens = facts["planned"], facts["tokens"]
        assert facts["arguments"] == planned["weights"] + planned["state"] + tokens
        activations = found["adamw"]["temporaries"] - planned["gradients"]
        peak = facts["arguments"] + facts["temporaries"]
        # This step's cores live beside the moments: a bound, since XLA may compute in place.
        assert peak <= sum(planned.values()) + tokens + activations + facts["cores"]


def test_padding_is_that_of_the_compiler():
    for shape, by_compiler, counted in compiled(*QUICK)[f"padding/{V5E}"]:
        assert by_compiler == counted, shape
