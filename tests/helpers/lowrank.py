"""Losses, optimizers and comparisons of the tests of low-rank gradients.

In float32 a core PᵀG sums in another order than (x P)ᵀ ȳ. Either way rounds sums of at most a few
hundred terms, which came to 4e-7 of the largest entry; 2e-6 leaves room for another BLAS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import natgalore_jax as natgalore
from natgalore_jax.lowrank_grads.loss import backward
from natgalore_jax.subspace.basis import expand, to_core
from natgalore_jax.subspace.state import SubspaceState
from natgalore_jax.tree.cores import Basis, Core, cores
from tests.helpers.compiling import AS_FOR_USERS


RTOL = 2e-6
RANK = 3
VIEW = natgalore.MatrixView
is_state = lambda x: isinstance(x, SubspaceState)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(
        shape[-2] if len(shape) > 1 else 1
    )


X = normal(0, 10, 12)
PARAMS = {
    "embed": {"bias": jnp.zeros(12)},
    "layers": {"kernel": normal(2, 3, 12, 12)},
    "none": None,
    "out": {"kernel": normal(3, 12, 20)},
}


def after_first_refresh(opt_state):
    """The state after the first refresh of every matrix."""

    def advance(x):
        if not is_state(x):
            return x
        once = jax.tree.map(jnp.ones_like, x.refreshed)
        return x._replace(count=jnp.ones_like(x.count), refreshed=once)

    return jax.tree.map(advance, opt_state, is_leaf=is_state)


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


def subspace_state(opt_state):
    return next(x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x))


def projected_full_gradients(grads, opt_state):
    """Full gradients, with a core in place of each projected leaf."""
    found = bases(opt_state)

    def project(path, G):
        if path not in found:
            return G
        sides = [expand(x.value, x.spec, jnp.float32) for x in found[path]]
        spec = found[path][0].spec
        G = G.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            return Core(to_core(spec.to_view(G), *sides), spec)

    return jax.tree_util.tree_map_with_path(project, grads)


def assert_close(got, want, rtol=RTOL):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.abs(y).max()), 1e-30)
        np.testing.assert_allclose(x / scale, y / scale, atol=rtol)


class Case(NamedTuple):
    """A loss of weights W1, W2, ... of the given shapes.

    Attributes:
      shapes: of the weights.
      loss: of the weights.
      settings: of `projection`.
      fallback: the primitives that need the full gradient of a weight.
      rtol: of the largest entry of each leaf.
    """

    shapes: tuple[tuple[int, ...], ...]
    loss: Callable[..., jax.Array]
    settings: dict[str, Any]
    fallback: tuple[str, ...]
    rtol: float


class Cases(dict[str, Case]):
    """Cases by the names of their losses; calling it gives a decorator that adds one."""

    def __call__(self, *shapes, view=None, side="left", fallback=(), rtol=RTOL, **kwargs):
        view = VIEW(-2, -1) if view is None else view
        settings = {"side": side, "select": view} | kwargs

        def add(loss):
            number = sum(name.startswith(loss.__name__) for name in self)
            self[f"{loss.__name__}{number or ''}"] = Case(shapes, loss, settings, fallback, rtol)
            return loss

        return add


def assert_cores_equal_projected_gradients(case: Case):
    """Compares the loss, the cores, the other gradients and the fallbacks of one case."""
    shapes, loss, settings, fallback, rtol = case
    params = {f"W{i}": normal(i + 7, *shape) for i, shape in enumerate(shapes)}
    select = {k: settings["select"] if w.ndim > 1 else None for k, w in params.items()}
    opt_state = projection(**settings | {"select": select}).init(params)
    loss_of_tree = lambda params: loss(*params.values())
    recorded = []

    @jax.jit
    def with_full_gradients(params, opt_state):
        run, fallbacks = backward(loss_of_tree, params, False, (), {})
        (value, _), grads = run(bases(opt_state))
        ours = value, grads
        recorded.append({operation for operation, _ in fallbacks})
        return ours, jax.value_and_grad(loss_of_tree)(params)

    (value, grads), (full_value, full_grads) = with_full_gradients(params, opt_state)
    np.testing.assert_allclose(value, full_value, rtol=1e-6)  # the compiler fuses it differently
    assert_close(grads, projected_full_gradients(full_grads, opt_state), rtol)
    assert cores(grads)
    assert recorded == [{*fallback}]


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


def full_gradients(loss=small_loss):
    return lambda params, opt_state, x: (jax.value_and_grad(loss)(params, x), opt_state)


def both_ways(tx, refresh="auto", **kwargs):
    ours = natgalore.value_and_grad(small_loss, tx, refresh=refresh, on_fallback="error")
    return trained(tx, ours, **kwargs), trained(tx, full_gradients(), **kwargs)


def assert_same_training(ours, full, rtol=2e-5):
    """Adam divides by |g|: 2e-6 of a core's largest entry is more relative to a small entry."""
    for (params, opt_state), (full_params, full_state) in zip(ours, full, strict=True):
        assert jax.tree.structure(opt_state) == jax.tree.structure(full_state)
        chex.assert_trees_all_close(params, full_params, atol=rtol)


def assert_same_params(ours, full):
    for (params, _), (full_params, _) in zip(ours, full, strict=True):
        full_params = {place: full_params[place] for place in params}
        chex.assert_trees_all_close(jax.device_get(params), full_params, atol=2e-5)


def natural(**kwargs):
    settings = {"refresh_every": 4, "fisher": "core", "residual": None} | kwargs
    return natgalore.natural_galore(1e-2, RANK, **settings)


def galore(**kwargs):
    """`natural` without a Fisher stage, which compiles faster."""
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


def product_shapes(f, *args):
    """Shapes of all products in the compiled program, as in HLO: "12,20", say."""
    text = jax.jit(f).lower(*args).compile(compiler_options=AS_FOR_USERS).as_text()
    dots = [line.split(" dot(")[0] for line in text.splitlines() if " dot(" in line]
    return {line.split("f32[")[1].split("]")[0] for line in dots}
