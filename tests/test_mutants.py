"""The planted faults of `make mutants` still fit the library."""

import ast
from pathlib import Path

import pytest

import natgalore_jax
from tests import mutants
from tests.seldom import FIRST_CASES


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.room}: {m.name}")
def test_a_fault_fits_and_is_a_program(mutant):
    room = Path(natgalore_jax.__file__).parent / f"{mutant.room}.py"
    assert ast.dump(ast.parse(mutants.planted(mutant, room.read_text()))) != ast.dump(
        ast.parse(room.read_text())
    )


def test_faults_have_names_of_their_own():
    names = {(mutant.room, mutant.name) for mutant in mutants.MUTANTS}
    assert len(names) == len(mutants.MUTANTS) >= 25


def test_a_fault_that_no_longer_fits_is_said_to():
    with pytest.raises(ValueError, match="gone: its text"):
        mutants.planted(mutants.Mutant("basis", "gone", "no such text", ""), "some text")


@pytest.mark.parametrize("name", FIRST_CASES)
def test_what_is_seldom_run_is_a_test_that_no_fault_needs(name):
    file, *_, function = name.split("::")
    assert f"tests/{name}`" not in (ROOT / "docs/mutants.md").read_text()
    if not file.endswith("test_optax_suite.py"):  # whose tests are Optax's
        assert f"def {function}(" in (ROOT / "tests" / file).read_text()
