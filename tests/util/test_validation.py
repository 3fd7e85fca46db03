"""Checks of arguments, and the kinds of numbers that each public function takes."""

import decimal
import functools
import inspect
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.tree.cores import Basis
from natgalore_jax.util.validation import check_bytes


PARAMS = {"up": {"kernel": jnp.ones((16, 32))}, "norm": {"scale": jnp.ones(16)}}
LOSS = lambda params, x: jnp.sum((x @ params["up"]["kernel"]) ** 2)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Makes recipes call functions without the run-time type checker, which users do not have."""
    recipes = sys.modules[natgalore.natural_galore.__module__]
    for name in ("project", "natural_galore"):
        monkeypatch.setattr(recipes, name, inspect.unwrap(getattr(natgalore, name)))


def build(function, *args, **kwargs):
    return lambda value, name: inspect.unwrap(function)(*args, **kwargs, **{name: value})


GALORE = functools.partial(build, natgalore.galore)
CORE = functools.partial(build, natgalore.scale_by_core_fisher)
WINDOW = functools.partial(build, natgalore.scale_by_fisher)
PLAN = functools.partial(build, inspect.unwrap(natgalore.plan), PARAMS)
INTS = {
    "galore rank": ("rank", GALORE(1e-3)),
    "galore refresh_every": ("refresh_every", GALORE(1e-3, 4)),
    "galore seed": ("seed", GALORE(1e-3, 4)),
    "core root_every": ("root_every", CORE()),
    "window": ("window", WINDOW()),
    "quantized seed": ("seed", build(natgalore.quantized, natgalore.galore(1e-3, 4))),
    "rounding seed": ("seed", build(natgalore.stochastic_rounding)),
    "micro_batches": ("micro_batches", build(natgalore.value_and_grad, LOSS, optax.sgd(1.0))),
    "plan bits": ("bits", PLAN(rank=4)),
    "plan multiple": ("multiple", PLAN(rank=4)),
    "plan rank": ("rank", PLAN()),
}
GRADS = {"up": {"kernel": jnp.eye(16, 32)}, "norm": {"scale": jnp.ones(16)}}
NUMBERS = {
    "rank": ("rank", GALORE(1e-3)),
    "scale": ("scale", GALORE(1e-3, 4)),
    "learning_rate": ("learning_rate", GALORE(rank=4)),
    "b1": ("b1", GALORE(1e-3, 4)),
    "b2": ("b2", GALORE(1e-3, 4)),
    "eps": ("eps", GALORE(1e-3, 4)),
    "weight_decay": ("weight_decay", GALORE(1e-3, 4)),
    "core decay": ("decay", CORE()),
    "core damping": ("damping", CORE()),
    "core power": ("power", CORE()),
    "window damping": ("damping", WINDOW()),
    "window power": ("power", WINDOW()),
    "plan energy": ("energy", PLAN(grads=GRADS)),
    "plan rank": ("rank", PLAN()),
}
EIGHT = [np.int64(8), np.int32(8), np.uint8(8), np.array(8), np.array(8, np.int16)]
QUARTER = [np.float32(0.25), np.float64(0.25), np.float16(0.25), np.array(0.25), Fraction(1, 4)]
NO_INTS = [
    True,
    np.True_,
    np.array([8]),
    8.5,
    np.float32(8),
    Fraction(8),
    decimal.Decimal(8),
    "8",
    jnp.int32(8),
]
kind = lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}-{x}"


def result(built):
    """The text of a plan, or the state of a transformation as shapes, with its static specs."""
    if inspect.isfunction(built):
        return "value_and_grad"
    if isinstance(built, optax.GradientTransformation):
        if "fisher" in built.init.__module__:
            built = natgalore.project(4, built)
        leaves, structure = jax.tree.flatten(jax.eval_shape(built.init, PARAMS))
        return structure, leaves
    return str(built)


@pytest.mark.parametrize("argument", INTS)
def test_integers(argument):
    name, function = INTS[argument]
    expected = result(function(8, name))
    for value in EIGHT:
        assert result(function(value, name)) == expected


@pytest.mark.parametrize("argument", INTS)
def test_refused_integers(argument):
    name, function = INTS[argument]
    for value in NO_INTS:
        with pytest.raises((TypeError, ValueError), match=rf"`{name}` "):
            function(value, name)


@pytest.mark.parametrize("argument", INTS)
def test_jax_integers_are_refused(argument):
    """With a known value as well: optax.inject_hyperparams passes both kinds."""
    name, function = INTS[argument]
    match = rf"`{name}` must be an int known when .*STATIC_ARGS"
    with pytest.raises(TypeError, match=match):
        jax.jit(lambda value: function(value, name) and value)(8)
    with pytest.raises(TypeError, match=match):
        function(jnp.int32(8), name)


@pytest.mark.parametrize("argument", NUMBERS)
def test_numbers(argument):
    name, function = NUMBERS[argument]
    expected = result(function(0.25, name))
    for value in QUARTER:
        assert result(function(value, name)) == expected


def test_updates_of_numbers():
    """All numbers of natural_galore and of both Fisher stages, as literals of the jaxpr.

    Of the two kinds that differ most from a float; `test_numbers` has the others.
    """
    values = np.float16(0.25), Fraction(1, 4)
    core, window = map(inspect.unwrap, (natgalore.scale_by_core_fisher, natgalore.scale_by_fisher))
    names = ("learning_rate", "rank", "scale", "b1", "b2", "eps", "weight_decay")

    def program(x):
        fisher = optax.chain(core(x, x, power=x), window(3, x, power=x))
        settings = dict.fromkeys(names, x)
        tx = inspect.unwrap(natgalore.natural_galore)(fisher=fisher, **settings)
        state = jax.eval_shape(tx.init, PARAMS)
        return str(jax.make_jaxpr(tx.update)(GRADS, state, PARAMS))

    expected = program(0.25)
    assert [program(value) == expected for value in values] == [True, True]


@pytest.mark.parametrize(
    "value", [True, np.True_, decimal.Decimal(1), "1", 1j, np.ones(1)], ids=kind
)
@pytest.mark.parametrize(
    ("function", "name"),
    [(GALORE(1e-3, 4), "scale"), (GALORE(1e-3, 4), "b1"), (CORE(), "damping")],
    ids=["scale", "b1", "damping"],
)
def test_refused_numbers(function, name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be a number, got"):
        function(value, name)


@pytest.mark.parametrize("value", [np.int64(8), np.uint8(8), np.array(8)], ids=kind)
def test_ranks_of_rules_and_trees(value):
    for rank in ([("", value)], {"up": value, "norm": 1}, lambda params: {"up": value, "norm": 1}):
        state = jax.eval_shape(inspect.unwrap(natgalore.galore)(1e-3, rank).init, PARAMS)
        (P,) = [x for x in jax.tree.leaves(state, is_leaf=is_basis) if is_basis(x)]
        assert P.spec.rank == 8
        assert type(P.spec.rank) is int


def is_basis(x):
    return isinstance(x, Basis)


def test_axes_of_a_matrix_view():
    def view(*args):
        self = object.__new__(natgalore.MatrixView)
        inspect.unwrap(natgalore.MatrixView.__init__)(self, *args)
        return self

    plain = view(0, (1, 2), 3, {1: 2})
    assert view(np.int64(0), (np.int32(1), np.uint8(2)), np.array(3), {np.int64(1): 2}) == plain
    assert hash(view(np.int64(0), np.array(1))) == hash(view(0, 1))


@pytest.mark.parametrize(
    "value",
    [np.int64(1536), np.float32(1536), np.array(1536.0), jnp.int32(1536), Fraction(3073, 2)],
)
def test_check_bytes_of_numbers(value):
    assert check_bytes("budget", value) == 1536


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("22GiB", 22 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 kib", 1536),
        ("2TB", 2 * 10**12),
        ("7", 7),
        ("3 MB", 3_000_000),
        (2.5e3, 2500),
        (1e22, 10**22),
        (0, 0),
    ],
)
def test_check_bytes_parses_units(value, count):
    assert check_bytes("budget", value) == count


@pytest.mark.parametrize("value", ["", "GB", "1.2.3GB", "5 gigs", True, None, float("nan"), "-1"])
def test_check_bytes_refuses(value):
    with pytest.raises(
        ValueError, match=r"^`budget` must be a number of bytes or a string such as"
    ):
        check_bytes("budget", value)
