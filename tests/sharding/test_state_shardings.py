"""Sharded steps equal those on one device, with little communication."""

import contextlib
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from benchmarks.common.hlo import collectives
from tests.helpers.cases import quick, slow


RANK = 5  # no device count divides it
LAYOUTS = {
    "rows": (P("fsdp"), (32, 48)),
    "columns": (P(None, "fsdp"), (32, 48)),
    "rows and columns": (P("fsdp", "tensor"), (32, 48)),
    "layers": (P("fsdp"), (4, 32, 48)),
    "rows of layers": (P(None, ("fsdp", "tensor")), (8, 32, 48)),
    "heads": (P("fsdp", "tensor"), (32, 4, 12)),
    "replicated": (P(), (32, 48)),
}
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
OPTIMIZERS = {
    "core": {"fisher": "core", "residual": None},
    "default": {},
    "window": {"fisher": "window", "residual": None},
    "two-sided": {"side": "both", "fisher": "core", "residual": None},
    "random": {"basis": "random", "residual": None},
    "reset, long": {"transport": "reset", "side": "long", "fisher": "core", "residual": None},
    "whitened": {"fisher": "core", "residual": "whitened"},
    "isotropic": {"residual": "isotropic"},
    "momentum": {"residual": "whitened", "residual_momentum": 0.9},
    "two-sided momentum": {"side": "both", "residual": "whitened", "residual_momentum": 0.9},
}
CORE = OPTIMIZERS["core"]


def make_mesh(kind):
    kinds = (kind, kind) if isinstance(kind, AxisType) else kind
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=kinds)


def weights(layout, key):
    shape = LAYOUTS[layout][1]
    name = "query" if layout == "heads" else "layers"
    keys = jax.random.split(key, 3)
    return {
        name: {"kernel": jax.random.normal(keys[0], shape)},
        "embed": {"embedding": jax.random.normal(keys[1], (64, 32))},
        "norm": {"scale": jax.random.normal(keys[2], (32,))},
    }


def shardings(mesh, layout, params):
    other = {"embed": P("fsdp"), "norm": P()}
    return {
        name: dict.fromkeys(x, NamedSharding(mesh, other.get(name, LAYOUTS[layout][0])))
        for name, x in params.items()
    }


def types(tree):
    return [jax.typeof(x) for x in jax.tree.leaves(tree)]


def train(params, gradients, tx, jitted=True):
    """Trains through two refreshes of every matrix; the types of the state must not change."""
    state = tx.init(params)
    before = types(state)
    update = jax.jit(tx.update) if jitted else tx.update
    for g in gradients:
        updates, state = update(g, state, params)
        assert types(updates) == types(params)
        params = optax.apply_updates(params, updates)
    assert types(state) == before
    return params, state


@functools.cache  # one compilation on one device for all tests of equal shapes
def optimizer(**settings):
    return natgalore.natural_galore(1e-2, RANK, refresh_every=2, weight_decay=0.1, **settings)


def check_equals_one_device(layout, kind, settings, jitted, key):
    tx = optimizer(**settings)
    params, *gradients = [weights(layout, k) for k in jax.random.split(key, 6)]
    expected, _ = train(params, gradients, tx)
    mesh = make_mesh(kind)
    on_mesh = shardings(mesh, layout, params)
    context = contextlib.nullcontext() if kind == AxisType.Auto else jax.set_mesh(mesh)
    with context:
        put = lambda tree: jax.device_put(tree, on_mesh)
        actual, state = train(put(params), [put(g) for g in gradients], tx, jitted)
    for a, b, s in zip(*map(jax.tree.leaves, (actual, expected, on_mesh)), strict=True):
        # Sums in another order, through a refresh and an inverse root: 1e-3 of an update of 1e-2.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert a.sharding.is_equivalent_to(s, a.ndim)
    for x, s in zip(
        *map(jax.tree.leaves, (state, natgalore.state_shardings(tx, params, on_mesh))), strict=True
    ):
        # Along Auto axes the compiler chooses, for counts and on a mesh with both kinds of axes.
        chosen = kind != AxisType.Explicit and (x.size < 100 or not isinstance(kind, AxisType))
        assert chosen or x.sharding.is_equivalent_to(s, x.ndim), (x.shape, x.sharding.spec, s.spec)


