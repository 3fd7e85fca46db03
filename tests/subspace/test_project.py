import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.subspace.state import SubspaceState


PARAMS = {"up": {"kernel": jnp.ones((16, 40))}, "norm": {"scale": jnp.ones(16)}}


def loss(params, x):
    """A regression whose gradient has full rank."""
    target = jnp.sin(jnp.arange(16.0 * 40)).reshape(16, 40)
    return (
        jnp.square(x @ (params["up"]["kernel"] - target)).mean()
        + jnp.square(params["norm"]["scale"]).mean()
    )


class TestLiteralChain:
    """`optax.chain(natgalore.project(rank), optax.adamw(lr))`: the line users paste first."""

    def test_stock_chain_warns_once_with_both_sizes(self):
        tx = optax.chain(natgalore.project(rank=4), optax.adamw(1e-2))
        with pytest.warns(UserWarning, match=r"natgalore") as record:
            tx.init(PARAMS)
        (warning,) = record
        message = str(warning.message)
        assert f"{16 * 40 * 4:,} bytes a moment" in message
        assert f"keeps {4 * 40 * 4:,}" in message
        assert "natgalore.chain in place of optax.chain" in message

    def test_stock_chain_trains(self, key):
        tx = optax.chain(natgalore.project(rank=4, refresh_every=5), optax.adamw(1e-1))
        with pytest.warns(UserWarning, match=r"natgalore\.chain"):
            state = tx.init(PARAMS)
        params, x = PARAMS, jax.random.normal(key, (64, 16))

        @jax.jit
        def step(params, state):
            value, gradients = jax.value_and_grad(loss)(params, x)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        params, state, first = step(params, state)
        for _ in range(60):
            params, state, last = step(params, state)
        assert last < first / 3

    def test_stock_chain_returns_the_projected_gradient(self, key):
        tx = natgalore.project(rank=4, inner=optax.identity())  # says so, hence no warning
        G = jax.random.normal(key, (16, 40))
        updates, state = tx.update({**PARAMS, "up": {"kernel": G}}, tx.init(PARAMS))
        P, G = (np.asarray(x) for x in (state.basis["up"]["kernel"].value, G))
        np.testing.assert_allclose(updates["up"]["kernel"], P @ (P.T @ G), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(updates["norm"]["scale"], PARAMS["norm"]["scale"])


def test_natgalore_chain_keeps_core_sized_moments():
    state = natgalore.chain(natgalore.project(rank=4), optax.adamw(1e-2)).init(PARAMS)
    adam = state[0].inner_state[0][0]
    assert adam.mu["up"]["kernel"].value.shape == (4, 40)
    assert adam.nu["norm"]["scale"].shape == (16,)


def test_chain_splits_stages_at_the_projection():
    tx = natgalore.chain(
        optax.clip_by_global_norm(1.0),
        natgalore.project(rank=4),
        optax.scale_by_lion(),
        natgalore.project_back(),
        optax.scale_by_learning_rate(1.0),
    )
    before, subspace, after = tx.init(PARAMS)
    assert isinstance(subspace, SubspaceState)
    assert isinstance(subspace.inner_state[0], optax.ScaleByLionState)
    assert isinstance(before, optax.EmptyState)
    assert isinstance(after, optax.EmptyState)


def test_chain_accepts_a_projection_with_inner():
    tx = natgalore.chain(natgalore.project(4, optax.trace(0.9)), optax.scale(-1.0))
    assert isinstance(tx.init(PARAMS)[0].inner_state, optax.TraceState)


def test_chain_without_a_projection_equals_optax_chain():
    tx = natgalore.chain(optax.scale(2.0), optax.scale(3.0))
    updates, _ = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
    np.testing.assert_array_equal(updates["w"], 6.0)


def test_two_projections_in_one_chain():
    project, back = natgalore.project(4), natgalore.project_back()
    tx = natgalore.chain(project, optax.trace(0.9), back, project, optax.scale_by_lion())
    states = tx.init(PARAMS)
    assert [type(s.inner_state[0]).__name__ for s in states] == ["TraceState", "ScaleByLionState"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: natgalore.chain(optax.scale(1.0), natgalore.project_back()),
        lambda: natgalore.chain(natgalore.project(4, optax.scale(1.0)), natgalore.project_back()),
        lambda: natgalore.project_back().init(PARAMS),
        lambda: optax.chain(natgalore.project(4), natgalore.project_back()).init(PARAMS),
    ],
    ids=["nothing opened", "opened and closed", "alone", "optax.chain"],
)
@pytest.mark.filterwarnings("ignore:natgalore.project")
def test_project_back_alone_raises(build):
    with pytest.raises(ValueError, match=r"closes a subspace"):
        build()


def test_second_open_projection_raises():
    with pytest.raises(ValueError, match=r"second `project`"):
        natgalore.chain(natgalore.project(4), natgalore.project(4))


