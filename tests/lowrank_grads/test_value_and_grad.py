"""Cores straight from the backward pass against those of whole gradients, and all that follows.

In float32 a core PᵀG sums in another order than (x P)ᵀ ȳ. Either way rounds sums of at most a few
hundred terms, which came to 4e-7 of the largest entry; 2e-6 leaves room for another BLAS.
"""

import itertools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from examples.common.llama import Llama, LlamaConfig, next_token_loss
from natgalore_jax.lowrank_grads import value_and_grad as module
from natgalore_jax.lowrank_grads.loss import backward
from natgalore_jax.subspace.basis import expand, to_core
from natgalore_jax.subspace.engine import SubspaceState
from natgalore_jax.tree.flax_boxes import unbox
from natgalore_jax.tree.leaf_spec import Basis, Core, core_arrays, cores
from tests.helpers.cases import slow
from tests.helpers.compiling import AS_FOR_USERS
from tests.helpers.hlo import collectives


RTOL = 2e-6
RANK = 3
is_state = lambda x: isinstance(x, SubspaceState)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(
        shape[-2] if len(shape) > 1 else 1
    )


def hot(opt_state):
    """The state as it is between refreshes."""

    def at(x):
        if not is_state(x):
            return x
        once = jax.tree.map(jnp.ones_like, x.refreshed)
        return x._replace(count=jnp.ones_like(x.count), refreshed=once)

    return jax.tree.map(at, opt_state, is_leaf=is_state)


def projection(select=None, side="left", **kwargs):
    settings = {"refresh_every": 50, "stagger": False, "select": select, "side": side} | kwargs
    return natgalore.project(RANK, optax.identity(), **settings)


def bases(opt_state):
    """(P,) or (P, Q) of each projected leaf, by its path."""
    found = {}
    for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Basis)):
        if isinstance(x, Basis):
            found[x.spec.path] = (*found.get(x.spec.path, ()), x)
    return found


def expected(grads, opt_state):
    """The tree of `value_and_grad` from whole gradients."""
    found = bases(opt_state)

    def at(path, G):
        if path not in found:
            return G
        sides = [expand(x.value, x.spec, jnp.float32) for x in found[path]]
        spec = found[path][0].spec
        G = G.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            return Core(to_core(spec.to_view(G), *sides), spec)

    return jax.tree_util.tree_map_with_path(at, grads)


def assert_close(got, want, rtol=RTOL):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.abs(y).max()), 1e-30)
        np.testing.assert_allclose(x / scale, y / scale, atol=rtol)


# --- cases: a loss of weights of the given shapes, W1, W2, ... ---------------------------------

X = normal(0, 10, 12)
VIEW = natgalore.MatrixView
CASES = {}


def case(*shapes, view=None, side="left", fallback=(), rtol=RTOL, **kwargs):
    """`fallback`: the operations that take a weight whole."""
    view = VIEW(-2, -1) if view is None else view
    settings = {"side": side, "select": view} | kwargs

    def note(loss):
        number = sum(name.startswith(loss.__name__) for name in CASES)
        CASES[f"{loss.__name__}{number or ''}"] = shapes, loss, settings, fallback, rtol
        return loss

    return note


@case((12, 8), (8, 9))
@case((12, 8), (8, 9), side="right")
@case((12, 8), (8, 9), side="both")
@case((12, 8), (8, 9), side="short", basis="random")
def dense(W1, W2):
    return jnp.sum(jnp.tanh(jnp.tanh(X @ W1) @ W2) ** 2)


@case((12, 8))
@case((12, 8), side="right")
@case((12, 8), side="both")
def weight_first(W):
    return jnp.sum(jnp.tanh(W.T @ X.T) ** 2) + jnp.sum(jnp.tanh(W @ jnp.ones((8, 5))) ** 2)


@case((12, 2, 5), view=VIEW(0, (1, 2)))
@case((12, 2, 5), view=VIEW(0, (1, 2)), side="right")
@case((12, 2, 5), view=VIEW(0, (1, 2)), side="both")
@case((12, 2, 5), view=VIEW(0, 2))  # a matrix for each head
def heads(W):
    y = jnp.einsum("td,dhk->thk", X, W)
    return jnp.sum(jnp.tanh(jnp.einsum("thk,dhk->td", y, W)) ** 2)


@case((12, 10))
@case((12, 10), side="right")
@case((12, 10), side="both")
def heads_by_reshape(W):
    return jnp.sum(jnp.tanh(jnp.einsum("td,dhk->thk", X, W.reshape(12, 2, 5))) ** 2)


@case((12, 10), side="both")
def flattened(W):
    """A reshape that mixes rows and columns, and one that takes them apart again."""
    return jnp.sum(jnp.tanh(X @ W.reshape(-1).reshape(12, 10)) ** 2)


