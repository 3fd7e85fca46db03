"""What every public transformation promises of Optax's protocol, whatever it computes.

A new transformation is one line in TRANSFORMS and earns all of these tests.
"""

import functools
import inspect
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from flax import linen
from flax.training.train_state import TrainState

import natgalore_jax as natgalore
from natgalore_jax.subspace.state import SubspaceState
from tests.helpers.cases import quick, slow


project = functools.partial(natgalore.project, 4, refresh_every=3)
natural_galore = functools.partial(natgalore.natural_galore, 1e-2, 4, refresh_every=3)
core = functools.partial(natural_galore, fisher="core", residual=None)
TRANSFORMS = {
    "natural_galore": natural_galore(weight_decay=0.1),
    "natural_galore, core": core(weight_decay=0.1),
    "natural_galore, window": core(fisher="window"),
    "galore": natgalore.galore(1e-2, 4, refresh_every=3),
    "project": project(optax.trace(0.9)),
    "project, svd": project(optax.trace(0.9), basis="svd", transport="keep"),
    "two-sided, random": core(side="both", basis="random"),
    "scale_by_fisher, bfloat16": natgalore.chain(
        project(side="long", transport="reset"),
        natgalore.scale_by_fisher(3, relative=True, power=0.5, window_dtype=jnp.bfloat16),
    ),
    "scale_by_fisher": natgalore.chain(project(), natgalore.scale_by_fisher(3)),
    "scale_by_core_fisher": natgalore.chain(project(), natgalore.scale_by_core_fisher()),
    "residual": core(residual="isotropic", weight_decay=0.1),
    "residual of one's own, two-sided": project(
        optax.trace(0.9), side="both", residual=lambda left, R, U: 0.1 * left
    ),
    "quantized": natgalore.quantized(
        core(weight_decay=0.1), ("linear", "square", "basis", "fisher", "root")
    ),
    "adamw inside": natgalore.chain(project(), optax.adamw(1e-2, weight_decay=0.1)),
}
PARAMS = {"up": {"kernel": jnp.ones((12, 20))}, "norm": {"scale": jnp.ones(12)}, "frozen": None}


@pytest.fixture(autouse=True)
def small_arrays_are_worth_8_bits(monkeypatch):
    monkeypatch.setattr("natgalore_jax.quantization.quantized_array.SMALLEST", 16)


@pytest.fixture(params=quick(["natural_galore"], TRANSFORMS))
def tx(request):
    return request.param


def gradients(count=0, params=PARAMS):
    key = jax.random.fold_in(jax.random.key(7), count)
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), params)


def traced(tx, params, **extra):
    """The types of an update: where it is not run, it need not be compiled."""
    return jax.eval_shape(lambda x: tx.update(x, tx.init(x), x, **extra), params)


def types(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.typeof(x) for x in leaves], treedef


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_types_are_fixed_points(tx, dtype):
    params = optax.tree.cast(PARAMS, dtype)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert types(updates) == types(params)
    assert types(new_state) == types(state)


def test_init_accepts_shapes(tx):
    abstract = jax.eval_shape(lambda: PARAMS)
    assert types(tx.init(abstract)) == types(tx.init(PARAMS))


def test_none_leaves_and_empty_trees(tx):
    state = tx.init({})
    assert tx.update({}, state, {})[0] == {}
    assert traced(tx, PARAMS)[0]["frozen"] is None


def test_extra_arguments_are_accepted(tx):
    traced(tx, PARAMS, value=jnp.float32(1.0), unknown=None)


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_parameter_names_follow_the_protocol(tx):
    assert list(inspect.signature(tx.update).parameters)[:3] == ["updates", "state", "params"]
    assert next(iter(inspect.signature(tx.init).parameters)) == "params"


def test_float64_stays_float64(tx):
    with jax.enable_x64(True):
        params = optax.tree.cast(PARAMS, jnp.float64)
        updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
        # A window_dtype is asked for; numpy knows bfloat16 as a type of its own, of kind "V".
        floats = [x.dtype for x in jax.tree.leaves((updates, state)) if x.dtype.kind == "f"]
    assert set(floats) == {jnp.dtype("float64")}