@pytest.mark.parametrize(
    "build",
    [
        lambda: natgalore.project(4, natgalore.natural_galore(1e-3, 2)),
        lambda: natgalore.chain(natgalore.project(4), natgalore.galore(1e-3, 2)),
        lambda: natgalore.chain(natgalore.project(4), natgalore.project(2, optax.trace(0.9))),
    ],
    ids=["inner", "chain", "chain, project"],
)
def test_projection_in_a_subspace_raises(build):
    with pytest.raises(ValueError, match=r"inside the subspace of another"):
        build().init(PARAMS)


class TestNothingProjected:
    def test_one_warning_gives_the_reasons(self):
        with pytest.warns(UserWarning, match=r"natgalore") as record:
            natgalore.galore(1e-3).init({"norm": {"scale": jnp.ones(9)}, "w": jnp.ones((3, 70))})
        (warning,) = record
        assert "none of the 2 leaves" in str(warning.message)
        assert "norm/scale: a norm; w: too small (3 x 70)" in str(warning.message)

    @pytest.mark.filterwarnings("ignore:natgalore projects none")
    def test_update_equals_plain_adam(self, key):
        params = {"norm": {"scale": jax.random.normal(key, (9,))}}
        tx, adam = natgalore.natural_galore(1e-3), optax.adam(1e-3, b2=0.95)
        ours, _ = tx.update(params, tx.init(params), params)
        theirs, _ = adam.update(params, adam.init(params), params)
        np.testing.assert_allclose(ours["norm"]["scale"], theirs["norm"]["scale"], rtol=1e-6)

    def test_empty_tree_does_not_warn(self):
        tx = natgalore.natural_galore(1e-3)
        assert tx.update({}, tx.init({}), {})[0] == {}


REFUSED = [
    ({"rank": 0}, ValueError),
    ({"rank": 2.0}, ValueError),
    ({"rank": True}, TypeError),
    ({"refresh_every": 0}, ValueError),
    ({"refresh_every": 10**12}, ValueError),
    ({"scale": 0.0}, ValueError),
    ({"scale": "big"}, TypeError),
    ({"basis": "qr"}, ValueError),
    ({"basis": 3}, ValueError),
    ({"side": "top"}, ValueError),
    ({"transport": "reset?"}, ValueError),
    ({"residual": "fire"}, ValueError),
    ({"stagger": 2}, ValueError),
    ({"seed": -1}, ValueError),
]


@pytest.mark.parametrize(("bad", "error"), REFUSED, ids=str)
@pytest.mark.parametrize("make", ["project", "natural_galore", "galore"])
def test_invalid_arguments_are_refused(make, bad, error):
    ((name, value),) = bad.items()
    function = getattr(natgalore, make)
    # Called unchecked: users have no run-time type checker, and our message is what they read.
    function = getattr(function, "__wrapped__", function)
    first = () if make == "project" else (1e-3,)
    with pytest.raises((error, TypeError), match=rf"{name}") as caught:
        function(*first, **bad)
    assert str(value) in str(caught.value)


def test_inner_that_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"inner"):
        natgalore.project(4, optax.adam)


def test_unknown_fisher_is_refused():
    with pytest.raises(ValueError, match=r"`fisher`.*'core', 'window'.*'full'"):
        natgalore.natural_galore(1e-3, fisher="full")


def test_galore_has_the_arguments_of_natural_galore():
    """Its defaults are GaLore's, those of `project`; natural_galore's are what learned best."""
    ours, theirs, engine = (
        inspect.signature(f).parameters
        for f in (natgalore.galore, natgalore.natural_galore, natgalore.project)
    )
    own = ("residual", "refresh_every")
    assert list(ours) == [name for name in theirs if name != "fisher"]
    for name, parameter in ours.items():
        if name != "b2":
            assert parameter == (engine if name in own else theirs)[name]
    assert theirs["residual"].default == "whitened"
    assert theirs["refresh_every"].default == 50
    assert theirs["fisher"].default is None
    assert (ours["b2"].default, theirs["b2"].default) == (0.999, 0.95)


def test_fisher_may_be_a_transformation():
    own = natgalore.scale_by_fisher(window=3, damping=0.1)
    state = natgalore.natural_galore(1e-3, 4, fisher=own).init(PARAMS)
    assert state[0].inner_state[0].window["up"]["kernel"].value.shape == (3, 4, 40)


def test_schedule_scales_every_leaf(key):
    tx = natgalore.galore(optax.piecewise_constant_schedule(1.0, {1: 0.0}), 4)
    gradients = jax.tree.map(lambda x: jax.random.normal(key, x.shape), PARAMS)
    first, state = tx.update(gradients, tx.init(PARAMS), PARAMS)
    second, _ = tx.update(gradients, state, PARAMS)
    assert all((x != 0).any() for x in jax.tree.leaves(first))
    assert not any((x != 0).any() for x in jax.tree.leaves(second))
