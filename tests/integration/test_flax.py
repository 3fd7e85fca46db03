"""Flax NNX and Linen: the boxes they put around arrays change nothing of what is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import natgalore_jax as natgalore
from natgalore_jax.tree.cores import Basis, Core
from tests.helpers.cases import quick


STEPS = 4  # through two refreshes of each matrix
STATIC = ("rank", "fisher", "refresh_every", "basis", "side", "transport", "stagger", "seed")
TOKENS = jnp.arange(8) % 5
TARGETS = jax.random.normal(jax.random.key(1), (8, 12))


def natural_galore(**kwargs):
    kwargs = {"fisher": "core", "residual": None} | kwargs
    return natgalore.natural_galore(1e-2, 4, refresh_every=2, weight_decay=0.1, **kwargs)


def by_module(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


OPTIMIZERS = {
    "default": natgalore.natural_galore(1e-2, 4, refresh_every=2, weight_decay=0.1),
    "core": natural_galore(),
    "galore": natural_galore(fisher=None),
    "window, two-sided, random": natural_galore(fisher="window", side="both", basis="random"),
    "clipped, injected": optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.inject_hyperparams(natgalore.natural_galore, static_args=STATIC)(
            optax.linear_schedule(1e-2, 1e-3, 4), rank=4, refresh_every=2
        ),
    ),
    "decay inside": natgalore.chain(
        natgalore.project(4, refresh_every=2),
        optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
    ),
    "partitioned": optax.partition(
        {
            "embed": optax.adam(1e-2),
            "up": natural_galore(fisher=None),
            "down": optax.set_to_zero(),
        },
        by_module,
    ),
    "accumulated": optax.MultiSteps(natural_galore(fisher=None), 2).gradient_transformation(),
}


class MLP(nnx.Module):
    """Embedding, up and down; `named` gives the axes of its weights names."""

    def __init__(self, rngs: nnx.Rngs, named: bool = False):
        init = nnx.initializers.lecun_normal()
        names = lambda *axes: nnx.with_partitioning(init, axes) if named else init
        self.embed = nnx.Embed(16, 12, embedding_init=names("y", None), rngs=rngs)
        self.up = nnx.Linear(12, 20, kernel_init=names("x", "y"), rngs=rngs)
        self.down = nnx.Linear(20, 12, kernel_init=names("x", "y"), rngs=rngs)

    def __call__(self, tokens):
        return self.down(nnx.relu(self.up(self.embed(tokens))))


def named_mlp(rngs):
    return MLP(rngs, named=True)


class Stack(nnx.Module):
    """Three layers that are created and applied as one."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return nnx.Linear(12, 12, rngs=rngs)

        self.embed = nnx.Embed(16, 12, rngs=rngs)
        self.layers = layers(rngs)
        self.norm = nnx.RMSNorm(12, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def apply(x, layer):
            return x + nnx.relu(layer(x))

        return self.norm(apply(self.embed(tokens), self.layers))


def mesh():
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def loss(model):
    return jnp.square(model(TOKENS) - TARGETS).mean()


def train_step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))


@functools.cache
def trained(name, module=MLP, jit=nnx.jit):
    """Model and optimizer after STEPS, through `nnx.Optimizer`."""
    model = module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name], wrt=nnx.Param)
    step = jit(train_step)
    for _ in range(STEPS):
        step(model, optimizer)
    return model, optimizer


@functools.cache
def trained_dict(name, module=MLP, jit=jax.jit):
    """Weights and state after STEPS, both of plain dicts and arrays."""
    tx = OPTIMIZERS[name]
    graph, weights = nnx.split(module(nnx.Rngs(0)), nnx.Param)
    weights = nnx.to_pure_dict(weights)
    state = tx.init(weights)

    def step(weights, state):
        grads = jax.grad(lambda weights: loss(nnx.merge(graph, weights)))(weights)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    step = jit(step)
    for _ in range(STEPS):
        weights, state = step(weights, state)
    return weights, state


def weights_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def specs(state):
    marked = lambda x: isinstance(x, Core | Basis)
    return [x.spec for x in jax.tree.leaves(state, is_leaf=marked) if marked(x)]


def assert_same_bits(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_same_training(actual, expected):
    (model, optimizer), (weights, state) = actual, expected
    assert jax.tree.structure(weights_of(model)) == jax.tree.structure(weights)
    assert_same_bits(weights_of(model), weights)
    assert_same_bits(optimizer.opt_state, state)
    assert specs(optimizer.opt_state) == specs(state)
    assert specs(state)


def not_jitted(step):
    return step


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "core" else pytest.mark.slow) for name in OPTIMIZERS],
)
def test_nnx_optimizer_equals_a_dict_of_arrays(name):
    assert_same_training(trained(name), trained_dict(name))