def test_masked_leaves_pass_unchanged(tx):
    masked = optax.masked(tx, {"up": {"kernel": True}, "norm": {"scale": False}, "frozen": None})

    def update(g, state):
        updates, _ = masked.update(g, state, PARAMS)
        assert updates["norm"]["scale"] is g["norm"]["scale"]
        assert updates["up"]["kernel"] is not g["up"]["kernel"]

    jax.eval_shape(update, gradients(), masked.init(PARAMS))


def test_apply_if_finite_keeps_the_state_types(tx):
    """`optax.apply_if_finite`: the state after an update has the type of the state before."""
    wrapped = optax.apply_if_finite(tx, 3)
    _, state = traced(wrapped, PARAMS)
    assert types(state.inner_state) == types(jax.eval_shape(tx.init, PARAMS))


@pytest.mark.parametrize("around", [optax.chain, *slow(natgalore.chain)])
def test_extra_arguments_reach_inner(around):
    def update(updates, state, params=None, *, value=1.0, name="none"):
        scale = value if name == "loss" else 0.0
        return jax.tree.map(lambda x: scale * x, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    stages = optax.chain(natgalore.scale_by_core_fisher(), inner)
    tx = around(natgalore.project(4, stages, transport="keep"))
    state = tx.init(PARAMS)
    one, _ = tx.update(gradients(), state, PARAMS, value=1.0, name="loss")
    three, _ = tx.update(gradients(), state, PARAMS, value=3.0, name="loss")
    expected = jax.tree.map(lambda x: 3 * x, one)
    assert any(x.any() for x in jax.tree.leaves(one))
    chex.assert_trees_all_close(
        three, expected, rtol=1e-6, atol=1e-6
    )  # sums of 12 float32 products


def test_masked_nodes_pass_unchanged(tx):
    updates, _ = traced(tx, {**PARAMS, "masked": optax.MaskedNode()})
    assert updates["masked"] == optax.MaskedNode()


def test_tree_map_params_finds_bases(tx):
    """`optax.tree.map_params` asks init for a state of a tree without leaves."""
    state = tx.init(PARAMS)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert types(same) == types(state)
    marked = optax.tree.map_params(tx, lambda _: "params", state, transform_non_params=str)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    (subspace,) = [x for x in jax.tree.leaves(marked, is_leaf=is_subspace) if is_subspace(x)]
    assert subspace.count == "0"
    assert set(jax.tree.leaves(subspace.basis)) == {"params"}


def is_subspace(x):
    return isinstance(x, SubspaceState)


class TestInFloat64:
    """Where rounding is no excuse."""

    @pytest.fixture(autouse=True)
    def float64(self):
        with jax.enable_x64(True):
            yield

    @pytest.fixture
    def params(self):
        return {"up": {"kernel": jnp.ones((12, 20))}, "norm": {"scale": jnp.ones(12)}}

    def equal(self, actual, expected):
        chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-12)

    def test_steps_compile_once_donate_and_equal_a_scan(self, tx, params):
        steps, traces = 5, 0
        many = [gradients(count, params) for count in range(steps)]

        def step(carry, g):
            nonlocal traces
            traces += 1
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (params, tx.init(params))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
        expected, _ = jax.jit(lambda *args: jax.lax.scan(step, *args))(start, stacked)
        traces = 0
        donating = jax.jit(step, donate_argnums=0)
        carry = jax.tree.map(jnp.copy, start)
        for g in many:
            given, (carry, _) = carry, donating(carry, g)
            assert all(x.is_deleted() for x in jax.tree.leaves(given))
        assert traces == 1
        self.equal(carry, expected)

    def test_multi_steps_averages_gradients(self, tx, params):
        a, b = gradients(0, params), gradients(1, params)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
        expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
        many = optax.MultiSteps(tx, 2, accumulator_dtype=jnp.float64)
        update = jax.jit(many.update)
        nothing, state = update(a, many.init(params), params)
        updates, _ = update(b, state, params)
        assert not any(x.any() for x in jax.tree.leaves(nothing))
        self.equal(updates, expected)

    def test_partition_and_named_chain_keep_the_updates(self, tx, params):
        g, kernel = gradients(0, params), {"up": params["up"]}
        expected, _ = tx.update({"up": g["up"]}, tx.init(kernel), kernel)
        parts = {"a": optax.named_chain(("ours", tx)), "b": optax.sgd(1.0)}
        whole = optax.partition(parts, {"up": "a", "norm": "b"})
        updates, _ = whole.update(g, whole.init(params), params)
        self.equal(updates, {**expected, "norm": {"scale": -g["norm"]["scale"]}})

    def test_flattened_tree_is_not_projected(self, tx, params):
        flat = optax.flatten(tx)
        with pytest.warns(UserWarning, match="natgalore projects none of the 1 leaves"):
            state = flat.init(params)
        updates, _ = flat.update(gradients(0, params), state, params)
        assert all(x.any() for x in jax.tree.leaves(updates))


