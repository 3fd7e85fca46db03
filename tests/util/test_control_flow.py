import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from natgalore_jax.util.control_flow import BRANCHES, run_if_due, select_value, when
from tests.helpers.cases import slow


@pytest.mark.parametrize("predicate", [False, True])
def test_when_applies_f_if_true(predicate):
    result = jax.jit(lambda p, x: when(p, lambda x: x + 1, x))(predicate, 1.0)
    assert result == 1 + predicate


@pytest.mark.parametrize("count", [1, 5, BRANCHES, BRANCHES + 1, *slow(BRANCHES**2 + 3)])
@settings(max_examples=3, deadline=None)
@given(places=st.sets(st.integers(0), max_size=3))
def test_due_functions_run_once_and_few_others(count, places):
    """States count the runs of their functions."""
    due = np.zeros(count, bool)
    due[[place % count for place in places]] = True
    functions = [lambda x: x + 1] * count
    run = jax.jit(lambda due: run_if_due(list(due), functions, [jnp.int32(0)] * count))
    ran = np.array(run(jnp.array(due)))
    assert (ran[due] == 1).all()
    assert ran.sum() <= BRANCHES * due.sum()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, BRANCHES, BRANCHES + 1, 3 * BRANCHES**2])
def test_select_value_returns_the_selected_one(count):
    values = [lambda i=i: {"value": jnp.int32(i)} for i in range(count)]

    @jax.jit
    def select(which):
        return select_value([which == i for i in range(count)], values, {"value": jnp.int32(-1)})[
            "value"
        ]

    for which in {-1, 0, count // 2, count - 1, count}:
        assert select(which) == (which if 0 <= which < count else -1)


def test_select_value_program_size_is_linear():
    def lines(count):
        arrays = [jnp.ones(4)] * count

        def select(which, arrays):
            here = [which == i for i in range(count)]
            return select_value(here, [lambda x=x: x for x in arrays], jnp.zeros(4))

        return len(jax.jit(select).lower(0, arrays).as_text().splitlines())

    assert lines(256) < 2.2 * lines(128)
