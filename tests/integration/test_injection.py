"""Hyperparameters that change while training, under `optax.inject_hyperparams`."""

import functools
import inspect
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from tests.helpers.cases import slow


RANK = 4
PARAMS = {"up": {"kernel": jnp.ones((12, 20))}, "norm": {"scale": jnp.ones(12)}}
STATIC = natgalore.STATIC_ARGS
# Users have no run-time type checker: an argument is refused by our own message.
FACTORIES = {name: inspect.unwrap(getattr(natgalore, name)) for name in STATIC}
GIVEN = {
    "natural_galore": {"learning_rate": 1e-2, "rank": RANK, "fisher": "core", "residual": None},
    "galore": {"learning_rate": 1e-2, "rank": RANK},
    "project": {"rank": RANK, "inner": optax.trace(0.9)},
    "scale_by_core_fisher": {"root_every": 1},
    "scale_by_fisher": {},
}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """The recipes call what users call."""
    recipes = sys.modules[natgalore.natural_galore.__module__]
    for name in ("project", "natural_galore"):
        monkeypatch.setattr(recipes, name, FACTORIES[name])


def gradients(count):
    key = jax.random.fold_in(jax.random.key(5), count)
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape), PARAMS)


def inject(name, **kwargs):
    kwargs = {**GIVEN[name], **kwargs}
    return optax.inject_hyperparams(FACTORIES[name], static_args=STATIC[name])(**kwargs)


def complete(name, stage):
    """A whole optimizer around a Fisher stage; what is one already, as it is."""
    if name.startswith("scale_by"):
        return natgalore.chain(natgalore.project(RANK, refresh_every=2), stage, optax.scale(-1.0))
    return stage


def hyperparams(state):
    found = []
    is_leaf = lambda x: hasattr(x, "hyperparams") and (found.append(x.hyperparams) or True)
    jax.tree.leaves(state, is_leaf=is_leaf)
    return found[0]


def test_tables_list_every_function():
    makes = lambda f: (
        "GradientTransformation" in str(f.__annotations__.get("return"))
        or (f.__annotations__.get("return") is natgalore.project.__annotations__["return"])
    )
    public = {n: f for n, f in vars(natgalore).items() if inspect.isfunction(f) and makes(f)}
    wrappers = {"sharded", "offload", "quantized", "plain_state", "stochastic_rounding"}
    without = {"project_back", "chain"} | wrappers
    assert set(public) - set(STATIC) == without  # hyperparameters


@pytest.mark.parametrize("name", STATIC)
def test_arguments_that_are_not_static_are_numbers(name):
    numbers = set(inspect.signature(FACTORIES[name]).parameters) - set(STATIC[name])
    tx = complete(name, inject(name))
    assert set(hyperparams(tx.init(PARAMS))) == numbers


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, factory in FACTORIES.items()
        for argument, parameter in inspect.signature(factory).parameters.items()
        if argument in STATIC[name] and type(parameter.default) in (int, float)
    ],
)
def test_injected_static_argument_is_refused_by_name(name, argument):
    static = tuple(set(STATIC[name]) - {argument})
    tx = optax.inject_hyperparams(FACTORIES[name], static_args=static)(**GIVEN[name])
    with pytest.raises((TypeError, ValueError), match=rf"`{argument}` must be .*STATIC_ARGS"):
        complete(name, tx).init(PARAMS)
    with pytest.raises((TypeError, ValueError), match=rf"`{argument}` must be .*STATIC_ARGS"):
        jax.jit(complete(name, tx).init)(PARAMS)


CHANGES = [
    *[("natural_galore", x) for x in ("learning_rate", "weight_decay", "scale", "b1", "b2")],
    ("galore", "learning_rate"),
    ("project", "scale"),
    ("scale_by_core_fisher", "decay"),
    ("scale_by_core_fisher", "damping"),
    ("scale_by_fisher", "damping"),
]


@pytest.mark.parametrize(("name", "argument"), [CHANGES[0], *slow(*CHANGES[1:])])
def test_changed_value_equals_a_new_optimizer(name, argument):
    """From the step on which it changes; the states that met it are the same up to there."""
    decays = {"b1": (0.9, 0.8), "b2": (0.999, 0.99), "decay": (0.98, 0.9)}
    before, after = decays.get(argument, (1.0, 4.0))
    injected = complete(name, inject(name, **{argument: before}))
    build = lambda value: complete(
        name, FACTORIES[name](**{**GIVEN[name], argument: jnp.float32(value)})
    )
    state, plain = injected.init(PARAMS), build(before).init(PARAMS)
    update, old, new = (jax.jit(tx.update) for tx in (injected, build(before), build(after)))
    # The same operations, fused otherwise, through an inverse root of condition 1e2 at most.
    close = {"rtol": 1e-3, "atol": 1e-6}
    for count in range(4):
        g = gradients(count)
        hyperparams(state)[argument] = jnp.float32(before if count < 2 else after)
        ours, state = update(g, state, PARAMS)
        unchanged, _ = old(g, plain, PARAMS)
        theirs, plain = (old if count < 2 else new)(g, plain, PARAMS)
        chex.assert_trees_all_close(ours, theirs, **close)
        assert close_trees(ours, unchanged, **close) == (count < 2)
    assert update._cache_size() == 1


def close_trees(a, b, **close):
    return all(map(functools.partial(jnp.allclose, **close), *map(jax.tree.leaves, (a, b))))


