"""State arrays of boxed params carry boxes by which trainers shard them."""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import spmd
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from natgalore_jax.sharding import boxed_state
from natgalore_jax.sharding.partitioning import UnknownMesh
from natgalore_jax.tree.flax_boxes import unbox
from tests.helpers.cases import quick


RULES = (("embed", "fsdp"), ("mlp", ("tensor",)), ("vocab", "tensor"), ("layers", None))
MESH = {"fsdp": 4, "tensor": 2}
SHAPES = {
    "up": ((3, 64, 128), ("layers", "embed", "mlp")),
    "down": ((3, 128, 64), ("layers", "mlp", "embed")),
    "head": ((64, 256), ("embed", "vocab")),
    "norm": ((3, 64), ("layers", "embed")),
}
OPTIMIZERS = {
    "natural_galore": lambda: natgalore.natural_galore(1e-2, 16, refresh_every=2),
    "core": lambda: natgalore.natural_galore(
        1e-2, 16, refresh_every=2, fisher="core", residual=None
    ),
    "window": lambda: natgalore.natural_galore(1e-2, 16, fisher="window", residual=None),
    "both sides": lambda: natgalore.galore(1e-2, 16, side="both"),
    "random": lambda: natgalore.galore(1e-2, 16, basis="random"),
    "8 bits": lambda: natgalore.quantized(
        natgalore.galore(1e-2, 16, refresh_every=2), ("linear", "square", "basis")
    ),
}


def mesh():
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)


def arrays(key):
    keys = jax.random.split(key, len(SHAPES))
    return {
        name: {"kernel": jax.random.normal(k, shape)}
        for k, (name, (shape, _)) in zip(keys, SHAPES.items(), strict=True)
    }


def boxed(tree, box):
    return {name: {"kernel": box(x["kernel"], SHAPES[name][1])} for name, x in tree.items()}


linen = lambda x, names: nn.LogicallyPartitioned(x, names)
in_nnx = lambda x, names: nnx.Param(x, out_sharding=names, eager_sharding=False)


def linen_shardings(tx, params):
    with nn.logical_axis_rules(RULES):
        state = jax.eval_shape(tx.init, params)
        return state, nn.logical_to_mesh_sharding(nn.get_partition_spec(state), mesh(), RULES)


def nnx_shardings(tx, params):
    with spmd.logical_axis_rules(RULES):
        state = jax.eval_shape(tx.init, params)
        specs = nnx.get_partition_spec(state)
    is_spec = lambda x: isinstance(x, P)
    return state, jax.tree.map(lambda x: NamedSharding(mesh(), x), specs, is_leaf=is_spec)


def without_boxes(tree):
    """As MaxText's Linen trainer keeps its state."""
    is_linen = lambda x: isinstance(x, nn.Partitioned)
    return jax.tree.map(lambda x: x.value if is_linen(x) else x, tree, is_leaf=is_linen)


def bytes_of(state, shardings):
    """On one device, and in all."""
    # A sharding stands for a box, and NNX puts one at None too.
    is_sharding = lambda x: isinstance(x, NamedSharding)
    pairs = []
    each = lambda s, below: pairs.extend((x, s) for x in jax.tree.leaves(below))
    jax.tree.map(each, shardings, state, is_leaf=is_sharding)
    part = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(part(*pair) for pair in pairs), sum(x.size * x.dtype.itemsize for x, _ in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("box", "shardings_of"),
    [(linen, linen_shardings), (in_nnx, nnx_shardings)],
    ids=["linen", "nnx"],
)
def test_state_is_divided_as_its_weights(box, shardings_of, name, key):
    """As `state_shardings` divides it, by the trainer's own means and without a mesh in context."""
    params = boxed(arrays(key), box)
    state, shardings = shardings_of(OPTIMIZERS[name](), params)
    on_device, total = bytes_of(state, shardings)
    # All weights are on all eight devices; counts and scales of a few blocks are whole.
    assert on_device <= 1.1 * total / 8 + 200
    with_spec = lambda names: NamedSharding(mesh(), nn.logical_to_mesh_axes(names, RULES))
    weights = {name: {"kernel": with_spec(names)} for name, (_, names) in SHAPES.items()}
    expected = natgalore.state_shardings(OPTIMIZERS[name](), arrays(key), weights)
    assert (
        on_device
        <= 1.02 * bytes_of(jax.eval_shape(OPTIMIZERS[name]().init, arrays(key)), expected)[0]
    )


