"""Functions of many 8-bit arrays in stages: equal results, and a barrier between stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from natgalore_jax.quantization import staged_update
from natgalore_jax.quantization.dynamic_8bit import LINEAR
from natgalore_jax.quantization.quantized_array import quantize
from natgalore_jax.quantization.staged_update import FEW, in_stages
from tests.helpers.cases import quick


SIZES = (40, 8, 24, 40)  # with stages of at least 20 entries: one stage for 8 and 24


def quantized_arrays(sizes=SIZES):
    arrays = [jnp.asarray(np.random.default_rng(n).normal(size=n), jnp.float32) for n in sizes]
    return [quantize(LINEAR, x, x.size) for x in arrays]


def on_decoded(f):
    """`f` of decoded arrays as a function of QuantizedArrays."""

    @functools.wraps(f)
    def on_codes(arrays):
        others, new = f([x.decode() for x in arrays])
        return others, [old.encode(x) for old, x in zip(arrays, new, strict=True)]

    return on_codes


@on_decoded
def leaf_by_leaf(arrays):
    return {"sum": [x.sum() for x in arrays]}, [x * (i + 1.0) for i, x in enumerate(arrays)]


def in_pairs(arrays):
    a, b, c, d = (x.decode() for x in arrays)
    new = [x.encode(y) for x, y in zip(arrays[:3], (a + d, b + 1, c + 2), strict=True)]
    return {"both": a @ d}, [*new, arrays[3]]


@on_decoded
def all_at_once(arrays):
    norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in arrays))
    return {"norm": norm}, [x / norm for x in arrays]


@on_decoded
def norm_of_new_arrays(arrays):
    new = [x + 1 for x in arrays]
    return {"norm": sum(jnp.vdot(x, x) for x in new)}, new


def some_unchanged(arrays):
    second, last = (arrays[i].encode(arrays[i].decode() + 1) for i in (1, 3))
    return {}, [arrays[0], second, arrays[2], last]


@on_decoded
def cleared(arrays):
    """Results that depend on no array."""
    return {"one": 1.0, "two": jnp.full((), 2.0)}, [jnp.zeros_like(x) for x in arrays]


FUNCTIONS = {
    f.__name__: f
    for f in (leaf_by_leaf, in_pairs, all_at_once, norm_of_new_arrays, some_unchanged, cleared)
}


@pytest.fixture
def small_stages(monkeypatch):
    monkeypatch.setattr(staged_update, "LEAST", 20)


@pytest.mark.parametrize("f", quick(["leaf_by_leaf", "cleared"], FUNCTIONS))
def test_equals_the_function(small_stages, f):
    actual = jax.jit(lambda arrays: in_stages(f, arrays))(quantized_arrays())
    expected = f(quantized_arrays())
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    # Sums of 112 entries, in another order.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, actual[0], expected[0])
    for new, exact in zip(actual[1], expected[1], strict=True):
        close(new.scales, exact.scales)
        # A sum in another order may move an entry to the next code.
        np.testing.assert_allclose(
            np.int32(new.codes), np.int32(exact.codes), atol=f is all_at_once
        )


def program_of(f, arrays) -> jax_core.Jaxpr:
    return jax.make_jaxpr(lambda arrays: in_stages(f, arrays))(arrays).jaxpr


def equations(program, name) -> list[jax_core.JaxprEqn]:
    """Those of a primitive, or calls of a jitted function, by name."""
    return [e for e in program.eqns if name in (e.primitive.name, e.params.get("name"))]


def barriers(program) -> list[jax_core.JaxprEqn]:
    return equations(program, "optimization_barrier")


def sizes_of_codes(variables) -> list[int]:
    return [v.aval.size for v in variables if v.aval.dtype == jnp.int8]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("leaf_by_leaf", [[8, 24, 40], [40, 8, 24]]),
        ("in_pairs", [[8, 24, 40]]),  # the first with the last, whose new array is the old one
        ("all_at_once", []),
        ("norm_of_new_arrays", []),  # one number needs all
        ("some_unchanged", [[40, 8]]),  # nothing is written before 8, and 24 is not
        ("cleared", [[8, 24, 40], [40, 8, 24]]),
    ],
)
def test_barrier_takes_the_codes_of_a_stage_and_the_written_ones(small_stages, name, sizes):
    program = program_of(FUNCTIONS[name], quantized_arrays())
    assert [sizes_of_codes(eqn.invars) for eqn in barriers(program)] == sizes


def test_stage_decodes_codes_that_passed_the_barrier_after_the_previous_stage(small_stages):
    program = program_of(leaf_by_leaf, quantized_arrays())
    first, second = barriers(program)
    decoded = [e.invars for e in equations(program, "decode")]
    # Codes and scales of arrays 1 and 2, then those of array 3.
    assert decoded[0] == program.invars[:2]
    assert decoded[1] + decoded[2] == first.outvars[:4]
    assert decoded[3] == second.outvars[:2]
    encoded = [e.outvars for e in equations(program, "encode")]
    assert first.invars == [*program.invars[2:6], *encoded[0]]
    assert second.invars == [*program.invars[6:8], *encoded[1], *encoded[2]]
    # The new state is that after the barriers.
    new = [*first.outvars[4:], *second.outvars[2:], *encoded[3]]
    assert program.outvars[-8:] == new


def test_unchanged_arrays_are_not_encoded(small_stages):
    program = program_of(some_unchanged, quantized_arrays())
    assert [sizes_of_codes(e.outvars) for e in equations(program, "encode")] == [[8], [40]]
    assert program.outvars[:2] == program.invars[:2]


def test_stages_hold_at_least_the_least_number_of_entries(monkeypatch):
    sizes = [16] * 8
    for least, number in ((16, 8), (17, 4), (48, 3), (64, 2)):
        monkeypatch.setattr(staged_update, "LEAST", least)
        program = program_of(leaf_by_leaf, quantized_arrays(sizes))
        assert len(barriers(program)) == number - 1


@pytest.mark.parametrize("number", [FEW, FEW + 1])
def test_calls_of_many_arrays_are_inlined(small_stages, number):
    """Also calls within calls; a call of few arrays is one equation."""
    update = jax.jit(jax.jit(leaf_by_leaf))
    arrays = quantized_arrays([24] * number)
    program = program_of(update, arrays)
    assert len(barriers(program)) == (number - 1 if number > FEW else 0)
    actual, expected = jax.jit(lambda x: in_stages(update, x))(arrays), leaf_by_leaf(arrays)
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_function_is_called_as_it_is_on_few_entries_and_outside_of_jit(small_stages, monkeypatch):
    monkeypatch.setattr(staged_update, "_inlined", None)
    arrays = quantized_arrays()
    assert not barriers(program_of(leaf_by_leaf, arrays[1:3]))
    actual, expected = in_stages(leaf_by_leaf, arrays), leaf_by_leaf(arrays)
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(x, y)