@pytest.mark.parametrize("layout", quick(["rows"], [*LAYOUTS]))
def test_explicit_axes_equal_one_device(layout, key):
    check_equals_one_device(layout, AxisType.Explicit, CORE, True, key)


@pytest.mark.parametrize("layout", ["rows and columns", *slow("layers")])
def test_auto_axes_equal_one_device(layout, key):
    check_equals_one_device(layout, AxisType.Auto, CORE, True, key)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("rows of layers", "default"),
        *slow(("columns", "default"), ("rows and columns", "momentum")),
    ],
)
def test_orthogonalised_residual_on_auto_axes_equals_one_device(layout, name, key):
    """With layers distributed over devices, and with the matrix gathered on each device."""
    check_equals_one_device(layout, AxisType.Auto, OPTIMIZERS[name], True, key)


@pytest.mark.slow
def test_eager_steps_on_auto_axes_equal_one_device(key):
    """Without `jit`, the concrete arrays of a sharded stack have shardings."""
    check_equals_one_device("layers", AxisType.Auto, CORE, False, key)


@pytest.mark.parametrize("name", quick(["default"], list(OPTIMIZERS)[1:]))
def test_all_optimizers_on_explicit_axes_equal_one_device(name, key):
    layout = {"window": "layers", "random": "heads"}.get(name, "rows and columns")
    check_equals_one_device(layout, AxisType.Explicit, OPTIMIZERS[name], True, key)


@pytest.mark.slow
def test_mixed_axis_types_equal_one_device(key):
    check_equals_one_device("rows and columns", (AxisType.Auto, AxisType.Explicit), CORE, True, key)


