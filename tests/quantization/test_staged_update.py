"""A function of many arrays, part by part, is the function; and one part waits for the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from natgalore_jax.quantization import staged_update as parts
from natgalore_jax.quantization.staged_update import in_parts
from tests.helpers.cases import quick


SIZES = (40, 8, 24, 40)


def held():
    return [{"half": jnp.arange(1.0, n + 1) / 2} for n in SIZES]


def read(place, x):
    return 2 * x["half"]


def write(place, before, after):
    return {"half": after / 2 + 0 * before}


def leaf_by_leaf(arrays):
    return {"sum": [x.sum() for x in arrays]}, [x * (i + 1.0) for i, x in enumerate(arrays)]


@jax.jit
def in_a_call(arrays):  # which is looked into
    return leaf_by_leaf(arrays)


def in_pairs(arrays):
    a, b, c, d = arrays
    return {"both": a @ d}, [a + d, b + 1, c + 2, d]


def all_at_once(arrays):
    norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in arrays))
    return {"norm": norm}, [x / norm for x in arrays]


def norm_of_the_new(arrays):
    new = [x + 1 for x in arrays]
    return {"norm": sum(jnp.vdot(x, x) for x in new)}, new


def some_stay(arrays):
    return {}, [arrays[0], arrays[1] + 1, arrays[2], arrays[3] + 1]


FUNCTIONS = {
    f.__name__: f
    for f in (leaf_by_leaf, in_a_call, in_pairs, all_at_once, norm_of_the_new, some_stay)
}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 20)


@pytest.mark.parametrize("name", quick(list(FUNCTIONS)[:1], [*FUNCTIONS]))
def test_is_the_function(small_parts, name):
    f = FUNCTIONS[name]
    rest, new = jax.jit(lambda x: in_parts(f, x, read, write))(held())
    whole_rest, whole = f([read(i, x) for i, x in enumerate(held())])
    assert jax.tree.structure(rest) == jax.tree.structure(whole_rest)
    # Sums of 112 numbers, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), rest, whole_rest)
    for x, y in zip(new, whole, strict=True):
        np.testing.assert_allclose(2 * x["half"], y, rtol=1e-6)


def barriers(f) -> list[jax_core.JaxprEqn]:
    program = jax.make_jaxpr(lambda x: in_parts(f, x, read, write))(held())
    return [e for e in program.jaxpr.eqns if e.primitive.name == "optimization_barrier"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Arrays of 40, 8 with 24, and 40: from 20 numbers on a part is full.
        ("leaf_by_leaf", [[8, 24, 40], [40, 8, 24]]),
        ("in_a_call", [[8, 24, 40], [40, 8, 24]]),
        ("in_pairs", [[8, 24, 40]]),  # the first with the last, whose new array is the old one
        ("all_at_once", []),
        ("norm_of_the_new", []),  # one number needs all
    ],
)
def test_a_barrier_has_what_is_read_next_and_what_was_written(small_parts, name, sizes):
    assert [[v.aval.size for v in eqn.invars] for eqn in barriers(FUNCTIONS[name])] == sizes


def test_what_is_read_next_has_passed_the_barrier(small_parts):
    program = jax.make_jaxpr(lambda x: in_parts(leaf_by_leaf, x, read, write))(held()).jaxpr
    doubled = [e.invars[1] for e in program.eqns if e.primitive.name == "mul"]
    came = [v for v in doubled if v in program.invars or v in passed(program)]
    *for_types, first, second, third, fourth = came
    assert for_types == program.invars
    assert first is program.invars[0]
    assert {second, third, fourth} <= set(passed(program))


def passed(program) -> list:
    """What comes out of barriers."""
    found = [e.outvars for e in program.eqns if e.primitive.name == "optimization_barrier"]
    return [v for outvars in found for v in outvars]


def test_what_a_function_leaves_alone_is_not_written(small_parts):
    written = []

    def noted(place, before, after):
        written.append(place)
        return write(place, before, after)

    jax.make_jaxpr(lambda x: in_parts(some_stay, x, read, noted))(held())
    assert written == [1, 3]


def test_small_states_and_those_outside_of_jit_are_read_at_once(small_parts, monkeypatch):
    program = jax.make_jaxpr(lambda x: in_parts(leaf_by_leaf, x, read, write))(held()[1:2])
    assert not passed(program.jaxpr)
    monkeypatch.setattr(parts, "_steps", None)
    _, new = in_parts(leaf_by_leaf, held(), read, write)
    np.testing.assert_allclose(new[3]["half"], 4 * held()[3]["half"])
