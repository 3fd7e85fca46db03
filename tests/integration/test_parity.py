"""Every row of docs/parity.md, measured and held to its bound."""

import re

import numpy as np
import pytest

from tests.helpers import parity
from tests.helpers.cases import quick


ROWS = [(*parity.head(title, row), row) for title, rows in parity.TABLES.items() for row in rows()]


@pytest.mark.parametrize("row", quick([ROWS[0][0]], {name: row for name, _, row in ROWS}))
def test_error_is_within_the_bound(row):
    for whose, error in row.measure().items():
        assert error <= row.allowed, whose


def test_page_lists_the_rows():
    assert parity.heads(parity.PAGE.read_text()) == [(name, allowed) for name, allowed, _ in ROWS]


def test_snippets_of_the_page_run():
    snippets = re.findall(r"```python\n(.*?)```", parity.PAGE.read_text(), flags=re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, str(parity.PAGE), "exec"), {})
    assert snippets


def test_error_measure_detects_small_errors():
    """Weights that went a thousandth too far at every saved step, or at one."""
    ref = parity.reference(parity.RUNS["GaLore `std`, 64 x 32"])
    right = [ref.snapshots.get(step, ref.start) for step in range(1, max(ref.snapshots) + 1)]
    assert ref.error(right) == 0
    too_far = [w + 1e-3 * (w - ref.start) for w in right]
    np.testing.assert_allclose(ref.error(too_far), 1e-3, rtol=1e-9)
    for step in ref.snapshots:
        one = [*right[: step - 1], too_far[step - 1], *right[step:]]
        assert 1e-5 < ref.error(one) < 1e-3