@case((3, 12, 12))
@case((3, 12, 12), side="right")
@case((3, 12, 12), side="both")
def scanned(W):
    y, _ = lax.scan(lambda y, w: (jnp.tanh(y @ w), None), X, W)
    return jnp.sum(y**2)


@case((3, 12, 12))
@case((3, 12, 12), side="both", basis="random")
def scanned_remat(W):
    step = jax.checkpoint(lambda y, w: (jnp.tanh(y @ w), y.sum()))
    y, sums = lax.scan(step, X, W, reverse=True)
    return jnp.sum(y**2) + jnp.sum(sums**2)


@case((12, 12))
def recurrent(W):
    """A constant of the scan."""
    y, _ = lax.scan(lambda y, x: (jnp.tanh(x + y @ W), None), X[0], X)
    return jnp.sum(y**2)


@case((3, 12, 12))
def layer_by_index(W):
    y = lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ W[i]), X)
    for i in range(3):
        y = jnp.tanh(y @ W[i])
    return jnp.sum(y**2)


@case((30, 12))
@case((30, 12), side="right")
@case((30, 12), side="both")
def tied_embedding(W):
    y = jnp.tanh(jnp.take(W, jnp.array([[3, 1, 29], [3, 3, 7]]), axis=0))
    return jnp.sum(jax.nn.log_softmax(y @ W.T) ** 2)


@case((3, 12, 8))
def experts_by_index(W):
    return jnp.sum(jnp.tanh(jnp.einsum("ti,tij->tj", X, W[jnp.array([0, 1, 2, 1, 0] * 2)])) ** 2)


@case((12, 12))
def several_uses(W):
    return jnp.sum(jnp.tanh(jnp.tanh(X @ W) @ W.T @ W) ** 2)


@case((12, 24))
@case((12, 24), view=VIEW(0, 1, blocks={1: 3}))
@case((12, 24), view=VIEW(0, 1, blocks={1: 3}), side="both")
def fused(W):
    """Of the weight itself: slices, a split; and all of it."""
    q, k, v = jnp.split(W, 3, axis=1)
    y = jnp.tanh(X @ q) * jnp.tanh(X @ k) + X @ v
    return jnp.sum(y**2) + jnp.sum(jnp.tanh(X @ W[:, 8:]) ** 2) + jnp.sum(jnp.tanh(X @ W) ** 2)


@case((12, 24), view=VIEW(0, 1, blocks={1: 3}), fallback=("slice",))
def cut_across_blocks(W):
    return jnp.sum(jnp.tanh(X @ W[:, 5:12]) ** 2)


@case((4, 12, 8), (4, 8, 12))
@case((4, 12, 8), (4, 8, 12), side="both")
def experts(W1, W2):
    y = jnp.tanh(jnp.einsum("td,edf->etf", X, W1))
    return jnp.sum(jnp.einsum("etf,efd->td", y, W2) ** 2)


@case((3, 3, 6, 8), view=VIEW(2, 3), fallback=("conv_general_dilated",))
def convolution(W):
    x = normal(1, 2, 7, 7, 6)
    y = lax.conv_general_dilated(x, W, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(jnp.tanh(y) ** 2)


@case((12, 12))
def conditional(W):
    y = lax.cond(X[0, 0] > -9, lambda x: jnp.tanh(x @ W), lambda x: x, X)
    return jnp.sum(lax.switch(1, [jnp.sin, lambda x: x @ W, jnp.cos], y) ** 2)


@case((12, 12))
def while_loop(W):
    """Constants of a loop, which no gradient passes in reverse."""
    stopped = lax.stop_gradient(W)
    y = lax.while_loop(lambda y: jnp.sum(y**2) > 1, lambda y: jnp.tanh(y @ stopped) / 2, X)
    return jnp.sum((y + X @ W) ** 2)


@case((3, 12, 8))
@case((3, 12, 8), side="both")
def mapped(W):
    return jnp.sum(jax.vmap(lambda w: jnp.sum(jnp.tanh(X @ w) ** 2))(W))


@case((12, 8))
def nested_jit(W):
    return jnp.sum(jax.jit(lambda x, w: jax.jit(jnp.tanh)(x @ w))(X, W) ** 2)


@case((12, 8), (8, 9), rtol=2e-2)  # whole gradients are rounded to bfloat16 too, 4e-3 at one entry
@case((12, 8), (8, 9), rtol=2e-2, side="both")
def bfloat16(W1, W2):
    W1, W2, x = (a.astype(jnp.bfloat16) for a in (W1, W2, X))
    return jnp.sum((jnp.tanh(x @ W1) @ W2).astype(jnp.float32) ** 2)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@case((12, 8))
def custom_rules(W):
    """Of what a weight does not enter."""
    return jnp.sum(doubled(jax.nn.silu(jax.nn.relu(X @ W) + X @ W)) ** 2)


@case((12, 8), fallback=("custom_vjp_call",))
def custom_rule_of_weight(W):
    return jnp.sum(jnp.tanh(X @ doubled(W)) ** 2)


@case((12, 8))
def scaled(W):
    return jnp.sum(jnp.tanh(X @ (-W * 0.5 / 3.0) * jnp.tanh(X @ (W * X[0, 0]))) ** 3)


@case((12, 8), fallback=("integer_pow", "mul"))
def elementwise(W):
    return jnp.sum(jnp.tanh(X @ (W * X[:1, :8])) ** 2) + jnp.sum(W**2)


@case((12, 12), fallback=("dot_general",))
def product_of_weights(W):
    return jnp.sum(jnp.tanh(X @ (W @ W)) ** 2)


@case((12, 8))
def stopped(W):
    return jnp.sum(jnp.tanh(X @ W) ** 2) * jnp.sum(lax.stop_gradient(W) ** 2)


@case((12, 8), (12,))
def with_other_leaves(W, b):
    return jnp.sum(jnp.tanh((X + b[None]) @ W) ** 2)


@case((12, 12))
def gradient_inside(W):
    """A penalty on the gradient by x: W in a program made by differentiation."""
    return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ W) ** 2))(X) ** 2)