@pytest.mark.parametrize("use_sharded", [True, *slow(False)], ids=["sharded", "out_shardings"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_zero_axis_shards_the_state_of_replicated_weights(kind, use_sharded, key):
    """ZeRO-1: equal steps, sharded state, and an update gathered as a core."""
    shape, r = (64, 512), 8
    tx = natgalore.natural_galore(1e-2, r, refresh_every=2, weight_decay=0.1, **CORE)
    make = lambda k: {"up": jax.random.normal(k, shape), "norm": jax.random.normal(k, (64,))}
    params, *gradients = [make(k) for k in jax.random.split(key, 5)]
    expected, _ = train(params, gradients, tx)
    mesh = make_mesh(kind)
    replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
    shardings = natgalore.state_shardings(tx, params, replicated, zero_axis="fsdp")
    if use_sharded:
        tx, jit_settings = natgalore.sharded(tx, replicated, zero_axis="fsdp"), [{}, {}]
    else:
        jit_settings = [{"out_shardings": shardings}, {"out_shardings": (replicated, shardings)}]
    with jax.set_mesh(mesh):
        actual = jax.device_put(params, replicated)
        state = jax.jit(tx.init, **jit_settings[0])(actual)
        update = jax.jit(tx.update, **jit_settings[1])
        for g in gradients:
            updates, state = update(jax.device_put(g, replicated), state, actual)
            actual = optax.apply_updates(actual, updates)
        program = update.lower(actual, state, actual).compile().as_text()
    for x, s in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    assert state[0].inner_state[1].mu["up"].value.sharding.spec == P(None, "fsdp")
    gathered = [one.shapes for one in collectives(program) if one.hot and one.kind == "all-gather"]
    largest = [max(shapes, key=math.prod) for shapes in gathered]
    as_core = use_sharded or kind == AxisType.Explicit
    assert max(largest, key=math.prod) == ((r, shape[1]) if as_core else shape)
    np.testing.assert_allclose(actual["up"], expected["up"], rtol=1e-5, atol=1e-5)
    on_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert on_device < 0.5 * sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_combinations_equal_one_device(name, layout, kind, key):
    check_equals_one_device(layout, kind, OPTIMIZERS[name], True, key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("name", "layout"),
    [*itertools.product(["core"], LAYOUTS), *itertools.product(list(OPTIMIZERS)[1:], ["layers"])],
)
def test_eager_combinations_equal_one_device(name, layout, kind, key):
    """Every layout with one optimizer, and every optimizer with one layout."""
    check_equals_one_device(layout, kind, OPTIMIZERS[name], False, key)


# Weights large enough that sizes of collectives identify the arrays.
LARGE = {
    "rows": (P("fsdp"), (256, 512)),
    "columns": (P(None, "fsdp"), (256, 512)),
    "rows and columns": (P("fsdp", "tensor"), (256, 512)),
    "rows of a stack": (P(None, "fsdp"), (6, 256, 512)),
    "columns of a stack": (P(None, None, "fsdp"), (6, 256, 512)),
    "layers": (P("fsdp"), (8, 256, 512)),
}


def compiled(spec, shape, kind, r, use_sharded=False, **settings):
    mesh = make_mesh(kind)
    params = {"layers": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    on_mesh = {"layers": {"kernel": NamedSharding(mesh, spec)}}
    tx = natgalore.natural_galore(1e-2, r, **{"refresh_every": 4} | CORE | settings)
    tx = natgalore.sharded(tx, on_mesh) if use_sharded else tx
    with jax.set_mesh(mesh):
        shardings = natgalore.state_shardings(tx, params, on_mesh)
        with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        params = jax.tree.map(with_sharding, params, on_mesh)
        state = jax.tree.map(with_sharding, jax.eval_shape(tx.init, params), shardings)
        program = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    return program, shardings


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layout", quick(["rows", "rows and columns", "layers"], [*LARGE]))
def test_collectives_are_small(layout, kind):
    """On a step without refresh P, cores and r x r arrays travel, never G or the update."""
    spec, shape = LARGE[layout]
    r, (m, n), layers = 16, shape[-2:], math.prod(shape[:-2])
    # On Auto axes partitions are unknown without `sharded`.
    program, shardings = compiled(spec, shape, kind, r, use_sharded=kind == AxisType.Auto)
    ops = collectives(program.as_text())
    assert ops
    for one in ops:
        for moved in one.shapes:
            size = math.prod(moved)
            if one.hot:
                assert size <= layers * r * max(m, n)
            else:
                assert size <= max(m, n) * r
    if layout == "layers":  # each layer is refreshed on its own device
        assert all(math.prod(moved) <= 1 for one in ops for moved in one.shapes)
    received = sum(one.received * one.times for one in ops if one.hot)
    # In float32: a sum of R over the rows' devices, U gathered; P gathered before and after the
    # refresh over the columns' devices; sums of R Rᵀ, the root, and scalars.
    over_rows, over_cols = {
        "rows": (4, 1),
        "columns": (1, 4),
        "rows and columns": (4, 2),
        "rows of a stack": (4, 1),
        "columns of a stack": (1, 4),
        "layers": (1, 1),
    }[layout]
    core, basis = r * n / over_cols, r * m / over_rows
    bound = 3 * core * (1 - 1 / over_rows) + 2 * basis * (1 - 1 / over_cols) + 4 * r * r
    assert received <= 4 * layers * bound + 100
    after = jax.tree.map(
        lambda a, b, x: a.is_equivalent_to(b, x.ndim),
        program.output_shardings[1],
        shardings,
        program.out_info[1],
    )
    assert all(jax.tree.leaves(after))


@pytest.mark.parametrize("zero_axis", [None, *slow("tensor")])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", quick(["core", "default"], [*OPTIMIZERS]))
@pytest.mark.parametrize("layout", LARGE)
def test_state_is_divided_over_all_axes_of_its_weight(layout, name, bits, zero_axis):
    """At most a tenth more than the state / devices, and less than AdamW's."""
    spec, shape = LARGE[layout]
    mesh = make_mesh(AxisType.Explicit)
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    on_mesh = {"kernel": NamedSharding(mesh, spec)}
    names = {
        name for entry in spec for name in ([entry] if isinstance(entry, str) else entry or [])
    }
    devices = math.prod(mesh.shape[name] for name in names | ({zero_axis} - {None}))

    def on_device(tx):
        tx = natgalore.quantized(tx, ("linear", "square", "basis")) if bits == 8 else tx
        state = jax.eval_shape(tx.init, params)
        shardings = natgalore.state_shardings(tx, params, on_mesh, zero_axis=zero_axis)
        pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True))
        part = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        total = sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in pairs)
        return sum(part(*pair) for pair in pairs), total

    state, total = on_device(natgalore.natural_galore(1e-2, 16, **OPTIMIZERS[name]))
    assert state <= 1.1 * total / devices
    if bits == 32:
        adamw, _ = on_device(optax.adamw(1e-2))
        # The window form keeps 20 cores.
        assert state < adamw or name == "window"


