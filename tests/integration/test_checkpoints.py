"""A state that went through Orbax goes on to the same bits, or is refused in plain words."""

import concurrent.futures
import multiprocessing
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import natgalore_jax as natgalore
from natgalore_jax.subspace.state import FORMAT_VERSION
from tests.helpers import write_checkpoint
from tests.helpers.cases import quick, slow


SAVED_AT, STEPS = 3, 6  # with refresh_every=2 through refreshes before and after
STATIC = ("rank", "fisher", "refresh_every", "basis", "side", "transport", "stagger", "seed")


def natural_galore(rank=4, **kwargs):
    """With the Fisher stage, if not told otherwise: the recipe that remembers most."""
    kwargs = {"fisher": "core", "residual": None} | kwargs
    return natgalore.natural_galore(1e-2, rank, refresh_every=2, weight_decay=0.1, **kwargs)


OPTIMIZERS = {
    "default": natgalore.natural_galore(1e-2, 4, refresh_every=2, weight_decay=0.1),
    "core": natural_galore(),
    "window": natural_galore(fisher="window"),
    "random bases, both sides": natural_galore(fisher=None, basis="random", side="both"),
    "residual": natural_galore(residual="whitened"),
    "momentum": natural_galore(residual="whitened", residual_momentum=0.9),
    "momentum in 4 bits": natgalore.quantized(
        natural_galore(residual="whitened", residual_momentum=0.9), {"full": 4}
    ),
    "clipped, injected": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(natgalore.natural_galore, static_args=STATIC)(
            optax.linear_schedule(1e-2, 1e-3, 4), rank=4, refresh_every=2
        ),
    ),
}


def random(seed, dtype=jnp.float32, width=20):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"up": {"kernel": (12, width), "bias": (width,)}, "down": {"kernel": (2, width, 12)}}
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    normal = [jax.random.normal(key, s, dtype) for key, s in zip(keys, leaves, strict=True)]
    return treedef.unflatten(normal)


def go_on(tx, weights, state, first, last):
    update = jax.jit(tx.update)
    for step in range(first, last):
        grads = optax.tree.cast_like(random(step + 1), weights)
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


def types(tree):
    return [jax.typeof(x) for x in jax.tree.leaves(tree)]


def types_after(tx, weights, state):
    return types(jax.eval_shape(lambda *at: go_on(tx, *at, SAVED_AT, STEPS), weights, state))


def untrained(tx):
    """Weights and state at the start: all that a refusal looks at is there."""
    weights = random(0)
    return weights, tx.init(weights)


def saved(tx, save):
    """Weights and state at SAVED_AT, which `save` was given."""
    at = go_on(tx, *untrained(tx), 0, SAVED_AT)
    save(at)
    return at


def target(tx, weights):
    """What is to be restored, with shapes, dtypes and devices, and without an array."""
    abstract = jax.eval_shape(lambda: (weights, tx.init(weights)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)


class Standard:
    """Orbax's StandardCheckpointer: shapes must agree."""

    def __init__(self, folder):
        self.path = folder / "checkpoint"
        self.checkpointer = ocp.StandardCheckpointer()

    def save(self, tree):
        self.checkpointer.save(self.path, tree)
        self.checkpointer.wait_until_finished()

    def restore(self, like):
        return self.checkpointer.restore(self.path, like)

    def close(self):
        self.checkpointer.close()


class PyTree(Standard):
    """Orbax's PyTreeCheckpointer: without shardings it restores shapes as they were saved."""

    def __init__(self, folder):
        self.path = folder / "checkpoint"
        self.checkpointer = ocp.PyTreeCheckpointer()

    def save(self, tree):
        self.checkpointer.save(self.path, tree)

    def restore(self, like):
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        arguments = ocp.checkpoint_utils.construct_restore_args(like)
        return self.checkpointer.restore(self.path, item=like, restore_args=arguments)


@pytest.fixture
def standard(tmp_path):
    orbax = Standard(tmp_path)
    yield orbax
    orbax.close()


@pytest.fixture
def pytree(tmp_path):
    orbax = PyTree(tmp_path)
    yield orbax
    orbax.close()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", quick(["default"], [*OPTIMIZERS]))
@pytest.mark.parametrize("orbax", ["standard", *slow("pytree")])
def test_resumed_run_equals_the_run(name, orbax, request):
    tx, orbax = OPTIMIZERS[name], request.getfixturevalue(orbax)
    at = saved(tx, orbax.save)
    restored = orbax.restore(target(tx, random(0)))
    assert_same(restored, at)
    assert_same(go_on(tx, *restored, SAVED_AT, STEPS), go_on(tx, *at, SAVED_AT, STEPS))


@pytest.mark.slow
def test_resumed_8_bit_run_equals_the_run(standard):
    """Codes, scales, diagonals and the key of the rounding, through refreshes before and after."""
    roles = ("linear", "square", "basis", "fisher", "root")
    tx = natgalore.quantized(natural_galore(64, fisher="core"), roles)
    some = lambda seed: {"kernel": jax.random.normal(jax.random.key(seed), (2, 72, 96))}
    update = jax.jit(tx.update)

    def go_on(weights, state, first, last):
        for step in range(first, last):
            updates, state = update(some(step + 1), state, weights)
            weights = optax.apply_updates(weights, updates)
        return weights, state

    weights = some(0)
    at = go_on(weights, tx.init(weights), 0, SAVED_AT)
    bytes_, integers = [sum(x.dtype == d for x in jax.tree.leaves(at)) for d in ("uint8", "int8")]
    assert bytes_ + integers == 5
    standard.save(at)
    restored = standard.restore(target(tx, weights))
    assert_same(restored, at)
    assert_same(go_on(*restored, SAVED_AT, STEPS), go_on(*at, SAVED_AT, STEPS))


def test_resumed_nnx_optimizer_equals_the_run(standard):
    def create():
        model = nnx.Linear(12, 20, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, OPTIMIZERS["core"], wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.square(model(x) - 1).mean())(model))

    def train(model, optimizer, first, last):
        for i in range(first, last):
            step(model, optimizer, jax.random.normal(jax.random.key(i), (8, 12)))

    both = create()
    train(*both, 0, SAVED_AT)
    standard.save(nnx.state(both))
    graph, abstract = nnx.split(nnx.eval_shape(create))
    resumed = nnx.merge(graph, standard.restore(abstract))
    assert_same(nnx.state(resumed), nnx.state(both))
    train(*resumed, SAVED_AT, STEPS)
    train(*both, SAVED_AT, STEPS)
    assert_same(nnx.state(resumed), nnx.state(both))