@pytest.mark.parametrize("name", CASES)
def test_cores_are_those_of_whole_gradients(name):
    shapes, loss, settings, fallback, rtol = CASES[name]
    params = {f"W{i}": normal(i + 7, *shape) for i, shape in enumerate(shapes)}
    select = {k: settings["select"] if w.ndim > 1 else None for k, w in params.items()}
    opt_state = projection(**settings | {"select": select}).init(params)
    of = lambda params: loss(*params.values())
    told = []

    @jax.jit
    def both_ways(params, opt_state):
        run, fallbacks = backward(of, params, False, (), {})
        (value, _), grads = run(bases(opt_state))
        ours = value, grads
        told.append({operation for operation, _ in fallbacks})
        return ours, jax.value_and_grad(of)(params)

    (value, grads), (value_whole, grads_whole) = both_ways(params, opt_state)
    np.testing.assert_allclose(value, value_whole, rtol=1e-6)  # fused otherwise by the compiler
    assert_close(grads, expected(grads_whole, opt_state), rtol)
    assert cores(grads)
    assert told == [{*fallback}]


# --- models and optimizers as people have them ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_llama(scan, remat):
    config = LlamaConfig(16, 24, heads=2, layers=2, vocabulary=32, scan=scan, remat=remat)
    graph, params = nnx.split(Llama(config, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
    loss = lambda params, tokens: next_token_loss(nnx.merge(graph, params), tokens)
    tx = projection(None, "short")
    opt_state = hot(tx.init(params))
    ours = jax.jit(natgalore.value_and_grad(loss, tx, on_fallback="error"))
    (value, grads), _ = ours(params, opt_state, tokens)
    value_whole, grads_whole = jax.jit(jax.value_and_grad(loss))(params, tokens)
    np.testing.assert_allclose(value, value_whole, rtol=1e-6)
    assert len(cores(grads)) == (7 if scan else 14)
    assert_close(unbox(grads), expected(unbox(grads_whole), opt_state))
    updates, _ = tx.update(grads, opt_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


PARAMS = {
    "embed": {"bias": jnp.zeros(12)},
    "layers": {"kernel": normal(2, 3, 12, 12)},
    "none": None,
    "out": {"kernel": normal(3, 12, 20)},
}


def small_loss(params, x, *, power=2):
    h = x + params["embed"]["bias"][None]
    step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    h, _ = lax.scan(step, h, params["layers"]["kernel"])
    return jnp.mean(jnp.abs(h @ params["out"]["kernel"] - 1) ** power)


def batches(steps):
    return [jax.random.normal(jax.random.key(i), (8, 12)) for i in range(steps)]


def trained(tx, gradients, steps=9, params=PARAMS, batch=None):
    """Params and states after each step; `gradients(params, opt_state, x)`."""

    def step(params, opt_state, x):
        (_, grads), opt_state = gradients(params, opt_state, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, step, seen = tx.init(params), jax.jit(step), []
    for x in batches(steps) if batch is None else batch:
        params, opt_state = step(params, opt_state, x)
        seen.append((params, opt_state))
    return seen


def whole_gradients(loss=small_loss):
    return lambda params, opt_state, x: (jax.value_and_grad(loss)(params, x), opt_state)


def both_ways(tx, refresh="auto", **kwargs):
    ours = natgalore.value_and_grad(small_loss, tx, refresh=refresh, on_fallback="error")
    return trained(tx, ours, **kwargs), trained(tx, whole_gradients(), **kwargs)


def assert_same_training(ours, whole, rtol=2e-5):
    """Adam divides by roots of squares: 2e-6 of a core's largest entry is more of its smaller."""
    for (params, opt_state), (params_whole, opt_state_whole) in zip(ours, whole, strict=True):
        assert jax.tree.structure(opt_state) == jax.tree.structure(opt_state_whole)
        chex.assert_trees_all_close(params, params_whole, atol=rtol)


def natural(**kwargs):
    settings = {"refresh_every": 4, "fisher": "core", "residual": None} | kwargs
    return natgalore.natural_galore(1e-2, RANK, **settings)


def galore(**kwargs):
    """Less to compile."""
    return natural(fisher=None, **kwargs)


OPTIMIZERS = {
    "natural": natural,
    "all_at_once": lambda: natural(stagger=False),
    "decay": lambda: natural(weight_decay=0.1, stagger=False),
    "window": lambda: natural(fisher="window", stagger=False),
    "both": lambda: natural(side="both", stagger=False),
    "random": lambda: natural(basis="random", stagger=False, transport="reset"),
    "chain": lambda: natgalore.chain(
        optax.clip(1e3),
        natgalore.project(RANK, refresh_every=4, stagger=False),
        optax.scale_by_adam(),
        natgalore.project_back(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    ),
    "masked": lambda: optax.masked(
        natural(stagger=False), {"embed": False, "layers": True, "none": None, "out": True}
    ),
    "partition": lambda: optax.partition(
        {"deep": natural(stagger=False), "rest": natural(side="long"), "sgd": optax.sgd(0.1)},
        {"embed": "sgd", "layers": "deep", "none": None, "out": "rest"},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        natgalore.natural_galore, natgalore.STATIC_ARGS["natural_galore"]
    )(learning_rate=1e-2, rank=RANK, refresh_every=4, residual=None, stagger=False),
    "multi_steps_inside": lambda: natgalore.project(
        RANK, optax.MultiSteps(optax.adam(1e-2), 2), refresh_every=4, stagger=False
    ),
}


QUICK = ("natural", "both")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_training_is_that_of_whole_gradients_through_refreshes(name):
    """New bases come from passes, but for those of both sides."""
    assert_same_training(*both_ways(OPTIMIZERS[name]()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["all_at_once", *(pytest.param(n, marks=pytest.mark.slow) for n in ("natural", "partition"))],
)
def test_so_is_that_with_bases_from_whole_gradients(name):
    assert_same_training(*both_ways(OPTIMIZERS[name](), refresh="gradient"))


@pytest.mark.slow
def test_a_refresh_takes_the_whole_gradient_if_asked():
    """With something due at each step there is no other rounding: the same to the bit."""
    ours, whole = both_ways(galore(refresh_every=1), refresh="gradient", steps=3)
    chex.assert_trees_all_equal(ours[-1][1], whole[-1][1])


@pytest.mark.parametrize("size", [1e-25, *slow(1e25)])
def test_products_neither_vanish_nor_overflow(size):
    """A refresh from passes, of gradients whose squares are no float32."""
    tx = galore(refresh_every=2, stagger=False)
    loss = lambda params, x: size * small_loss(params, x)
    ours = trained(tx, natgalore.value_and_grad(loss, tx, refresh="passes"), steps=3)
    whole = trained(tx, whole_gradients(loss), steps=3)
    P, P_whole = (jax.tree.leaves(natgalore_state(seen[-1][1]).basis) for seen in (ours, whole))
    for got, want in zip(P, P_whole, strict=True):
        assert jnp.isfinite(got).all()
        # Of a power iteration four turns deep: 2e-6 of its products, over their smallest.
        np.testing.assert_allclose(got @ got.mT, want @ want.mT, atol=1e-3)


def test_small_singular_values_are_told_from_noise_alike():
    """The shift of a power iteration is in units of squares, which the passes must give back."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (12, 20))
    C = jnp.asarray(U @ np.diag([1, 1e-1, 1e-4]) @ V.T, jnp.float32)  # the gradient at x = I
    loss = lambda params, x: jnp.sum((x @ params["kernel"]) * C)
    params, tx = {"kernel": jnp.zeros((12, 20))}, projection()
    spanned = []
    for refresh in ("passes", "gradient"):
        gradients = jax.jit(natgalore.value_and_grad(loss, tx, refresh=refresh))
        _, state = gradients(params, tx.init(params), jnp.eye(12))
        P = np.asarray(state.basis["kernel"].value)
        spanned.append(P @ P.T)
    # 1e-8 beside a shift of 1e-6, and rounding of 1e-7 a turn: 0.02 seen. In other units it is 0.4.
    np.testing.assert_allclose(*spanned, atol=0.1)


def test_staggered_passes_turn_what_is_due_alone():
    tx = galore(refresh_every=8)
    ours, whole = both_ways(tx, refresh="passes", steps=12)
    assert_same_training(ours, whole)
    times = lambda seen: [natgalore_state(state).refreshed for _, state in seen]
    chex.assert_trees_all_equal(times(ours), times(whole))
    assert {int(n) for n in core_arrays(times(ours)[-2])[0]} == {2, 3}


@pytest.mark.parametrize("refresh", ["passes", *slow("gradient")])
def test_micro_batches_are_one_batch(refresh):
    """Four of two sequences, of which the last is not like the others, through refreshes."""
    tx = galore(refresh_every=3, stagger=False)
    ours = natgalore.value_and_grad(
        lambda params, x: (small_loss(params, x), x[0]), tx, True, micro_batches=4, refresh=refresh
    )
    batch = [x.at[-1].multiply(3) for x in batches(5)]
    aux = []

    def split(params, opt_state, x):
        ((value, firsts), grads), opt_state = ours(params, opt_state, x.reshape(4, 2, 12))
        aux.append(firsts)
        return (value, grads), opt_state

    seen = trained(tx, split, batch=batch)
    assert_same_training(seen, trained(tx, whole_gradients(), batch=batch))
    assert aux[0].shape == (4, 12)


def test_a_sum_of_bfloat16_gradients_is_float32():
    """Of 64 micro-batches: what 63 of them add to the first one's 1, bfloat16 would not see."""
    params = {"w": jnp.ones((8, 8), jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16)}
    tx = natgalore.galore(1e-2, 2)
    loss = lambda params, x: jnp.sum(params["b"] * x) + jnp.sum(params["w"]) * 0.0
    gradients = natgalore.value_and_grad(loss, tx, micro_batches=64, on_fallback="ignore")
    x = jnp.full((64, 8), 1 / 512, jnp.bfloat16).at[0].set(1)
    (_, grads), _ = gradients(params, tx.init(params), x)
    mean = jnp.full(8, (1 + 63 / 512) / 64, jnp.bfloat16)
    np.testing.assert_array_equal(grads["b"].astype(jnp.float32), mean.astype(jnp.float32))
    assert grads["b"].dtype == jnp.bfloat16


@pytest.mark.parametrize("refresh", ["passes", "gradient"])
def test_a_late_first_gradient_brings_a_basis_at_once(refresh):
    """The first gradient that is finite comes between the refreshes of the calendar."""
    tx = galore(refresh_every=50, stagger=False)
    batch = [jnp.full((8, 12), jnp.nan), *batches(3)]
    ours, whole = both_ways(tx, refresh=refresh, params=PARAMS, batch=batch)
    assert_same_training(ours, whole)
    counts = [core_arrays(natgalore_state(s).refreshed)[1] for _, s in ours]
    assert [int(n) for n in counts] == [0, 1, 1, 1]


def test_each_random_basis_has_a_key_of_its_own():
    tx = galore(basis="random", transport="reset", refresh_every=1, stagger=False)
    ours, whole = both_ways(tx, steps=3)
    assert_same_training(ours, whole)
    keys = [jax.tree.leaves(natgalore_state(s).basis)[0] for _, s in ours]
    assert len({tuple(np.asarray(key).ravel().tolist()) for key in keys}) == 3


def natgalore_state(opt_state):
    return next(x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x))


@pytest.mark.slow
def test_cores_that_are_not_finite_are_skipped():
    tx = galore(refresh_every=50, stagger=False)
    batch = batches(5)
    batch[2] = batch[2].at[0].set(jnp.inf)
    ours, whole = both_ways(tx, batch=batch)
    assert_same_training(ours, whole)
    skipped = lambda seen: natgalore_state(seen[-1][1]).skipped
    chex.assert_trees_all_equal(skipped(ours), skipped(whole))
    assert int(skipped(ours)["out"]["kernel"].value) == 1


@pytest.mark.slow
def test_auxiliary_outputs_and_keywords():
    tx = natural()
    params, x = PARAMS, batches(1)[0]

    def loss(params, x, *, power):
        aux = {"x": x, "w": params["out"]["kernel"], "key": jax.random.key(1), "n": 2}
        return small_loss(params, x, power=power), aux

    ours = natgalore.value_and_grad(loss, tx, has_aux=True, on_fallback="error")
    for opt_state in (tx.init(params), hot(tx.init(params))):
        ((value, aux), grads), _ = jax.jit(ours, static_argnames="power")(
            params, opt_state, x, power=4
        )
        np.testing.assert_allclose(value, small_loss(params, x, power=4), rtol=1e-6)
        chex.assert_trees_all_equal(
            (aux["x"], aux["w"], aux["n"]), (x, params["out"]["kernel"], jnp.asarray(2))
        )
        assert aux["key"] == jax.random.key(1)
        assert len(cores(grads)) == 2


@pytest.mark.slow
def test_a_scaled_loss_is_unscaled_as_any_gradient_is():
    """As mixed precision does it: through a refresh, whose bases do not know of the scale."""
    tx, scale = galore(refresh_every=2, stagger=False), 2.0**10
    scaled = natgalore.value_and_grad(lambda params, x: scale * small_loss(params, x), tx)

    def unscaled(params, opt_state, x):
        (value, grads), opt_state = scaled(params, opt_state, x)
        return jax.tree.map(lambda x: x / scale, (value, grads)), opt_state

    assert_same_training(trained(tx, unscaled, steps=4), trained(tx, whole_gradients(), steps=4))


def test_bfloat16_params_have_float32_cores():
    tx, x = natural(), batches(1)[0]
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    gradients = jax.jit(natgalore.value_and_grad(small_loss, tx))
    for opt_state in (tx.init(params), hot(tx.init(params))):
        (_, grads), _ = gradients(params, opt_state, x.astype(jnp.bfloat16))
        assert {core.dtype for core in core_arrays(grads)} == {jnp.dtype(jnp.float32)}
        assert grads["embed"]["bias"].dtype == jnp.bfloat16


def test_params_without_a_projected_leaf():
    tx, params = optax.adam(1e-3), {"bias": jnp.ones(3)}
    loss = lambda params: jnp.sum(params["bias"] ** 2)
    (value, grads), _ = natgalore.value_and_grad(loss, tx)(params, tx.init(params))
    chex.assert_trees_all_close((value, grads), jax.value_and_grad(loss)(params))


def refreshed_at(place, refreshed, opt_state):
    """`opt_state`, with the bases of one part of the tree from another, `refreshed`."""
    new = natgalore_state(refreshed)

    def put(old):
        if not is_state(old):
            return old
        fields = ("basis", "refreshed")
        of = lambda field: getattr(old, field) | {place: getattr(new, field)[place]}
        return old._replace(**{field: of(field) for field in fields})

    return jax.tree.map(put, opt_state, is_leaf=is_state)


@pytest.mark.slow
def test_some_cores_among_whole_gradients():
    """Each matrix may come either way; those that come whole are refreshed as ever."""
    tx = galore(stagger=False, weight_decay=0.1)
    params, x = PARAMS, batches(1)[0]
    opt_state = tx.init(params)
    gradients = jax.jit(natgalore.value_and_grad(small_loss, tx))
    update = jax.jit(tx.update)
    for _ in range(2):
        (_, ours), after = gradients(params, opt_state, x)
        whole = jax.grad(small_loss)(params, x)
        mixed = whole | {"layers": ours["layers"]}
        start = refreshed_at("layers", after, opt_state)
        updates, _ = update(mixed, start, params)
        expected_updates, opt_state = update(whole, opt_state, params)
        chex.assert_trees_all_close(updates, expected_updates, atol=2e-5)


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", *slow("right", "both")])
def test_the_hot_step_forms_no_whole_gradient(side):
    """In what the compiler made of it: a product of m x n entries would be one."""
    tx = natural(side=side, stagger=False)
    opt_state, x = hot(tx.init(PARAMS)), batches(1)[0]
    state = natgalore_state(opt_state)
    step = lambda params, x: backward(small_loss, params, False, (x,), {})[0](bases(state))

    whole = {"12,12", "12,20", "20,12", "3,12,12"}
    assert not whole & product_shapes(step, PARAMS, x)
    assert whole & product_shapes(jax.grad(small_loss), PARAMS, x)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"stagger": False}, True),
        ({"refresh_every": 4}, True),  # four groups at most
        ({"refresh_every": 5}, False),
        ({"stagger": False, "side": "both"}, False),
        ({"stagger": False, "basis": "svd"}, False),
    ],
)
def test_which_refreshes_are_passes(settings, passes, monkeypatch):
    made = []
    for name in ("turns", "whole"):
        room = getattr(module, name)
        how = lambda *args, name=name, f=room.refreshed: made.append(name) or f(*args)
        monkeypatch.setattr(room, "refreshed", how)
    params = {f"layer_{i}": {"kernel": normal(i, 12, 12)} for i in range(6)}
    loss = lambda params, x: sum(jnp.sum(jnp.sin(x @ w["kernel"])) for w in params.values())
    tx = galore(**settings)
    gradients = natgalore.value_and_grad(loss, tx)
    jax.eval_shape(gradients, params, tx.init(params), batches(1)[0])
    assert made == ["turns" if passes else "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_neither_does_a_refresh(micro_batches):
    """The whole step, with products or sums of no more than r x n and r x m entries a matrix."""
    tx = natural(stagger=False)
    gradients = natgalore.value_and_grad(small_loss, tx, micro_batches=micro_batches)
    x = batches(1)[0]
    x = x if micro_batches == 1 else x.reshape(micro_batches, -1, 12)
    whole = {"12,12", "12,20", "20,12", "3,12,12", "1,12,12"}
    made = product_shapes(lambda *args: gradients(*args)[0][1], PARAMS, tx.init(PARAMS), x)
    assert not whole & made
    assert {"3,12", "3,20"} & made
    with_them = natgalore.value_and_grad(small_loss, tx, refresh="gradient")
    x = batches(1)[0]
    assert whole & product_shapes(lambda *args: with_them(*args)[0][1], PARAMS, tx.init(PARAMS), x)


def product_shapes(f, *args):
    text = jax.jit(f).lower(*args).compile(compiler_options=AS_FOR_USERS).as_text()
    dots = [line.split(" dot(")[0] for line in text.splitlines() if " dot(" in line]
    return {line.split("f32[")[1].split("]")[0] for line in dots}


# --- on several devices --------------------------------------------------------------------------


DATA, FSDP = PartitionSpec(), PartitionSpec("d")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weights", "refresh"),
    [
        (AxisType.Explicit, FSDP, "passes"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                (AxisType.Auto, AxisType.Explicit), (DATA, FSDP), ("passes", "gradient")
            )
            if case != (AxisType.Explicit, FSDP, "passes")
        ),
    ],
)
def test_on_a_mesh_training_is_the_same(kind, weights, refresh):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    tx = galore(stagger=False)
    entries = {"embed": {"bias": DATA}, "layers": {"kernel": DATA}, "out": {"kernel": weights}}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = jax.tree.map(put, {k: PARAMS[k] for k in entries}, entries)
    batch = [put(x, PartitionSpec("d")) for x in batches(3)]
    with jax.set_mesh(mesh):
        gradients = natgalore.value_and_grad(small_loss, tx, refresh=refresh)
        seen = trained(tx, gradients, params=params, batch=batch, steps=3)
    whole = trained(tx, whole_gradients(), steps=3)
    assert_same_params(seen, whole)


