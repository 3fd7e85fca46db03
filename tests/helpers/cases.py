"""Cases of parametrized tests that only `make test-all` runs."""

from collections.abc import Iterable, Mapping

import pytest


def slow(*cases) -> list:
    """Each case with the marker `slow`; a plain tuple holds the values of several arguments.

    Example:
        >>> [case.values for case in slow("a", (1, 2))]
        [('a',), (1, 2)]
    """
    values = [case if type(case) is tuple else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in values]


def quick(names: Iterable[str], table: Mapping | Iterable[str]) -> list:
    """The lines of a table, or its names, as cases: those outside `names` carry the marker `slow`.

    Raises:
      ValueError: one of `names` is not in the table.

    Example:
        >>> [(case.id, case.values, len(case.marks)) for case in quick(["a"], {"a": 1, "b": 2})]
        [('a', (1,), 0), ('b', (2,), 1)]
    """
    table = table if isinstance(table, Mapping) else {name: name for name in table}
    names = {*names}
    if unknown := names - table.keys():
        raise ValueError(f"not in the table: {', '.join(sorted(unknown))}")
    return [
        pytest.param(value, id=name, marks=() if name in names else pytest.mark.slow)
        for name, value in table.items()
    ]