@pytest.mark.slow
def test_nnx_optimizer_works_without_jit():
    runs = trained("galore", jit=not_jitted), trained_dict("galore", jit=not_jitted)
    assert_same_training(*runs)


@pytest.mark.slow
def test_scanned_layers_form_one_stack():
    _, optimizer = trained("core", Stack)
    (basis,) = jax.tree.leaves(nnx.as_pure(optimizer.opt_state[0].basis))
    assert basis.shape == (3, 12, 4)
    assert_same_training(trained("core", Stack), trained_dict("core", Stack))


def test_model_and_optimizer_split_and_merge():
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS["core"], wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state):
        model, optimizer = nnx.merge(graph, state)
        train_step(model, optimizer)
        return nnx.state((model, optimizer))

    for _ in range(STEPS):
        state = step(state)
    assert_same_training(nnx.merge(graph, state), trained_dict("core"))


def test_tree_mode_trains_without_graph():
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS["core"], wrt=nnx.Param, graph=False)

    @nnx.jit(graph=False)
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss, graph=False)(model))

    for _ in range(STEPS):
        step(model, optimizer)
    assert_same_training((model, optimizer), trained_dict("core"))


@pytest.mark.slow
def test_reports_of_variables_equal_those_of_arrays():
    tx = OPTIMIZERS["core"]
    model, optimizer = trained("core")
    grads = nnx.grad(loss)(model)
    weights, state = trained_dict("core")
    expected = str(natgalore.describe(tx, weights, state, nnx.to_pure_dict(nnx.state(grads))))
    for params in (model, nnx.state(model, nnx.Param)):
        assert str(natgalore.describe(tx, params, optimizer.opt_state, grads)) == expected
    optimizers = {"adamw": optax.adamw(1.0), "natural_galore": tx}
    report = natgalore.memory_report(nnx.state(model, nnx.Param), optimizers)
    assert report == natgalore.memory_report(weights, optimizers)

    @nnx.jit
    def look(optimizer):
        state = optimizer.opt_state
        return natgalore.fisher_condition(state), natgalore.basis_drift(state, state)

    condition, drift = look(optimizer)
    assert condition == jax.jit(natgalore.fisher_condition)(state)
    assert set(drift) == {"up/kernel", "down/kernel"}
    skipped = natgalore.skipped_steps(optimizer.opt_state)
    assert {type(x) for x in skipped.values()} <= {type(TOKENS)}
    assert set(skipped) == {
        "embed/embedding",
        *(f"{m}/{p}" for m in ("up", "down") for p in ("kernel", "bias")),
    }


def test_select_accepts_boxes():
    """As `jax.tree.map` makes it of an NNX state, or of names that have no box."""
    params = nnx.state(MLP(nnx.Rngs(0)), nnx.Param)
    view = lambda x: natgalore.MatrixView(0, 1) if x.ndim == 2 else None
    ways = [
        jax.tree.map(view, params),
        lambda params: jax.tree.map(view, params),
        [("bias$", None), ("", natgalore.MatrixView(0, 1))],
    ]
    for select in ways:
        state = natgalore.galore(1.0, rank=4, select=select).init(params)
        assert {spec.name for spec in specs(state)} == {
            "embed/embedding",
            "up/kernel",
            "down/kernel",
        }


def test_axis_names_are_those_of_each_array():
    """Those of the weight for an embedding's moments, own ones for a core's."""
    with jax.set_mesh(mesh()):
        model = MLP(nnx.Rngs(0), named=True)
        optimizer = nnx.Optimizer(model, OPTIMIZERS["core"], wrt=nnx.Param)
    axes = nnx.get_partition_spec(nnx.state(optimizer))["opt_state"][0]["inner_state"][1]
    for moment in (axes["mu"], axes["nu"]):
        assert moment["embed"]["embedding"].get_value() == P("y", None)
        assert moment["up"]["kernel"]["kernel"].get_value() == P("x", "y")  # r, n


