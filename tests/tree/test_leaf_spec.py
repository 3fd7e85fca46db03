import math

import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax.tree.leaf_spec import LeafSpec
from tests.helpers.cases import slow


def any_spec(seed):
    """A leaf with two to five axes, each in batch, rows or cols."""
    rng = np.random.default_rng(seed)
    axes = rng.permutation(rng.integers(2, 6)).tolist()
    first = rng.integers(0, len(axes) - 1)
    second = rng.integers(first + 1, len(axes))
    shape = tuple(rng.integers(1, 5, len(axes)).tolist())
    parts = tuple(axes[:first]), tuple(axes[first:second]), tuple(axes[second:])
    return LeafSpec((), shape, *parts, rank=1)


@pytest.mark.parametrize("seed", [*range(6), *slow(*range(6, 12))])
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
