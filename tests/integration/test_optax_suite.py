"""Optax's own tests of contributed optimizers, run on ours.

The wheel of Optax ships them (`optax/contrib/_common_test.py`). They look optimizers up as
attributes of `optax.contrib` by the names in two tables of that module; here the tables name ours.
Most leaves there are smaller than any that `natgalore` would project, so the smallest side is
lowered to 2: then those of two axes are projected, at full rank.
"""

import ast
import functools
import importlib.util
import types
from pathlib import Path

import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import natgalore_jax as natgalore


# Some of the suite's trees are one vector.
pytestmark = pytest.mark.filterwarnings("ignore:natgalore projects none of the 1 leaves")

STEPS = 30_000  # of the suite, which looks at the last
TABLES = ("_MAIN_OPTIMIZERS_UNDER_TEST", "_ALL_OPTIMIZERS_UNDER_TEST")
RANK = 2


# At the paper's damping of 1e-3 a window takes away the part of a gradient that is always there,
# which is all of a noise-free one: 30 000 steps leave 7 to 25 % of the way, in float64 too.
window = functools.partial(natgalore.scale_by_fisher, damping=0.1)


# A gradient that is preconditioned, then seen by Adam, has no size left, so without noise and at
# one rate a solved problem is left again now and then: for 12 to 16 % of the steps.
def falling(learning_rate: float):
    return optax.linear_schedule(learning_rate, 0.0, STEPS)


def natural_galore(learning_rate: float):
    return natgalore.natural_galore(falling(learning_rate), RANK)


def natural_galore_core(learning_rate: float):
    return natgalore.natural_galore(falling(learning_rate), RANK, fisher="core", residual=None)


def natural_galore_window(learning_rate: float):
    return natgalore.natural_galore(falling(learning_rate), RANK, fisher=window(), residual=None)


def galore(learning_rate: optax.ScalarOrSchedule):
    return natgalore.galore(learning_rate, RANK, weight_decay=1e-5)


def project(learning_rate: optax.ScalarOrSchedule):
    return natgalore.chain(natgalore.project(RANK), optax.adamw(learning_rate, weight_decay=1e-5))


def stage(fisher, learning_rate: float):
    return natgalore.chain(
        natgalore.project(RANK),
        fisher,
        optax.scale_by_adam(),
        natgalore.project_back(),
        optax.scale_by_learning_rate(falling(learning_rate)),
    )


OURS = {
    "natgalore_default": natural_galore,
    "natgalore_core": natural_galore_core,
    "natgalore_window": natural_galore_window,
    "natgalore_galore": galore,
    "natgalore_project": project,
    "natgalore_core_stage": functools.partial(stage, natgalore.scale_by_core_fisher()),
    "natgalore_window_stage": functools.partial(stage, window()),
}


def suite(*names: str) -> types.ModuleType | None:
    """Optax's test module with `names` in its tables; None if it is not the one known here."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    if optax.__version__ != "0.2.8" or spec is None or spec.origin is None:
        return None
    tree = ast.parse(Path(spec.origin).read_text())
    table = repr(
        [
            {
                "opt_name": name,
                "opt_kwargs": {"learning_rate": 1e-2},
                "wrapper_name": None,
                "wrapper_kwargs": None,
            }
            for name in names
        ]
    )
    # Where they are made tuples they are complete: that is what the tests are parameterised by.
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in TABLES
        and isinstance(node.value, ast.Call)
    ]
    if len(found) != len(TABLES):
        return None
    for node in found:
        node.value = ast.parse(f"tuple({table})", mode="eval").body
    module = types.ModuleType("optax_contrib_common_test")
    exec(compile(ast.fix_missing_locations(tree), spec.origin, "exec"), vars(module))
    return module


QUICK = ("natgalore_core", "natgalore_window_stage")
INJECTED = "test_optimizers_can_be_wrapped_in_inject_hyperparams"
SUITES = [suite(*QUICK), suite(*(name for name in OURS if name not in QUICK))]
if None in SUITES:

    @pytest.mark.skip(reason="the tables of contrib/_common_test.py are known of Optax 0.2.8 alone")
    def test_optax_contrib_suite():
        pass

else:
    ContribTest = SUITES[0].ContribTest
    for name in ("test_optimizers7", *(f"{INJECTED}{i}" for i in (0, 1))):
        setattr(ContribTest, name, pytest.mark.slow(getattr(ContribTest, name)))
    ContribTestOfTheOthers = pytest.mark.slow(SUITES[1].ContribTest)

    @pytest.fixture(autouse=True)
    def registered(monkeypatch):
        """Ours, where the suite looks for them; undone after each test."""
        for name, make in OURS.items():
            monkeypatch.setattr(optax.contrib, name, make, raising=False)
        monkeypatch.setattr("natgalore_jax.selection.infer_axes.SMALLEST_SIDE", 2)

    def test_suite_runs_on_projected_leaves():
        for table in TABLES:
            tested = [line["opt_name"] for module in SUITES for line in getattr(module, table)]
            assert sorted(tested) == sorted(OURS)
        state = natural_galore(1e-2).init([jnp.zeros((2, 2))])
        assert state[0].basis[0].value.shape == (2, RANK)