@pytest.mark.parametrize("name", quick(["natural_galore"], list(OPTIMIZERS)))
def test_steps_in_boxes_equal_steps_without(name, key):
    """Updates keep the boxes of the state, numbers are those of plain arrays, shardings stay."""
    tx, plain = OPTIMIZERS[name](), arrays(key)
    params = boxed(plain, linen)
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        state, shardings = linen_shardings(tx, params)
        actual = jax.jit(tx.init, out_shardings=shardings)(params)
        expected = jax.jit(tx.init)(plain)
        unboxed = without_boxes(actual)
        assert jax.tree.structure(actual) == jax.tree.structure(state)
        update = jax.jit(tx.update)
        for seed in range(3):
            grads = arrays(jax.random.key(seed))
            updates, actual = update(boxed(grads, linen), actual, params)
            assert jax.tree.structure(actual) == jax.tree.structure(state)
            assert jax.tree.structure(updates) == jax.tree.structure(params)
            updates_unboxed, unboxed = update(grads, unboxed, plain)
            assert jax.tree.structure(unboxed) == jax.tree.structure(without_boxes(actual))
            expected_updates, expected = update(grads, expected, plain)
    # Sums in another order, through a refresh; in 8 bits a number near a border to the next cell.
    atol = 2e-4 if name == "8 bits" else 1e-5
    for one in (unbox(updates), updates_unboxed):
        for x, y in zip(*map(jax.tree.leaves, (one, expected_updates)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)


@pytest.mark.slow
def test_update_without_jit_in_a_mesh_context(key):
    """Concrete params that are on no mesh: their names alone do not move arrays."""
    tx, params = OPTIMIZERS["core"](), boxed(arrays(key), linen)
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        updates, _ = tx.update(params, tx.init(params), params)
    plain = arrays(key)
    expected, _ = tx.update(plain, tx.init(plain), plain)
    for x, y in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        # The same operations, compiled in another context: some eps of an update of 1e-2.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axes", ["fsdp", ("fsdp",), ("fsdp", "tensor")])
@pytest.mark.parametrize("shardings_of", [linen_shardings, nnx_shardings], ids=["linen", "nnx"])
def test_one_rule_alone(shardings_of, axes, monkeypatch, key):
    """FSDP: the one name with mesh axes goes to the axis that they divide."""
    monkeypatch.setitem(
        globals(),
        "RULES",
        (("embed", axes), *((name, None) for name in ("mlp", "vocab", "layers"))),
    )
    params = boxed(arrays(key), linen if shardings_of is linen_shardings else in_nnx)
    state, shardings = shardings_of(natgalore.galore(1e-2, 16), params)
    on_device, total = bytes_of(state, shardings)
    assert on_device <= 1.1 * total / (8 if "tensor" in axes else 4)


def test_nnx_optimizer_divides_its_state(key):
    """`nnx.Optimizer` in a mesh context creates sharded state and keeps it through updates."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
            self.up = nnx.Linear(64, 128, kernel_init=init, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    with jax.set_mesh(mesh()):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, natgalore.galore(1e-2, 16), wrt=nnx.Param)
        mu = lambda: optimizer.opt_state[0].inner_state[1].mu["up"]["kernel"].value
        before = mu()[...].sharding.spec
        assert before == P(None, ("tensor", "fsdp"))

        @nnx.jit
        def step(model, optimizer, x):
            grads = nnx.grad(lambda model: jnp.square(model(x)).mean())(model)
            optimizer.update(model, grads)

        for _ in range(2):
            step(model, optimizer, jnp.ones((8, 64)))
        value = mu()[...]
        assert value.sharding.is_equivalent_to(NamedSharding(mesh(), before), 2)
        assert float(jnp.abs(value).max()) > 0


@pytest.mark.filterwarnings("ignore:'sharding_names' is deprecated")
def test_nnx_optimizer_reads_no_other_names_of_the_weight(key):
    """MaxText's params have their names twice, and `nnx.Optimizer` prefers the deprecated ones."""
    param = in_nnx(jnp.ones((64, 128)), ("embed", "mlp"))
    both = {**param.get_metadata(), "sharding_names": ("embed", "mlp")}
    param = nnx.Param.from_metadata(param[...], both)
    with spmd.logical_axis_rules(RULES):
        state = natgalore.galore(1e-2, 16).init({"kernel": param})
        state = nnx.training.optimizer.to_opt_state(state)
        specs = nnx.get_partition_spec(state)
    assert specs[0].inner_state[1].mu["kernel"].value.get_value() == P(None, ("tensor", "fsdp"))


@pytest.mark.parametrize("scan_axis", [0, 1])
def test_nnx_scan_axis_is_named_apart(scan_axis):
    """The state has the name of the layers in its own boxes, so trainers must not insert it."""
    shape = (64, 128)
    param = nnx.Param(
        jnp.ones((*shape[:scan_axis], 3, *shape[scan_axis:])),
        out_sharding=("embed", "mlp"),
        eager_sharding=False,
        partition_name="layers",
        param_scan_axis=scan_axis,
    )
    with spmd.logical_axis_rules(RULES):
        state = natgalore.galore(1e-2, 16).init({"kernel": param})
    box = state[0].inner_state[1].mu["kernel"].value
    assert box.get_metadata()["out_sharding"] == (None, None, ("tensor", "fsdp"))
    assert not {"partition_name", "param_scan_axis"} & {*box.get_metadata()}
    assert state[0].basis["kernel"].value.get_metadata()["out_sharding"] == (
        None,
        ("fsdp", "tensor"),
        None,
    )


def test_names_without_rules_or_mesh_stay_names():
    """Of logical names that rules resolve later, each axis has one."""
    params = {"kernel": linen(jnp.ones((64, 128)), ("embed", "mlp"))}
    state, *_ = natgalore.galore(1e-2, 16).init(params)
    names = lambda x: x["kernel"].value.names
    assert names(state.basis) == ("embed", "mlp")  # r = 16 on the axis of n's name
    assert names(state.inner_state[1].mu) == ("embed", "mlp")
    uneven, *_ = natgalore.galore(1e-2, 10).init(params)
    assert jax.device_count() == 8
    assert names(uneven.inner_state[1].mu) == (None, "mlp")  # up to 8 devices do not divide 10


@pytest.mark.parametrize("names", [("embed", "mlp"), ("mlp", "embed")])
def test_momentum_of_the_residual_has_the_names_of_its_weight(names):
    """In the order of its matrix view, the short side first, before and after an update."""
    shape = [{"embed": 64, "mlp": 128}[name] for name in names]
    params = {"kernel": linen(jnp.ones(shape), names)}
    tx = natgalore.natural_galore(1e-2, 16, residual_momentum=0.9)
    state = tx.init(params)
    _, new = jax.jit(tx.update)(params, state, params)
    for momentum in (x[0].inner_state.momentum["kernel"].value for x in (state, new)):
        assert momentum.names == ("embed", "mlp")
        assert momentum.unbox().shape == (64, 128)


def test_unknown_mesh_bounds():
    """Sizes that are consistent with the weight's shape and the number of devices."""
    assert boxed_state._unknown_mesh(("a", ("b", "c"), None), (12, 64, 5)) == UnknownMesh(
        {"a": 4, "b": 8, "c": 8}, 8
    )


def test_resolved_names_follow_the_order_of_rules():
    rules = (("heads", "tensor"), ("embed", ("fsdp", "tensor")), ("embed", "fsdp"))
    assert boxed_state._resolve(("embed", "heads"), rules) == P("fsdp", "tensor")
    assert boxed_state._resolve(("embed", None), rules) == P(("fsdp", "tensor"), None)
    assert boxed_state._resolve(("other", ("fsdp",)), rules) == P(None, ("fsdp",))


class Axis(NamedTuple):
    name: str
    size: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """As Haliax has it: checks its axes when it is made, not when it is unflattened."""

    array: Any
    axes: tuple[Axis, ...]

    def __post_init__(self):
        assert self.array.shape == tuple(axis.size for axis in self.axes)
        assert len({axis.name for axis in self.axes}) == len(self.axes)

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        self = object.__new__(cls)
        object.__setattr__(self, "array", children[0])
        object.__setattr__(self, "axes", axes)
        return self


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NewNamedArray:
    """Of newer versions: names of axes, whose sizes are those of an array of the same rank."""

    array: Any
    axis_names: tuple[str, ...]

    def __init__(self, array, axes):
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "axis_names", tuple(axis.name for axis in axes))
        assert self.axes == tuple(axes)

    @property
    def axes(self):
        if jnp.ndim(self.array) != len(self.axis_names):
            raise ValueError("another rank")
        return tuple(map(Axis, self.axis_names, self.array.shape))

    def tree_flatten(self):
        return (self.array,), self.axis_names

    @classmethod
    def tree_unflatten(cls, names, children):
        self = object.__new__(cls)
        object.__setattr__(self, "array", children[0])
        object.__setattr__(self, "axis_names", names)
        return self