@pytest.mark.slow
def test_injected_schedule_sets_the_value():
    tx = inject("natural_galore", scale=optax.linear_schedule(1.0, 0.5, 2))
    plain = natgalore.natural_galore(**GIVEN["natural_galore"])
    state, theirs = tx.init(PARAMS), plain.init(PARAMS)
    for count in range(3):
        updates, state = tx.update(gradients(count), state, PARAMS)
        expected, theirs = plain.update(gradients(count), theirs, PARAMS)
    expected["up"]["kernel"] *= 0.5
    # float32's rounding of updates of 1e-2, through one inverse root.
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-8)


def test_traced_damping_is_clipped_to_the_least_allowed():
    make = lambda damping: complete(
        "scale_by_core_fisher", natgalore.scale_by_core_fisher(damping=damping)
    )
    state = make(1e-3).init(PARAMS)
    least, _ = jax.jit(make(1e-3).update)(gradients(0), state, PARAMS)
    update = jax.jit(lambda g, s, damping: make(damping).update(g, s, PARAMS))
    updates, _ = update(gradients(0), state, jnp.float32(1e-9))
    chex.assert_trees_all_close(updates, least, rtol=1e-4)


class TestBfloat16:
    """Hyperparameters get the dtype of the params, in which 0.999 is 1."""

    params = optax.tree.cast(PARAMS, jnp.bfloat16)

    @pytest.mark.parametrize("name", ["natural_galore", "galore", "scale_by_core_fisher"])
    def test_default_decay_is_refused(self, name):
        if name == "scale_by_core_fisher":
            tx = optax.inject_hyperparams(
                FACTORIES[name], static_args=STATIC[name], hyperparam_dtype=jnp.bfloat16
            )()
        else:
            tx = inject(name)
        for init in (complete(name, tx).init, jax.jit(complete(name, tx).init)):
            with pytest.raises(TypeError, match=r"in bfloat16, in which 0.999 is 1.*float32"):
                init(self.params)

    @pytest.mark.parametrize(
        ("name", "argument"),
        [("natural_galore", "b1"), ("natural_galore", "b2"), ("scale_by_core_fisher", "decay")],
    )
    def test_each_decay_is_refused(self, name, argument):
        make = functools.partial(FACTORIES[name], **GIVEN[name])
        with pytest.raises(TypeError, match=rf"`{argument}` is given in bfloat16"):
            make(**{argument: jnp.bfloat16(0.9)})
        with pytest.raises(ValueError, match=rf"`{argument}` must be at least 0.0 and below 1.0"):
            make(**{argument: 1.0})

    @pytest.mark.slow
    def test_float32_hyperparam_dtype_is_accepted(self):
        make = functools.partial(
            optax.inject_hyperparams,
            static_args=STATIC["natural_galore"],
            hyperparam_dtype=jnp.float32,
        )
        tx = make(FACTORIES["natural_galore"])(1e-2, RANK, fisher="core", weight_decay=0.1)
        plain = natgalore.natural_galore(1e-2, RANK, fisher="core", weight_decay=0.1)
        state, theirs = tx.init(self.params), plain.init(self.params)
        g = optax.tree.cast(gradients(0), jnp.bfloat16)
        ours, after = jax.jit(tx.update)(g, state, self.params)
        expected, _ = jax.jit(plain.update)(g, theirs, self.params)
        types = lambda tree: [jax.typeof(x) for x in jax.tree.leaves(tree)]
        assert types(after) == types(state)
        # As of optax.adamw, float32 updates: Optax's stages multiply by the float32 learning rate.
        new, theirs = (optax.apply_updates(self.params, x) for x in (ours, expected))
        assert new["up"]["kernel"].dtype == jnp.bfloat16
        # The last of bfloat16's 8 bits may fall either way.
        chex.assert_trees_all_close(new, theirs, rtol=2**-7)

    @pytest.mark.parametrize("name", ["scale_by_fisher", "project"])
    def test_other_numbers_are_used_in_float32(self, name):
        tx = complete(
            name,
            optax.inject_hyperparams(
                FACTORIES[name], static_args=STATIC[name], hyperparam_dtype=jnp.bfloat16
            )(**GIVEN[name]),
        )
        state = tx.init(self.params)
        _, after = jax.jit(tx.update)(gradients(0), state, self.params)
        dtypes = {x.dtype for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert dtypes - {jnp.dtype(jnp.bfloat16)} == {jnp.dtype(jnp.float32)}
        # bfloat16 are the hyperparameters alone.
        low = [x for x in jax.tree.leaves(after) if x.dtype == jnp.bfloat16]
        assert len(low) == len(hyperparams(after))


@pytest.mark.parametrize("stage", [natgalore.scale_by_core_fisher, natgalore.scale_by_fisher])
def test_traced_numbers_on_explicit_axes(stage):
    """Functions that fix the partitions of their results take traced numbers as arguments."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    kernel = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    values = jax.random.normal(jax.random.key(0), (64, 128))
    params = {"up": {"kernel": jax.device_put(values, kernel)}}
    injected = optax.inject_hyperparams(stage, static_args=natgalore.STATIC_ARGS[stage.__name__])()
    make = lambda scale: natgalore.project(8, injected, scale=scale, transport="keep")
    tx = optax.inject_hyperparams(make)(scale=1.0)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    plain, full = natgalore.project(8, stage(), transport="keep"), {"up": {"kernel": values}}
    expected, _ = plain.update(full, plain.init(full), full)
    # Products of sharded arrays sum in another order.
    chex.assert_trees_all_close(
        jax.device_get(updates), jax.device_get(expected), rtol=1e-4, atol=1e-5
    )