def test_weakly_typed_weights_keep_all_types(tx):
    """Only their own, as any update does: the step is compiled for them, and once more."""
    weak = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(1.0), x.shape), PARAMS)
    assert weak["up"]["kernel"].weak_type
    state, g = tx.init(weak), gradients()
    updates, after = jax.eval_shape(tx.update, g, state, weak)
    assert types(after) == types(state)
    assert types(updates) == types(g)


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    @parameterized.named_parameters(
        ("core", "natural_galore, core"),
        ("window", "natural_galore, window"),
        ("decay", "adamw inside"),
    )
    def test_jit_pmap_and_eager_updates_agree(self, name):
        tx = TRANSFORMS[name]
        params = {k: v for k, v in PARAMS.items() if v is not None}
        state, expected = tx.init(params), params
        update = self.variant(tx.update)
        mine, theirs = state, state
        for count in range(2):
            g = gradients(count, params)
            actual, mine = update(g, mine, params)
            expected, theirs = jax.jit(tx.update)(g, theirs, params)
        # The same operations fused otherwise, through one inverse root: a few roundings.
        chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_pmap_with_reduced_gradients_equals_one_device():
    tx = TRANSFORMS["natural_galore"]
    params = {"up": {"kernel": jnp.ones((12, 20))}}
    n = 4

    def step(params, state, g):
        g = jax.lax.pmean(g, "data")
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    copies = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * n), tree)
    many, many_state = copies(params), copies(tx.init(params))
    one, one_state = params, tx.init(params)
    pstep = jax.pmap(step, axis_name="data", devices=jax.devices("cpu")[:n])
    for count in range(4):
        g = jnp.stack([gradients(10 * count + i, params)["up"]["kernel"] for i in range(n)])
        many, many_state = pstep(many, many_state, {"up": {"kernel": g}})
        updates, one_state = jax.jit(tx.update)({"up": {"kernel": g.mean(0)}}, one_state, one)
        one = optax.apply_updates(one, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(many_state, copies(one_state))
    for replica in many["up"]["kernel"]:
        np.testing.assert_allclose(replica, one["up"]["kernel"], rtol=1e-4)


class TestPartners:
    """What the README says works."""

    def test_partition_freezes_leaves(self):
        params = {"a": {"kernel": jnp.ones((12, 20))}, "b": {"kernel": jnp.ones((12, 20))}}
        tx = optax.partition(
            {"train": natgalore.galore(1e-2, 4), "freeze": optax.set_to_zero()},
            {"a": "train", "b": "freeze"},
        )
        state = tx.init(params)
        updates, _ = tx.update(gradients(0, params), state, params)
        assert updates["a"]["kernel"].any()
        assert not updates["b"]["kernel"].any()
        assert not [x for x in jax.tree.leaves(state) if x.shape == (12, 20)]

    def test_linen_train_state(self):
        model = linen.Dense(20)
        x = jnp.ones((3, 12))
        params = model.init(jax.random.key(0), x)["params"]
        state = TrainState.create(
            apply_fn=model.apply, params=params, tx=natgalore.natural_galore(1e-2, 4)
        )
        state = state.apply_gradients(grads=gradients(0, params))
        assert (state.params["kernel"] != params["kernel"]).any()


def test_params_may_be_a_named_tuple():
    class Params(NamedTuple):
        up: jax.Array
        down: jax.Array

    params = Params(jnp.ones((12, 20)), jnp.ones((20, 12)))
    tx = TRANSFORMS["natural_galore"]
    updates, _ = tx.update(gradients(0, params), tx.init(params), params)
    assert isinstance(updates, Params)
    assert updates.up.any()


def test_updates_have_the_dtype_of_the_weights():
    params = {"up": {"kernel": jnp.ones((12, 20))}}
    tx = natgalore.project(4, optax.trace(0.9))
    g = optax.tree.cast(gradients(0, params), jnp.bfloat16)
    updates, _ = tx.update(g, tx.init(params), params)
    assert updates["up"]["kernel"].dtype == jnp.float32