@pytest.mark.slow
def test_a_hot_step_sums_cores_and_what_is_not_projected_alone():
    """Between data-parallel devices: nothing of a refresh has left its loop."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    config = LlamaConfig(64, 176, heads=4, layers=2, vocabulary=96, scan=True, remat=True)
    model = Llama(config, nnx.Rngs(0))
    structure, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    loss = lambda params, tokens: next_token_loss(nnx.merge(structure, params), tokens)
    tx = natgalore.galore(1e-2, 8, stagger=False)
    step = natgalore.value_and_grad(loss, tx, on_fallback="error")
    whole, split = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((), ("d",)))
    tokens = jax.ShapeDtypeStruct((8, 9), jnp.int32)
    text = (
        jax.jit(step, in_shardings=(whole, whole, split), out_shardings=whole)
        .lower(params, jax.eval_shape(tx.init, params), tokens)
        .compile(compiler_options=AS_FOR_USERS)
        .as_text()
    )
    moved = sum(x.times * x.size for x in collectives(text) if x.hot)
    state = natgalore_state(jax.eval_shape(tx.init, params))
    specs = {path: P[0].spec for path, P in bases(state).items()}
    sizes = [
        math.prod(specs[path].core_shape) if path in specs else w.size
        for path, w in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert moved == 4 * (sum(sizes) + 1)  # and the loss
    assert any(not x.hot for x in collectives(text))


def test_layers_over_devices_refresh_where_they_live():
    """Told how weights lie by `natgalore.sharded`, no layer's state leaves its device."""
    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    lies = {k: {} for k in ("embed", "layers", "out")}
    lies["embed"]["bias"] = lies["out"]["kernel"] = NamedSharding(mesh, DATA)
    lies["layers"]["kernel"] = NamedSharding(mesh, FSDP)
    params = jax.tree.map(jax.device_put, {k: PARAMS[k] for k in lies}, lies)
    tx = natgalore.sharded(galore(stagger=False), lies)
    gradients = natgalore.value_and_grad(small_loss, tx)
    whole = trained(galore(stagger=False), whole_gradients(), steps=6)
    assert_same_params(trained(tx, gradients, params=params, steps=6), whole)
    step = jax.jit(lambda *args: gradients(*args)[1])
    text = step.lower(params, tx.init(params), batches(1)[0]).compile().as_text()
    gathered = [
        line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line
    ]
    # Each pass scans over the layers, weights and bases; moments and counts stay where they are.
    assert sum("f32[3,12,3]" in line for line in gathered) == 3
    assert not [line for line in gathered if "f32[3,3,12]" in line or "s32[3]" in line]


