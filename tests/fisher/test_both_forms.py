"""Trees, masks and placement: alike for both Fisher stages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.tree.cores import Core
from tests.helpers.fisher import N, R, as_core


FORMS = {"window": natgalore.scale_by_fisher, "core": natgalore.scale_by_core_fisher}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
def test_unprojected_leaves_pass_unchanged(form):
    tree = {**as_core(jnp.ones((R, N))), "b": jnp.ones(3), "none": None}
    tx = form()
    updates, _ = tx.update(tree, tx.init(tree))
    assert updates["b"] is tree["b"]


@each_form
def test_leaves_of_different_dtypes(form):
    with jax.enable_x64(True):
        core = as_core(jnp.ones((R, N), jnp.float32))["w"]
        tree = {"single": core, "double": core.replace(jnp.ones((R, N), jnp.float64))}
        tx = form()
        state = tx.init(tree)
        after = jax.eval_shape(tx.update, tree, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, (tree, state))


@each_form
def test_masked_leaves_pass_unchanged(form):
    tree = as_core(jnp.ones((R, N)))
    tx = optax.masked(form(), {"w": Core(False, tree["w"].spec)})
    updates, _ = tx.update(tree, tx.init(tree))
    np.testing.assert_array_equal(updates["w"].value, tree["w"].value)


@each_form
def test_stage_outside_a_subspace_raises(form):
    tx, params = optax.chain(form(), optax.scale_by_adam()), {"w": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=r"works on cores.*natgalore\.chain"):
        jax.jit(tx.update)(params, jax.jit(tx.init)(params))


@each_form
@pytest.mark.filterwarnings("ignore:natgalore projects none")
def test_projection_without_projected_leaves(form):
    params = {"scale": jnp.ones(8)}
    tx = natgalore.project(R, form())
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params))
    np.testing.assert_array_equal(updates["scale"], params["scale"])


@each_form
def test_empty_tree_is_accepted(form):
    form().init({})