class Mapping:
    """Stands for the module haliax.partitioning."""

    def __init__(self, **mapping):
        self.mapping = mapping

    def current_thread_local_mapping(self):
        return self.mapping


@pytest.mark.parametrize(
    ("kind", "mapping", "basis", "mu"),
    [
        (
            NamedArray,
            {"embed": "fsdp"},
            ("axis_0", "embed", "axis_2"),
            ("axis_0", "axis_1", "embed"),
        ),
        (
            NewNamedArray,
            {"embed": "fsdp", "mlp": "tensor"},
            ("axis_0", "embed", "mlp"),
            ("axis_0", "embed", "mlp"),
        ),
        (
            NamedArray,
            {"embed": ["fsdp", "tensor"]},
            ("axis_0", "embed", "axis_2"),
            ("axis_0", "axis_1", "embed"),
        ),
        (
            NamedArray,
            {"layers": "fsdp"},
            ("layers", "axis_1", "axis_2"),
            ("layers", "axis_1", "axis_2"),
        ),
    ],
)
def test_named_arrays(monkeypatch, kind, mapping, basis, mu):
    """Each axis of a state array has the name whose mesh axes divide it, and its own size."""
    monkeypatch.setitem(boxed_state.sys.modules, "haliax.partitioning", Mapping(**mapping))
    axes = (Axis("layers", 4), Axis("embed", 64), Axis("mlp", 128))
    G = jax.random.normal(jax.random.key(0), (4, 64, 128))
    params = {"up": kind(G, axes), "scale": jnp.ones(3)}
    tx = natgalore.galore(1e-2, 16)
    with jax.set_mesh(mesh()):
        state = tx.init(params)
        names = lambda tree: tuple(axis.name for axis in tree["up"].value.axes)
        assert names(state[0].basis) == basis
        assert names(state[0].inner_state[1].mu) == mu
        for count in (state[0].skipped, state[0].refreshed):
            assert [axis.size for axis in count["up"].value.axes] == [4]
        updates, new = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert updates["up"].axes == axes
    plain, _ = tx.update(unbox(params), tx.init(unbox(params)), unbox(params))
    np.testing.assert_allclose(updates["up"].array, plain["up"], rtol=1e-5, atol=1e-7)


def test_readers_take_boxed_state(key):
    """describe, memory_report, value_and_grad and the diagnostics."""
    params = boxed(arrays(key), linen)
    tx = natgalore.galore(1e-2, 16)
    with nn.logical_axis_rules(RULES):
        state = tx.init(params)
        plain = tx.init(arrays(key))
    report = lambda params: str(natgalore.memory_report(params, {"galore": tx}))
    assert report(params) == report(arrays(key))
    skipped = [natgalore.skipped_steps(x) for x in (state, plain)]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *skipped))
    loss = lambda params, x: jnp.square(x @ unbox(params)["head"]["kernel"]).mean()
    gradients = natgalore.value_and_grad(loss, tx, on_fallback="ignore")
    x = jnp.ones((4, 64))
    (value, grads), new = gradients(params, state, x)
    (expected, _), _ = gradients(arrays(key), plain, x)
    assert value == expected
    assert jax.tree.structure(new) == jax.tree.structure(state)
    updates, _ = tx.update(grads, new, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