def assert_same_params(ours, whole):
    for (params, _), (params_whole, _) in zip(ours, whole, strict=True):
        params_whole = {place: params_whole[place] for place in params}
        chex.assert_trees_all_close(jax.device_get(params), params_whole, atol=2e-5)


def test_inside_shard_map_only_cores_are_summed():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    tx = natural(stagger=False)
    opt_state, x = hot(tx.init(PARAMS)), batches(1)[0]
    mean = lambda params, x: lax.pmean(small_loss(params, x), "d")
    step = lambda params, x: backward(mean, params, False, (x,), {})[0](bases(opt_state))
    everywhere, split = PartitionSpec(), PartitionSpec("d")
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(everywhere, split), out_specs=everywhere)
    )
    _, grads = mapped(PARAMS, x)
    assert_close(grads, expected(jax.grad(small_loss)(PARAMS, x), opt_state))
    reduced = [
        shape
        for line in mapped.lower(PARAMS, x).compile().as_text().splitlines()
        if " all-reduce(" in line
        for shape in re.findall(r"f32\[([0-9,]*)\]", line)
    ]
    assert reduced
    assert not {"12,12", "12,20", "3,12,12"} & {*reduced}, reduced


# --- what is refused -----------------------------------------------------------------------------


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals():
    tx, x = natural(), batches(1)[0]
    opt_state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="on_fallback") as error:
        natgalore.value_and_grad(small_loss, tx, on_fallback="raise")
    one_line(error)
    power = lambda params, x: small_loss(params, x) + jnp.sum(params["out"]["kernel"] ** 3)
    with pytest.raises(ValueError, match="integer_pow of `out/kernel`") as error:
        natgalore.value_and_grad(power, tx, on_fallback="error")(PARAMS, opt_state, x)
    one_line(error)
    other = natgalore.galore(1e-2, 5)
    with pytest.raises(ValueError, match="not a state of `tx`") as error:
        natgalore.value_and_grad(small_loss, other)(PARAMS, opt_state, x)
    one_line(error)
    multi = optax.MultiSteps(tx, 2)
    with pytest.raises(ValueError, match="MultiSteps") as error:
        natgalore.value_and_grad(small_loss, multi)(PARAMS, multi.init(PARAMS), x)
    one_line(error)
    with pytest.raises(ValueError, match="`refresh`") as error:
        natgalore.value_and_grad(small_loss, tx, refresh="never")
    one_line(error)
    for settings in ({"basis": "svd"}, {"side": "both"}):
        other = natural(**settings)
        gradients = natgalore.value_and_grad(small_loss, other, refresh="passes")
        with pytest.raises(ValueError, match=r'"power" and "random".*`layers/kernel`') as error:
            gradients(PARAMS, other.init(PARAMS), x)
        one_line(error)
    with pytest.raises(ValueError, match="micro_batches=3 on a leading axis, found 8"):
        natgalore.value_and_grad(small_loss, tx, micro_batches=3)(PARAMS, opt_state, x)
    with pytest.raises(ValueError, match="micro_batches"):
        natgalore.value_and_grad(small_loss, tx, micro_batches=0)


