"""`make mutants` can plant each of its faults: their text is still in the code."""

import pytest

from tests.mutants import FIRST, MUTANTS, ROOT, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.module}: {mutant.name}")
def test_fault_can_be_planted(mutant):
    text = (ROOT / mutant.file).read_text()
    assert planted(mutant, text) != text
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in FIRST[mutant.module])