@pytest.mark.slow
def test_weights_with_axis_names_train_on_a_mesh():
    with jax.set_mesh(mesh()):
        model, _ = trained("galore", named_mlp)
        assert model.up.kernel.get_value().sharding.spec == P("x", "y")
    weights, _ = trained_dict("galore")
    for x, y in zip(jax.tree.leaves(weights_of(model)), jax.tree.leaves(weights), strict=True):
        # Sums over sharded axes in another order: some eps of weights of 1, in updates of 1e-2.
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_sharded_nnx_optimizer_keeps_its_shardings():
    """On Auto axes under jit; a rank that no axis divides."""
    with jax.set_mesh(mesh()):
        model = MLP(nnx.Rngs(0), named=True)
        shardings = jax.tree.map(lambda x: x.sharding, nnx.state(model, nnx.Param))
        tx = natgalore.sharded(natgalore.galore(1e-2, rank=7, refresh_every=2), shardings)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(train_step)
        for _ in range(STEPS):
            step(model, optimizer)
    state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"][0]
    lies = lambda x: x.sharding.spec
    assert lies(state["basis"]["up"]["kernel"]["kernel"]) == P("x")
    for moment in (state["inner_state"][1]["mu"], state["inner_state"][1]["nu"]):
        assert lies(moment["up"]["kernel"]["kernel"]) == P(None, "y")
        assert lies(moment["embed"]["embedding"]) == P("y")
        assert lies(moment["up"]["bias"]) == P()


def boxed_mlp(box):
    """The same in Linen, its weights in the boxes of `box(init, names)`."""

    class Boxed(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            init = linen.initializers.lecun_normal()
            dense = {
                "kernel_init": box(init, ("x", "y")),
                "bias_init": box(linen.initializers.zeros, ("y",)),
            }
            x = linen.Embed(16, 12, embedding_init=box(init, ("y", None)))(tokens)
            x = linen.relu(linen.Dense(20, **dense)(x))
            return linen.Dense(12, **dense)(x)

    return Boxed()


BOXES = {
    "with_partitioning": linen.with_partitioning,
    "with_logical_partitioning": linen.with_logical_partitioning,
}


def created(box, key, name="core"):
    model = boxed_mlp(box)
    params = model.init(key, TOKENS)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZERS[name])


@jax.jit
def apply_gradients(state):
    loss = lambda params: jnp.square(state.apply_fn({"params": params}, TOKENS) - TARGETS).mean()
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def trained_linen(state):
    for _ in range(STEPS):
        state = apply_gradients(state)
    return state


def no_box(init, names):
    return init


@functools.cache
def trained_unboxed(name):
    return trained_linen(created(no_box, jax.random.key(0), name))


@pytest.mark.parametrize("box", quick(["with_partitioning"], BOXES))
def test_linen_boxes_keep_the_training(box):
    state, bare = trained_linen(created(box, jax.random.key(0))), trained_unboxed("core")
    assert isinstance(state.params["Dense_0"]["kernel"], linen.Partitioned)
    assert jax.tree.structure(linen.unbox(state.params)) == jax.tree.structure(bare.params)
    assert_same_bits(state, bare)
    assert specs(state.opt_state) == specs(bare.opt_state)
    mu = state.opt_state[0].inner_state[1].mu
    assert mu["Embed_0"]["embedding"].names == ("y", None)
    assert isinstance(mu["Dense_0"]["kernel"], Core)


@pytest.mark.slow
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_linen_boxes_give_the_shardings_of_a_state(box):
    rules = (("x", "x"), ("y", "y"))
    with jax.set_mesh(mesh()):
        for name in ("core", "galore"):
            create = functools.partial(created, box, name=name)
            axes = linen.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
            shardings = linen.logical_to_mesh_sharding(axes, mesh(), rules)
            state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
            mu = state.opt_state[0].inner_state[1].mu
            assert mu["Embed_0"]["embedding"].value.sharding.spec == P("y", None)
        params = trained_linen(state).params
    bare = trained_unboxed("galore").params
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(bare), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)  # as above


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_state_shardings_of_linen_boxes(box):
    """`state_shardings` of weights in boxes; a rank that no axis divides."""
    tx = natgalore.natural_galore(1e-2, rank=7)
    model = boxed_mlp(box)
    with jax.set_mesh(mesh()):
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        axes = linen.get_partition_spec(params)
        shardings = linen.logical_to_mesh_sharding(axes, mesh(), (("x", "x"), ("y", "y")))
        told = natgalore.state_shardings(tx, params, shardings)
        init = lambda key: tx.init(model.init(key, TOKENS)["params"])
        state = jax.jit(init, out_shardings=told)(jax.random.key(0))
    mu = state[0].inner_state[1].mu
    assert mu["Embed_0"]["embedding"].value.sharding.spec == P("y")
    assert mu["Dense_0"]["kernel"].value.value.sharding.spec == P(None, "y")  # 7 x 20
    assert state[0].basis["Dense_0"]["kernel"].value.value.sharding.spec == P("x")  # 12 x 7
