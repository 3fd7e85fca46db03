"""Diagnostics of a state against float64 NumPy, and gradients that explained_energy refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import natgalore_jax as natgalore
from natgalore_jax.subspace.basis import expand
from natgalore_jax.tree.cores import cores
from tests.helpers.cases import slow


RANK = 4
SHAPES = {"layers": {"up": {"kernel": (2, 12, 20)}}, "down": {"kernel": (20, 12)}, "norm": (12,)}


def random(seed):
    is_leaf = lambda x: isinstance(x, tuple)
    key = jax.random.key(seed)
    return jax.tree.map(lambda shape: jax.random.normal(key, shape), SHAPES, is_leaf=is_leaf)


@functools.cache
def trained(**kwargs):
    """The initial state, the states after each of three steps, and the last gradients."""
    tx = natgalore.natural_galore(
        1e-2, RANK, **{"refresh_every": 2, "stagger": False, "fisher": "core"} | kwargs
    )
    states = [tx.init(random(0))]
    for t in range(3):
        grads = random(t)
        states.append(jax.jit(tx.update)(grads, states[-1], random(0))[1])
    return tuple(states), grads


def float64(x):
    return np.asarray(x, np.float64)


def bases(state, name):
    """P and, if both sides are projected, Q of the leaf `name`, in float64."""
    found = []
    for side in (state[0].basis, state[0].right_basis):
        for x in jax.tree.leaves(side, is_leaf=lambda x: hasattr(x, "spec")):
            if x.spec.name == name:
                found.append((x.spec, float64(expand(x.value, x.spec, jnp.float32))))
    return found


KINDS = [{}, {"side": "both"}, {"basis": "random"}, {"side": "long"}]


@pytest.mark.parametrize("kwargs", [KINDS[0], *slow(*KINDS[1:])], ids=str)
def test_explained_energy(kwargs):
    (*_, state), grads = trained(**kwargs)
    energy = jax.jit(natgalore.explained_energy)(state, grads)
    assert set(energy) == {"layers/up/kernel", "down/kernel"}
    leaves = {"layers/up/kernel": grads["layers"]["up"], "down/kernel": grads["down"]}
    for name, leaf in leaves.items():
        (spec, P), *right = bases(state, name)
        G = float64(spec.to_view(leaf["kernel"]))
        inside = P @ P.mT @ G
        for _, Q in right:
            inside = inside @ Q @ Q.mT
        share = np.square(inside).sum(axis=(-2, -1)) / np.square(G).sum(axis=(-2, -1))
        np.testing.assert_allclose(energy[name], share, rtol=1e-5)


@pytest.mark.slow
def test_explained_energy_of_zero_nonfinite_and_huge_gradients():
    (*_, state), grads = trained(fisher=None)
    kernel = grads["layers"]["up"]["kernel"].at[0].set(jnp.nan)
    grads = grads | {"layers": {"up": {"kernel": kernel}}}
    odd = natgalore.explained_energy(state, grads)
    assert odd["layers/up/kernel"][0] == 0
    assert odd["layers/up/kernel"][1] > 0.1
    zero = natgalore.explained_energy(state, jax.tree.map(jnp.zeros_like, grads))
    assert not any(x.any() for x in zero.values())
    huge = natgalore.explained_energy(state, jax.tree.map(lambda x: 1e25 * x, grads))
    np.testing.assert_allclose(huge["down/kernel"], odd["down/kernel"], rtol=1e-5)


@pytest.mark.parametrize("kwargs", [KINDS[0], *slow(*KINDS[1:])], ids=str)
def test_basis_drift(kwargs):
    states, _ = trained(**kwargs)
    drift = jax.jit(natgalore.basis_drift)(states[2], states[3])  # over the refresh at step 2
    for name, value in drift.items():
        expected = [
            1 - np.square(P.mT @ R).sum(axis=(-2, -1)) / RANK
            for (_, P), (_, R) in zip(bases(states[2], name), bases(states[3], name), strict=True)
        ]
        np.testing.assert_allclose(value, np.mean(expected, axis=0), atol=1e-5)
        assert (value > 0.01).all()
    still = natgalore.basis_drift(states[1], states[2])
    assert all((jnp.abs(x) < 1e-6).all() for x in still.values())


def test_condition_of_the_core_fisher():
    (start, *_, state), _ = trained()
    condition = jax.jit(natgalore.fisher_condition)(state)
    for L in cores(state[0].inner_state[0].fisher):
        values = np.linalg.eigvalsh(float64(L.value))
        expected = values[..., -1] / values[..., 0]
        np.testing.assert_allclose(condition[L.spec.name], expected, rtol=1e-3)
    assert all((x == 1).all() for x in natgalore.fisher_condition(start).values())


@pytest.mark.slow
def test_condition_of_a_partly_filled_window():
    """Gradients of very different sizes make K ill-conditioned."""
    tx = natgalore.project(RANK, natgalore.scale_by_fisher(5), transport="keep")
    grads = [jax.tree.map(lambda x, s=s: s * x, random(i)) for i, s in enumerate((1, 1, 100))]
    state = tx.init(grads[0])
    for g in grads:
        _, state = tx.update(g, state)
    P = state.basis["down"]["kernel"]
    H = [(float64(P.value).T @ float64(P.spec.to_view(g["down"]["kernel"]))).ravel() for g in grads]
    values = np.linalg.eigvalsh(np.array(H) @ np.array(H).T)
    actual = natgalore.fisher_condition(state)["down/kernel"]
    # The smallest of eigenvalues 1e4 apart has three of float32's seven digits.
    np.testing.assert_allclose(actual, values[-1] / values[0], rtol=1e-2)
    assert actual > 1e3


@pytest.mark.slow
def test_condition_is_finite_beyond_float32():
    tx = natgalore.project(RANK, natgalore.scale_by_fisher(3))
    g = random(0)
    state = tx.init(g)
    for _ in range(3):
        _, state = tx.update(g, state)
    assert natgalore.fisher_condition(state)["down/kernel"] >= 1e6
    assert jnp.isfinite(natgalore.fisher_condition(state)["down/kernel"])


def test_skipped_steps_of_every_leaf():
    tx = natgalore.galore(1e-2, RANK)
    g = random(0)
    g["layers"]["up"]["kernel"] = g["layers"]["up"]["kernel"].at[1, 0, 0].set(jnp.inf)
    g["norm"] = g["norm"].at[0].set(jnp.nan)
    _, state = tx.update(g, tx.init(g), g)
    skipped = jax.jit(natgalore.skipped_steps)(state)
    assert {name: np.ravel(x).tolist() for name, x in skipped.items()} == {
        "layers/up/kernel": [0, 1],
        "down/kernel": [0],
        "norm": [1],
    }


def test_diagnostics_of_wrapped_optimizers():
    tx = optax.MultiSteps(optax.chain(optax.clip(1.0), natgalore.galore(1e-2, RANK)), 2)
    state = tx.init(random(0))
    assert set(natgalore.explained_energy(state, random(0))) == {"layers/up/kernel", "down/kernel"}
    assert natgalore.fisher_condition(state) == {}
    assert natgalore.explained_energy(optax.adam(1.0).init(random(0)), random(0)) == {}


class TestRefusedGradients:
    """explained_energy and describe need |G|, which the cores of value_and_grad do not contain."""

    match = r"^`grads` must be full gradients, .* has {} for '{}/kernel': the energy needs \|G\|"

    @property
    def params(self):
        return {
            "up": {"kernel": jnp.ones((12, 20))},
            "down": {"kernel": jnp.ones((20, 12))},
            "norm": {"scale": jnp.ones((1, 12))},
        }

    @staticmethod
    def loss(params, x):
        params = linen.meta.unbox(params)
        x = x * params["norm"]["scale"]
        return jnp.square(x @ params["up"]["kernel"] @ params["down"]["kernel"]).sum()

    def cores(self, params):
        """An optimizer, its first state and the cores of the loss, as zeros."""
        tx = natgalore.galore(1e-2, RANK)
        state, gradients = tx.init(params), natgalore.value_and_grad(self.loss, tx)
        (_, grads), _ = jax.eval_shape(gradients, params, state, jnp.ones((3, 12)))
        return tx, state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), grads)

    def check(self, tx, params, state, grads, *what):
        match = self.match.format(*what)
        with pytest.raises(ValueError, match=match) as raised:
            natgalore.explained_energy(state, grads)
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=match):
            natgalore.describe(tx, params, state, grads)

    def test_cores(self):
        tx, state, grads = self.cores(self.params)
        self.check(tx, self.params, state, grads, "a core", "down")

    def test_cores_among_full_gradients(self):
        tx, state, grads = self.cores(self.params)
        mixed = self.params | {"up": grads["up"]}
        self.check(tx, self.params, state, mixed, "a core", "up")

    def test_boxed_cores(self):
        box = lambda x: linen.LogicallyPartitioned(x, (None,) * x.ndim)
        params = jax.tree.map(box, self.params)
        tx, state, grads = self.cores(params)
        self.check(tx, params, state, grads, "a core", "down")
        full = jax.grad(self.loss)(params, jnp.ones((3, 12)))
        energy = natgalore.explained_energy(state, full)
        assert set(energy) == {"up/kernel", "down/kernel"}

    def test_missing_gradients(self):
        tx, state, _ = self.cores(self.params)
        self.check(tx, self.params, state, self.params | {"up": {}}, "no gradient", "up")