@pytest.mark.parametrize("layout", ["rows and columns", *slow("columns of a stack")])
@pytest.mark.parametrize("kind", [*slow(AxisType.Auto), AxisType.Explicit], ids=KINDS)
def test_isotropic_residual_adds_only_column_reductions(layout, kind):
    """Reductions of column norms, no collective of the residual itself."""
    spec, shape = LARGE[layout]
    r, n, layers = 16, shape[-1], math.prod(shape[:-2])
    known = kind == AxisType.Auto  # partitions, by `sharded`
    hot = lambda **settings: sorted(
        math.prod(moved)
        for one in collectives(compiled(spec, shape, kind, r, known, **settings)[0].as_text())
        for moved in one.shapes
        if one.hot and one.kind != "all-gather"
    )
    with_residual, without = hot(residual="isotropic"), hot()
    assert (with_residual == without) == (layout == "columns of a stack")  # whole columns
    assert [size for size in with_residual if size > layers * n] == [
        size for size in without if size > layers * n
    ]
    program, _ = compiled(spec, shape, kind, r, known, residual="isotropic")
    gathered = [x for x in collectives(program.as_text()) if x.hot and x.kind == "all-gather"]
    assert all(math.prod(s) <= layers * r * max(shape[-2:]) for x in gathered for s in x.shapes)


def test_window_adds_one_reduction_of_its_length():
    program, _ = compiled(P(None, "fsdp"), (256, 512), AxisType.Explicit, 16, fisher="window")
    hot = [one for one in collectives(program.as_text()) if one.hot and one.kind != "all-gather"]
    # Sums over n of ⟨H_i, R⟩, before those over r.
    assert max(math.prod(moved) for one in hot for moved in one.shapes) == 16 * 20


def test_max_of_the_gradient_is_computed_at_refreshes_only():
    """XLA hoists operations on G alone out of the refresh loop unless they depend on its carry."""
    program, _ = compiled(P("fsdp"), (256, 512), AxisType.Auto, 16, True, fisher=None)
    scalars = [
        x for x in collectives(program.as_text()) if x.hot and x.shapes == [()] and x.size == 4
    ]
    assert len(scalars) == 1  # max|R|; max|G| would be a second


