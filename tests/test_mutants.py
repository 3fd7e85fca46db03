"""The planted faults of `make mutants` still fit the library."""

import ast
from pathlib import Path

import pytest

import natgalore_jax

from . import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.room}: {m.name}")
def test_a_fault_fits_and_is_a_program(mutant):
    room = Path(natgalore_jax.__file__).with_name(f"{mutant.room}.py")
    assert ast.dump(ast.parse(mutants.planted(mutant, room.read_text()))) != ast.dump(
        ast.parse(room.read_text())
    )


def test_faults_have_names_of_their_own():
    names = {(mutant.room, mutant.name) for mutant in mutants.MUTANTS}
    assert len(names) == len(mutants.MUTANTS) >= 25


def test_a_fault_that_no_longer_fits_is_said_to():
    with pytest.raises(ValueError, match="gone: its text"):
        mutants.planted(mutants.Mutant("basis", "gone", "no such text", ""), "some text")
