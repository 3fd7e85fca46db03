import jax
import jax.numpy as jnp
import optax
import pytest

from natgalore_jax.select import SIDES, _words, select
from natgalore_jax.spec import LeafSpec


def tree(shapes):
    """A nested dict from `a/b/c` paths."""
    out: dict = {}
    for path, shape in shapes.items():
        *parents, name = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return out


def views(shapes, rank=4):
    """What each leaf is seen as: (batch, rows, cols), or why not."""
    specs, reasons = select(tree(shapes), rank)
    found = {s.name: (s.batch, s.rows, s.cols) for s in jax.tree.leaves(specs)}
    return found | reasons


LAYOUTS = {
    "unrolled": {
        "embed/embedding": ((99, 16), "an embedding"),
        "layers/0/attention/query/kernel": ((16, 16), ((), (0,), (1,))),
        "layers/0/attention_norm/scale": ((16,), "a norm"),
        "layers/0/mlp/up/kernel": ((16, 40), ((), (0,), (1,))),
        "layers/0/mlp/down/kernel": ((40, 16), ((), (1,), (0,))),
        "layers/0/mlp/up/bias": ((40,), "a bias"),
        "head/kernel": ((16, 99), "an output head"),
    },
    "scanned": {
        "layers/attention/query/kernel": ((3, 16, 16), ((0,), (1,), (2,))),
        "layers/mlp/down/kernel": ((3, 40, 16), ((0,), (2,), (1,))),
        "layers/norm/scale": ((3, 16), "a norm"),
        "layers/mlp/up/bias": ((3, 40), "a bias"),
        "lm_head/kernel": ((16, 99), "an output head"),
    },
    "scanned under a name that tells nothing": {
        "decoder/dense/kernel": ((3, 16, 40), ((0,), (1,), (2,))),
        "decoder/dense/bias": ((3, 40), "a bias"),
    },
    "Flax attention": {
        "attention/query/kernel": ((16, 4, 8), ((), (0,), (1, 2))),
        "attention/out/kernel": ((4, 8, 16), ((), (2,), (0, 1))),
        "attention/query/bias": ((4, 8), "a bias"),
    },
    "Flax attention, scanned": {
        "layers/attention/query/kernel": ((3, 16, 4, 8), ((0,), (1,), (2, 3))),
        "layers/attention/out/kernel": ((3, 4, 8, 16), ((0,), (3,), (1, 2))),
        "layers/norm/scale": ((3, 16), "a norm"),
    },
    "camel case, a list of blocks": {
        "Block_0/selfAttention/q_proj/weight": ((16, 16), ((), (0,), (1,))),
        "Block_0/LayerNorm_1/weight": ((16,), "a norm"),
    },
    "experts in an unrolled layer": {
        "layers/0/moe/up/kernel": ((8, 16, 40), ((0,), (1,), (2,))),
        "layers/0/moe/router/kernel": ((16, 8), "a router"),
        "layers/0/norm/scale": ((16,), "a norm"),
    },
    "Linen's own names": {
        "MultiHeadDotProductAttention_0/query/kernel": ((16, 4, 8), ((), (0,), (1, 2))),
        "MultiHeadDotProductAttention_0/out/kernel": ((4, 8, 16), ((), (2,), (0, 1))),
        "PreNorm_0/fn/Dense_0/kernel": ((16, 40), ((), (0,), (1,))),
        "PreNorm_0/LayerNorm_0/scale": ((16,), "a norm"),
    },
    "numbered modules below a list's name": {
        "blocks/block1/dense/kernel": ((16, 40), ((), (0,), (1,))),
        "blocks/block1/conv1/kernel": ((3, 3, 16, 32), "a convolution"),
        "layers/first/kernel": ((64, 256), ((), (0,), (1,))),
        "layers/ln1/weight": ((64,), "a norm"),
    },
    "other people's embeddings, heads and routers": {
        "tok_emb/weight": ((99, 16), "an embedding"),
        "shared/weight": ((99, 16), "an embedding"),
        "output/weight": ((99, 16), "an output head"),
        "unembedding/kernel": ((16, 99), "an output head"),
        "posemb": ((64, 16), "a position table"),
        "block_sparse_moe/gate/kernel": ((64, 8), "a router"),
        "moe/gating/kernel": ((64, 16), "a router"),
        "mlp/gate/kernel": ((16, 40), ((), (0,), (1,))),
        "rl/value/Dense_0/kernel": ((10, 16, 40), ((0,), (1,), (2,))),
    },
    "never": {
        "conv/kernel": ((3, 3, 16, 32), "a convolution"),
        "pos_embed/table": ((64, 16), "an embedding"),
        "position/table": ((64, 16), "a position table"),
        "gate/kernel": ((16, 4), "too small (4 x 16)"),
        "temperature": ((), "not a matrix (0-D)"),
        "pruned/kernel": ((0, 16, 40), "empty (0, 16, 40)"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reads_a_layout(layout):
    assert views({path: shape for path, (shape, _) in layout.items()}) == {
        path: view for path, (_, view) in layout.items()
    }


def test_indices_follow_the_leaves_and_count_every_matrix():
    specs, _ = select(tree({"a/kernel": (8, 9), "b/kernel": (5, 8, 9), "c/kernel": (8, 9)}), 4)
    assert [(s.index, s.matrices) for s in jax.tree.leaves(specs)] == [(0, 1), (1, 5), (6, 1)]


@pytest.mark.parametrize("side", SIDES)
def test_rank_is_limited_by_the_short_side(side):
    """On the long side too: the gradient has no more directions than its short side."""
    specs, _ = select(tree({"a/kernel": (64, 10), "b/kernel": (64, 40)}), 16, side)
    assert [s.rank for s in jax.tree.leaves(specs)] == [10, 16]


# The projected axes and the others of a tall, a wide, a square and a kernel out of heads.
ORIENTED = {
    "short": [((1,), (0,)), ((0,), (1,)), ((0,), (1,)), ((2,), (0, 1))],
    "long": [((0,), (1,)), ((1,), (0,)), ((0,), (1,)), ((0, 1), (2,))],
    "left": [((0,), (1,)), ((0,), (1,)), ((0,), (1,)), ((0, 1), (2,))],
    "right": [((1,), (0,)), ((1,), (0,)), ((1,), (0,)), ((2,), (0, 1))],
    "both": [((0,), (1,)), ((0,), (1,)), ((0,), (1,)), ((0, 1), (2,))],
}


@pytest.mark.parametrize("side", SIDES)
def test_a_side_is_the_stored_one(side):
    shapes = {"a/tall": (40, 10), "b/wide": (10, 40), "c/square": (10, 10)}
    specs, _ = select(tree(shapes | {"d/attention/out/kernel": (4, 5, 12)}), 8, side)
    specs = jax.tree.leaves(specs)
    assert [(s.rows, s.cols) for s in specs] == ORIENTED[side]
    cores = [(8, 8)] * 4 if side == "both" else [(8, s.n) for s in specs]
    assert [s.core_shape for s in specs] == cores
    assert [s.turned.basis_shape for s in specs] == [(s.n, 8) for s in specs]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64], ids=lambda d: d.__name__)
def test_what_is_not_real_is_left_alone(dtype):
    _, reasons = select({"up": {"kernel": jax.ShapeDtypeStruct((16, 16), dtype)}}, 4)
    assert reasons["up/kernel"].startswith("not real floating point")


def test_holes_stay_holes():
    params = {"a": {"kernel": jnp.ones((8, 9))}, "frozen": None, "masked": optax.MaskedNode()}
    specs, reasons = select(params, 4)
    assert reasons == {}
    assert isinstance(specs["a"]["kernel"], LeafSpec)
    assert jax.tree.structure(specs) == jax.tree.structure(params)


def test_the_box_of_flax_is_no_name():
    """`.value` of an nnx.Param or a boxed Linen leaf is not the value projection of attention."""
    boxed = jax.tree_util.GetAttrKey("value")
    path = (jax.tree_util.DictKey("experts"), jax.tree_util.DictKey("up"), boxed)
    assert _words(path) == ["experts", "up"]
    assert _words((jax.tree_util.DictKey("value"),)) == ["value"]