class TestStateShardings:
    @property
    def mesh(self):
        return make_mesh(AxisType.Explicit)

    @property
    def params(self):
        return {
            "layers": {"query": {"kernel": jax.ShapeDtypeStruct((6, 32, 4, 12), jnp.float32)}},
            "embed": {"embedding": jax.ShapeDtypeStruct((64, 32), jnp.float32)},
        }

    def specs(self, tx, spec, **settings):
        on_mesh = {
            "layers": {"query": {"kernel": NamedSharding(self.mesh, spec)}},
            "embed": {"embedding": NamedSharding(self.mesh, P(("fsdp", "tensor")))},
        }
        state = natgalore.state_shardings(tx, self.params, on_mesh, **settings)
        return jax.tree.map(lambda s: s.spec, state)

    def test_partition_of_each_role(self):
        view = natgalore.MatrixView(1, (2, 3))
        tx = natgalore.project(5, optax.chain(
            natgalore.scale_by_fisher(3), natgalore.scale_by_core_fisher(), optax.scale_by_adam()
        ), select=[("kernel", view)])  # fmt: skip
        state = self.specs(tx, P(None, "fsdp", "tensor"))
        at = lambda tree: tree["layers"]["query"]["kernel"].value
        window, core, adam = state.inner_state
        rows, cols = ("fsdp", "tensor"), ("tensor", "fsdp")
        assert at(state.basis) == P(None, rows)
        assert at(state.refreshed) == at(state.skipped) == P()
        assert at(window.window) == P(None, None, None, cols)
        assert at(window.gram) == at(core.weight) == P()
        assert at(core.fisher) == at(core.root) == P("tensor")  # 5 x 5: only a batch axis divides
        assert at(adam.mu) == at(adam.nu) == P(None, None, cols)
        assert adam.mu["embed"]["embedding"] == P(("fsdp", "tensor"))
        assert adam.count == state.count == state.skipped["embed"]["embedding"] == P()

    def test_partitions_of_layers_and_merged_axes(self):
        at = lambda tree: tree["layers"]["query"]["kernel"].value
        view = natgalore.MatrixView(1, (2, 3))
        tx = natgalore.project(5, optax.trace(0.9), select=[("kernel", view)])
        state = self.specs(tx, P("tensor", "fsdp"))
        assert at(state.basis) == P("tensor", "fsdp")
        assert at(state.inner_state.trace) == P("tensor", None, "fsdp")
        # Of merged axes only the first can keep its sharding; other mesh axes divide n again.
        trace = lambda spec: at(self.specs(tx, spec).inner_state.trace)
        assert trace(P(None, None, None, "fsdp")) == P(None, None, "fsdp")
        assert trace(P(None, None, "tensor", "fsdp")) == P(None, None, ("tensor", "fsdp"))
        # Blocks of size 1 on one axis: that axis and the fused axis share no sharding.
        fused = natgalore.MatrixView(1, (2, 3), blocks={3: 12})
        cut = natgalore.project(5, optax.trace(0.9), side="left", select=[("kernel", fused)])
        assert at(self.specs(cut, P("tensor", None, None, "fsdp")).basis) == P(
            "tensor", None, "fsdp"
        )
        state = self.specs(cut, P(None, "fsdp", None, "tensor"))
        assert at(state.basis) == P(None, None, ("fsdp", "tensor"))
        both = natgalore.project(5, optax.trace(0.9), side="both", select=[("kernel", view)])
        state = self.specs(both, P(None, "fsdp", "tensor"))
        assert at(state.basis) == P(None, ("fsdp", "tensor"))
        assert at(state.right_basis) == P(None, ("tensor", "fsdp"))
        assert at(state.inner_state.trace) == P("tensor")

    def test_axes_that_divide_neither_m_nor_n_divide_r(self):
        params = {"kernel": jax.ShapeDtypeStruct((6, 34, 50), jnp.float32)}
        on_mesh = {"kernel": NamedSharding(self.mesh, P("fsdp", "tensor"))}
        state, *_ = natgalore.state_shardings(natgalore.galore(1e-2, 8), params, on_mesh)
        assert state.basis["kernel"].value.spec == P(None, "tensor", "fsdp")
        assert state.inner_state[1].mu["kernel"].value.spec == P(None, "fsdp", "tensor")

    def test_zero_axis_shards_replicated_state(self):
        at = lambda tree: tree["layers"]["query"]["kernel"].value
        view = natgalore.MatrixView(1, (2, 3))
        tx = natgalore.project(5, optax.scale_by_adam(), select=[("kernel", view)])
        state = self.specs(tx, P(), zero_axis="fsdp")
        assert at(state.basis) == P(None, "fsdp")
        assert at(state.inner_state.mu) == P(None, None, "fsdp")
        both = self.specs(tx, P(), zero_axis=("tensor", "fsdp"))
        assert at(both.inner_state.mu) == P(None, None, ("tensor", "fsdp"))
        assert at(self.specs(tx, P(), zero_axis=["fsdp"]).inner_state.mu) == P(None, None, "fsdp")
        state = self.specs(tx, P(None, None, "tensor"), zero_axis="fsdp")
        assert at(state.inner_state.mu) == P(None, None, ("tensor", "fsdp"))
        assert state.inner_state.mu["embed"]["embedding"] == P(("fsdp", "tensor"))

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: tx,
            *slow(
                lambda tx: optax.chain(optax.clip(1.0), tx),
                lambda tx: optax.masked(tx, {"layers": True, "embed": False}),
                lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
                lambda tx: optax.chain(natgalore.project(5, optax.identity()), optax.adamw(1e-2)),
                lambda tx: optax.inject_hyperparams(
                    natgalore.galore, static_args=natgalore.STATIC_ARGS["galore"]
                )(1e-2, rank=5),
            ),
        ],
        ids=["alone", "chain", "masked", "MultiSteps", "adamw outside", "inject_hyperparams"],
    )
    def test_compositions_initialise_with_state_shardings(self, wrap):
        tx = wrap(natgalore.natural_galore(1e-2, 5, **CORE))
        on_mesh = jax.tree.map(lambda _: NamedSharding(self.mesh, P()), self.params)
        on_mesh["layers"]["query"]["kernel"] = NamedSharding(self.mesh, P(None, "fsdp", "tensor"))
        params = jax.tree.map(lambda x: jnp.ones(x.shape), self.params)
        shardings = natgalore.state_shardings(tx, params, on_mesh)
        with jax.set_mesh(self.mesh):
            state = jax.jit(tx.init, out_shardings=shardings)(jax.device_put(params, on_mesh))
        assert jax.tree.structure(state) == jax.tree.structure(shardings)
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)
        # Arrays of the full weight's shape have its sharding.
        full = [x for x in jax.tree.leaves(state) if x.shape == (6, 32, 4, 12)]
        assert all(x.sharding.spec == P(None, "fsdp", "tensor") for x in full)

    def test_invalid_shardings_are_refused(self):
        tx = natgalore.galore(1e-2, 5)
        one = NamedSharding(self.mesh, P())
        with pytest.raises(ValueError, match=r"`zero_axis` must be one of 'fsdp', 'tensor', got"):
            natgalore.state_shardings(
                tx, self.params, jax.tree.map(lambda _: one, self.params), zero_axis="data"
            )
        with pytest.raises(ValueError, match="must have the structure of the params"):
            natgalore.state_shardings(tx, self.params, {"layers": one})
        other = NamedSharding(jax.make_mesh((8,), ("fsdp",)), P())
        mixed = {"layers": {"query": {"kernel": one}}, "embed": {"embedding": other}}
        with pytest.raises(ValueError, match="NamedShardings on one mesh"):
            natgalore.state_shardings(tx, self.params, mixed)