@pytest.mark.slow
def test_state_fits_weights_of_another_dtype(standard):
    """The state is float32 whatever the weights are, so it fits both."""
    tx = OPTIMIZERS["core"]
    weights, state = saved(tx, standard.save)
    half = random(0, jnp.bfloat16)
    restored = standard.restore(target(tx, half))
    assert_same(restored, (optax.tree.cast(weights, jnp.bfloat16), state))
    assert {x.dtype for x in jax.tree.leaves(restored[0])} == {jnp.dtype(jnp.bfloat16)}
    assert types_after(tx, *restored) == types(restored)


@pytest.mark.slow
def test_float64_weights_load_a_float32_state_exactly(standard):
    tx = OPTIMIZERS["random bases, both sides"]
    weights, state = saved(tx, standard.save)
    with jax.enable_x64(True):
        double = optax.tree.cast(weights, jnp.float64)
        restored = standard.restore(target(tx, double))
        floats = [x for x in jax.tree.leaves(restored) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floats} == {jnp.dtype(jnp.float64)}
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves((weights, state)), strict=True):
            np.testing.assert_array_equal(x, y)
        assert types_after(tx, *restored) == types(restored)


OTHERS = [
    pytest.param(natural_galore(side="both"), random(0), id="side"),
    pytest.param(
        natural_galore(fisher=None, basis="random"), random(0), id="basis", marks=pytest.mark.slow
    ),
    pytest.param(natural_galore(fisher="window"), random(0), id="Fisher", marks=pytest.mark.slow),
    pytest.param(natural_galore(), {"up": random(0)["up"]}, id="tree", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("tx", "weights"), OTHERS)
def test_restore_refuses_another_structure(tx, weights, standard):
    standard.save(untrained(OPTIMIZERS["core"]))
    with pytest.raises(ValueError, match="tree structures do not match"):
        standard.restore(target(tx, weights))


def refusal(folder, rank, width):
    try:
        Standard(folder).restore(target(natural_galore(rank), random(0, width=width)))
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_restore_refuses_another_shape(standard, tmp_path):
    standard.save(untrained(OPTIMIZERS["core"]))
    # In a process of its own: Orbax abandons the reads beside one that fails, which warns later.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as other:
        for rank, width in ((3, 20), (4, 24)):
            message = other.submit(refusal, tmp_path, rank, width).result()
            assert re.search(r"Requested shape: .* is not compatible with the stored", message)


@pytest.mark.parametrize("basis", ["power", "random"])
@pytest.mark.parametrize("fisher", [None, "window"])
def test_update_refuses_a_state_of_another_rank(basis, fisher, pytree):
    """Where Orbax restores what it finds: shapes of another rank agree with each other."""
    make = lambda rank: natural_galore(rank, basis=basis, fisher=fisher)
    pytree.save(untrained(make(5)))
    weights, state = pytree.restore(target(make(4), random(0)))
    with pytest.raises(ValueError, match=r"`down/kernel`, 12 x 20 at rank 4, .*another `rank`"):
        make(4).update(random(1), state, weights)


def test_update_refuses_a_gradient_of_another_shape():
    tx = OPTIMIZERS["core"]
    state = tx.init(random(0))
    wide = random(0, width=24)
    with pytest.raises(ValueError, match=r"`down/kernel` has shape \(2, 24, 12\)"):
        tx.update(wide, state, wide)


def test_first_releases_checkpoint_loads(tmp_path):
    """A new layout of the state fails here: raise FORMAT_VERSION and read this one all the same."""
    with zipfile.ZipFile(write_checkpoint.FILE.with_name("natural_galore_v1.zip")) as file:
        file.extractall(tmp_path)
    stored = np.load(tmp_path / "expected.npz")
    first, last = write_checkpoint.SAVED_AT, write_checkpoint.STEPS
    weights, state = write_checkpoint.restored(tmp_path)
    assert state[0].version == FORMAT_VERSION == 1
    # Rounding is as large as where the file was written, of other signs where sums have another
    # order; without the state the weights differ by 60 000 times as much.
    close = {"rtol": 0, "atol": 8 * stored["rounding"]}
    resumed = write_checkpoint.by_name(write_checkpoint.go_on(weights, state, first, last)[0])
    for name, weight in resumed.items():
        np.testing.assert_allclose(weight, stored[name], **close)
    anew = write_checkpoint.tx.init(weights)
    without = write_checkpoint.by_name(write_checkpoint.go_on(weights, anew, first, last)[0])
    for name, weight in without.items():
        assert np.abs(weight - stored[name]).max() > 1000 * close["atol"]
