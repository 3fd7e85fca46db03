"""map_due_matrices gives the step of each due matrix its own gradient, place and state, once."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey

from natgalore_jax.sharding.partitioning import ParamPartitions
from natgalore_jax.subspace.refresh_loop import Leaf, map_due_matrices
from natgalore_jax.tree.leaf_spec import LeafSpec


NOWHERE = ParamPartitions(None, {})
SHAPES = {  # of a leaf, and its axes: batch, rows, columns
    "matrix": ((3, 5), (), (0,), (1,)),
    "stack": ((2, 3, 5), (0,), (1,), (2,)),
    "transposed": ((5, 3), (), (1,), (0,)),
    "experts last": ((3, 2, 5, 2), (1, 3), (0,), (2,)),
}


def leaves_of(names, shape, kind="kind"):
    """Leaves with random gradients and states, and their places in the order in turn.

    `shape` is one of SHAPES, or a list with one of them for each name.
    """
    made, first = [], 7
    shapes = [shape] * len(names) if isinstance(shape, str) else shape
    for i, (name, shape) in enumerate(zip(names, shapes, strict=False)):
        sizes, *axes = SHAPES[shape]
        rng = np.random.default_rng(i)
        path = tuple(DictKey(key) for key in name.split("/"))
        spec = LeafSpec(path, sizes, *axes, rank=2, index=first)
        batch = spec.batch_shape
        order = jnp.arange(first, first + spec.matrices, dtype=jnp.int32).reshape(batch)
        first += spec.matrices
        state = {"P": rng.normal(size=(*batch, 3, 2)), "n": rng.integers(9, size=batch)}
        made.append(
            Leaf(
                spec,
                kind,
                NOWHERE.leaf(spec),
                jnp.asarray(rng.normal(size=sizes), jnp.float32),
                jnp.zeros(batch, bool),
                order,
                jax.tree.map(lambda x: jnp.asarray(x, x.dtype.name.replace("64", "32")), state),
            )
        )
    return made


def step(spec, kind, part, order, due, state):
    """Of everything that it is given something, and not the same twice over."""
    del kind, due
    G = spec.as_matrix(part)
    return {"P": 2 * state["P"] + G[:, :2] + order, "n": state["n"] + 10 * order}


def expected(leaf, due):
    """The same by a loop in NumPy."""
    spec, state = leaf.spec, jax.tree.map(np.array, leaf.state)
    G = np.asarray(spec.to_view(leaf.G))
    for i in itertools.product(*map(range, spec.batch_shape)):
        if due[i]:
            order = int(leaf.order[i])
            state["P"][i] = 2 * state["P"][i] + G[i][:, :2] + order
            state["n"][i] += 10 * order
    return state


ALIKE = ["layers/0/up", "layers/1/up", "layers/10/up"]


@pytest.mark.parametrize("names", [ALIKE, ["a", "b", "c"], [f"x/{i}" for i in range(11)]], ids=len)
@pytest.mark.parametrize("shape", [*SHAPES, "mixed"])
def test_each_due_matrix_is_refreshed_with_its_own_arguments(names, shape):
    shapes = ["stack", "matrix", "transposed"] * 4 if shape == "mixed" else [shape] * len(names)
    leaves = leaves_of(names, shapes)
    run = jax.jit(
        lambda due: map_due_matrices(
            step,
            [leaf._replace(due=now) for leaf, now in zip(leaves, due, strict=True)],
        )
    )
    rng = np.random.default_rng(0)
    places = sum(leaf.spec.matrices for leaf in leaves)
    ends = np.cumsum([leaf.spec.matrices for leaf in leaves])[:-1]
    for chosen in (
        np.zeros(places, bool),
        np.arange(places) == places - 2,
        rng.random(places) < 0.5,
        np.ones(places, bool),
    ):
        parts = zip(np.split(chosen, ends), leaves, strict=True)
        due = [part.reshape(leaf.spec.batch_shape) for part, leaf in parts]
        new = run([jnp.asarray(now) for now in due])
        for leaf, now, state in zip(leaves, due, new, strict=True):
            jax.tree.map(np.testing.assert_array_equal, state, expected(leaf, now))


def test_equal_matrices_share_one_program():
    def programs(leaves):
        traced = []

        def counting(*args):
            traced.append(None)
            return step(*args)

        jax.eval_shape(lambda: map_due_matrices(counting, leaves))
        return len(traced)

    assert programs(leaves_of(ALIKE, "stack")) == 1
    assert programs(leaves_of(["0", "1"], ["stack", "matrix"])) == 1
    assert programs(leaves_of([*"abcd"], [*SHAPES])) == 2  # "transposed" is laid out in another way
    other_shape = leaves_of(["1"], "stack")[0]
    other_shape = other_shape._replace(spec=dataclasses.replace(other_shape.spec, rank=1))
    assert programs([*leaves_of(["0"], "stack"), other_shape]) == 2
    assert programs(leaves_of(["0"], "stack") + leaves_of(["1"], "stack", "another kind")) == 2
    other_type = leaves_of(["1"], "stack")[0]
    other_type = other_type._replace(G=other_type.G.astype(jnp.bfloat16))
    assert programs([*leaves_of(["0"], "stack"), other_type]) == 2