def test_the_residual_needs_whole_gradients():
    tx = natgalore.natural_galore(1e-2, RANK, residual="fira")
    opt_state, x = tx.init(PARAMS), batches(1)[0]
    with pytest.raises(ValueError, match="residual") as error:
        natgalore.value_and_grad(small_loss, tx)(PARAMS, opt_state, x)
    one_line(error)
    without = natural()
    (_, grads), _ = natgalore.value_and_grad(small_loss, without)(PARAMS, without.init(PARAMS), x)
    with pytest.raises(ValueError, match="residual") as error:
        tx.update(grads, opt_state, PARAMS)
    one_line(error)


def test_cores_of_another_state():
    tx, other = natural(), natgalore.galore(1e-2, 5)
    x = batches(1)[0]
    (_, grads), _ = natgalore.value_and_grad(small_loss, tx)(PARAMS, tx.init(PARAMS), x)
    with pytest.raises(ValueError, match="core of another state") as error:
        other.update(grads, other.init(PARAMS), PARAMS)
    one_line(error)
    cut = jax.tree.map(
        lambda G: G.replace(G.value[..., :-1]) if isinstance(G, Core) else G,
        grads,
        is_leaf=lambda x: isinstance(x, Core),
    )
    with pytest.raises(ValueError, match="another shape") as error:
        tx.update(cut, tx.init(PARAMS), PARAMS)
    one_line(error)
