import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from natgalore_jax.tree.leaf_spec import Core, LeafSpec, cores, replace_cores


KERNEL = LeafSpec(
    path=(jax.tree_util.DictKey("up"), jax.tree_util.DictKey("kernel")),
    shape=(3, 8, 20),
    batch=(0,),
    rows=(1,),
    cols=(2,),
    rank=4,
)


def any_spec(seed):
    """A leaf with two to five axes, each in batch, rows or cols."""
    rng = np.random.default_rng(seed)
    axes = rng.permutation(rng.integers(2, 6)).tolist()
    first = rng.integers(0, len(axes) - 1)
    second = rng.integers(first + 1, len(axes))
    shape = tuple(rng.integers(1, 5, len(axes)).tolist())
    parts = tuple(axes[:first]), tuple(axes[first:second]), tuple(axes[second:])
    return LeafSpec((), shape, *parts, rank=1)


@pytest.mark.parametrize("seed", range(12))
def test_views_are_transposes_of_the_leaf(seed):
    spec = any_spec(seed)
    x = jnp.arange(float(math.prod(spec.shape))).reshape(spec.shape)
    view = spec.to_view(x)
    assert view.shape == (*spec.batch_shape, spec.m, spec.n)
    np.testing.assert_array_equal(spec.from_view(view), x)
    # Reference: NumPy's moveaxis.
    moved = np.moveaxis(np.asarray(x), (*spec.batch, *spec.rows, *spec.cols), range(x.ndim))
    np.testing.assert_array_equal(view.ravel(), moved.ravel())
    stack = view.reshape(-1, spec.m, spec.n)
    for i in range(spec.matrices):
        np.testing.assert_array_equal(spec.as_matrix(spec.cut(x, jnp.int32(i))), stack[i])


@pytest.mark.parametrize("seed", range(8))
def test_put_then_take_returns_the_part(seed):
    spec = any_spec(seed)
    x = jnp.zeros((*spec.batch_shape, 2, 3))
    i = jnp.int32(seed % spec.matrices)
    part = jnp.arange(6.0).reshape(2, 3)
    changed = spec.put(x, i, part)
    np.testing.assert_array_equal(spec.take(changed, i), part)
    assert jnp.count_nonzero(changed) == jnp.count_nonzero(part)


def test_key_of_a_core_child_repeats_its_parents_key():
    tree = {"up": {"kernel": Core(jnp.ones((4, 20)), KERNEL)}}
    ((path, _),) = jax.tree_util.tree_leaves_with_path(tree)
    assert [key.key for key in path] == ["up", "kernel", "kernel"]


def test_optax_states_contain_cores():
    tree = {"up": {"kernel": Core(jnp.ones((3, 4, 20)), KERNEL)}, "bias": jnp.ones(3)}
    state = optax.scale_by_adam().init(tree)
    assert isinstance(state.mu["up"]["kernel"], Core)
    assert state.nu["up"]["kernel"].spec is KERNEL


def test_cores_and_replace_cores_skip_masked_cores():
    tree = [Core(jnp.ones(2), KERNEL), {"b": jnp.ones(3)}, Core(optax.MaskedNode(), KERNEL), None]
    tree.append(Core(jnp.zeros(2), KERNEL))
    assert [float(core.value[0]) for core in cores(tree)] == [1.0, 0.0]
    replaced = replace_cores(tree, ["first", "second"])
    assert replaced[0].value == "first"
    assert replaced[4].value == "second"
    assert replaced[1] is tree[1] or replaced[1]["b"] is tree[1]["b"]
