"""Boxes are recognised by structure, so these tests need no Flax."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from natgalore_jax.tree.cores import Core
from natgalore_jax.tree.flax_boxes import axis_names, is_box, rebox, unbox
from natgalore_jax.tree.leaf_spec import LeafSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True}, default=("a", "b"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Two:
    value: Any
    bias: Any


class Single(NamedTuple):
    value: Any


KEY = (
    jax.tree_util.GetAttrKey("value"),
)  # path of a leaf named `value`, whose Core repeats the key
SPEC = LeafSpec(KEY, (8, 9), (), (0,), (1,), rank=4)
BOXES = [Box(jnp.ones(3)), Box(optax.MaskedNode()), Box(None), Box(jax.ShapeDtypeStruct((3,), int))]
OTHERS = [
    jnp.ones(3),
    None,
    {"value": jnp.ones(3)},
    Single(jnp.ones(3)),
    Two(jnp.ones(3), None),
    Box({"kernel": jnp.ones(3)}),
    Core(jnp.ones(3), SPEC),
]


@pytest.mark.parametrize("box", BOXES)
def test_box_has_one_array_or_empty_child(box):
    assert is_box(box)
    assert unbox({"a": box})["a"] is box.value


@pytest.mark.parametrize("other", OTHERS)
def test_other_nodes_are_no_boxes(other):
    assert not is_box(other)
    assert jax.tree.structure(unbox(other)) == jax.tree.structure(other)


def test_rebox_inverts_unbox():
    tree = {"a": BOXES, "b": [Two(Box(jnp.zeros(2), ("c",)), None), None, jnp.zeros(1)]}
    bare = unbox(tree)
    assert not [x for x in jax.tree.leaves(bare, is_leaf=is_box) if is_box(x)]
    back = rebox(bare, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert x is y


def test_rebox_leaves_cores_unboxed():
    core = Core(jnp.zeros((4, 9)), SPEC)
    tree = rebox({"up": core, "bias": jnp.ones(9)}, {"up": Box(jnp.ones((8, 9))), "bias": Box(0)})
    assert tree["up"] is core
    assert tree["bias"].names == ("a", "b")
    np.testing.assert_array_equal(tree["bias"].value, jnp.ones(9))


class Axis(NamedTuple):
    name: str
    size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class NamedArray:
    """As Haliax has it."""

    array: Any
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Variable:
    """As NNX has it, with the metadata of the array as attributes."""

    value: Any
    out_sharding: Any = dataclasses.field(metadata={"static": True})


ARRAY = jax.ShapeDtypeStruct((4, 8), jnp.float32)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (Box(ARRAY), {"w": ("a", "b")}),
        (Box(ARRAY, (None, "b")), {"w": (None, "b")}),
        (Box(ARRAY, (("x", "y"), "b")), {"w": (None, "b")}),  # two mesh axes are no name
        (Box(ARRAY, ("a",)), {}),
        (Box(optax.MaskedNode()), {}),
        (Box({"u": ARRAY, "v": ARRAY}), {}),
        (Box({"u": Box(ARRAY), "v": ARRAY}), {"w/value/u": ("a", "b")}),
        (Variable(ARRAY, ("a", None)), {"w": ("a", None)}),
        (Variable(ARRAY, P("a")), {"w": ("a", None)}),  # trailing axes may be omitted
        (Variable(ARRAY, None), {}),
        (NamedArray(ARRAY, (Axis("a", 4), Axis("b", 8))), {"w": ("a", "b")}),
        (jnp.ones((4, 8)), {}),
        (None, {}),
    ],
    ids=str,
)
def test_axis_names(node, expected):
    assert axis_names({"w": node}) == expected