def test_blocks_that_shards_do_not_align_with(key):
    """The axis of a fused kernel that is split into blocks is replicated in the state."""
    mesh = make_mesh(AxisType.Explicit)
    params, *gradients = [{"qkv": jax.random.normal(k, (32, 48))} for k in jax.random.split(key, 3)]
    tx = natgalore.galore(1e-2, 5, select=natgalore.MatrixView(0, 1, blocks={1: 3}))
    on_mesh = {"qkv": NamedSharding(mesh, P("fsdp", "tensor"))}
    state, *_ = natgalore.state_shardings(tx, params, on_mesh)
    # The 32 columns are the m of each block; of 16 rows x 3 blocks only whole blocks could divide.
    assert state.basis["qkv"].value.spec == P(None, ("fsdp", "tensor"))
    assert state.inner_state[1].mu["qkv"].value.spec == P(None, None, ("fsdp", "tensor"))
    expected, _ = train(params, gradients, tx)
    with jax.set_mesh(mesh):
        put = lambda tree: jax.device_put(tree, on_mesh)
        actual, _ = train(put(params), [put(g) for g in gradients], tx)
    np.testing.assert_allclose(actual["qkv"], expected["qkv"], rtol=1e-5, atol=1e-5)


class TestWithoutJit:
    """Without a mesh in context, new arrays are on the mesh of the given ones."""

    @property
    def params(self):
        params = {"up": jnp.ones((32, 48)), "scale": jnp.ones(32)}
        mesh = make_mesh(AxisType.Explicit)
        return jax.device_put(params, dict.fromkeys(params, NamedSharding(mesh, P("fsdp"))))

    @pytest.mark.filterwarnings("ignore:natgalore projects none")
    def test_inner_creates_arrays(self):
        tx = natgalore.project(RANK, optax.zero_nans())
        params = {"scale": self.params["scale"]}
        updates, _ = tx.update(params, tx.init(params), params)
        assert types(updates) == types(params)
        np.testing.assert_array_equal(updates["scale"], params["scale"])

    def test_all_state_is_on_the_mesh(self):
        inner = optax.adafactor(1e-2, multiply_by_parameter_scale=False)
        state = natgalore.project(RANK, inner).init(self.params)
        assert {x.sharding.mesh for x in jax.tree.leaves(state)} == {make_mesh(AxisType.Explicit)}

    @pytest.mark.parametrize("transformed", [jax.jit, jax.vmap], ids=["jit", "vmap"])
    def test_mesh_is_kept_inside_a_transformation(self, transformed):
        tx, params = natgalore.galore(1e-2, RANK), self.params
        run = transformed(lambda i: tx.update(params, tx.init(params), params))
        jax.eval_shape(run, jnp.arange(2))
