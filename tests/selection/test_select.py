"""The arguments `select` and `rank`, and the LeafSpecs they give; `test_infer_axes.py` tests the
automatic reading."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings, strategies as st

import natgalore_jax as natgalore
from natgalore_jax.selection.select import SIDES, MatrixView, select
from natgalore_jax.tree.leaf_spec import LeafSpec


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


PARAMS = tree(
    {
        "layers/0/attention/query/kernel": (16, 4, 8),
        "layers/0/mlp/up/kernel": (16, 40),
        "layers/0/norm/scale": (16,),
        "layers/1/attention/query/kernel": (16, 4, 8),
        "layers/1/mlp/up/kernel": (16, 40),
        "wte/embedding": (99, 16),
    }
)
NAMES = ["/".join(str(k.key) for k in p) for p, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
QUERY, UP, TABLE = "layers/0/attention/query/kernel", "layers/0/mlp/up/kernel", "wte/embedding"


def views(chosen, params=PARAMS, side="left"):
    """(batch, rows, cols) of each projected leaf by name, the reason for each other leaf."""
    specs, reasons = select(params, 4, side, chosen)
    return {s.name: (s.batch, s.rows, s.cols) for s in jax.tree.leaves(specs)} | reasons


AUTOMATIC = views(None)


def ranks(rank, params=PARAMS):
    specs, _ = select(params, rank)
    return {s.name: s.rank for s in jax.tree.leaves(specs)}


class TestProjectedLeaves:
    def test_rules_override_the_automatic_reading(self):
        seen = views([("query", MatrixView((0, 1), 2)), ("embedding", MatrixView(0, 1))])
        assert seen[QUERY] == ((), (0, 1), (2,))
        assert seen[TABLE] == ((), (0,), (1,))
        assert seen[UP] == AUTOMATIC[UP]

    def test_the_first_matching_rule_decides(self):
        seen = views([("layers/0/", None), ("mlp", MatrixView(1, 0)), ("kernel", "auto")])
        assert seen[UP] == seen[QUERY] == "excluded by `select`"
        assert seen["layers/1/mlp/up/kernel"] == ((), (1,), (0,))
        assert seen["layers/1/attention/query/kernel"] == ((), (0,), (1, 2))

    def test_a_final_rule_excludes_all_other_leaves(self):
        seen = views([("mlp", "auto"), ("", None)])
        assert {name for name, view in seen.items() if not isinstance(view, str)} == {
            "layers/0/mlp/up/kernel",
            "layers/1/mlp/up/kernel",
        }

    @pytest.mark.parametrize("spelling", ["tree", "prefix", "function", "one for all"])
    def test_trees_and_functions_equal_rules(self, spelling):
        params = PARAMS["layers"]["1"]
        view = MatrixView(0, -1)
        chosen = {
            "tree": {"attention": {"query": {"kernel": view}}, "mlp": {"up": {"kernel": None}}},
            "prefix": {"attention": view, "mlp": None},
            "function": lambda p: jax.tree.map(lambda x: view if x.ndim == 3 else None, p),
            "one for all": [("query", view), ("mlp", None)],
        }[spelling]
        expected = {"attention/query/kernel": ((1,), (0,), (2,))}
        assert views(chosen, params) == expected | {"mlp/up/kernel": "excluded by `select`"}

    @pytest.mark.parametrize(
        "numbers",
        [optax.contrib.GaLoreDimensionNumbers, optax.contrib.MuonDimensionNumbers],
        ids=lambda kind: kind.__name__,
    )
    def test_dimension_numbers_of_optax(self, numbers):
        chosen = jax.tree.map(
            lambda x: {2: numbers(), 3: numbers(0, (1, 2))}.get(x.ndim), PARAMS["layers"]["0"]
        )
        seen = views(chosen, PARAMS["layers"]["0"])
        assert seen["attention/query/kernel"] == ((), (0,), (1, 2))
        assert seen["mlp/up/kernel"] == ((), (0,), (1,))
        assert seen["norm/scale"] == "excluded by `select`"

    def test_unnamed_axes_are_batch_axes(self):
        """As in Muon's dimension numbers; negative axes count from the last."""
        params = tree({"w": (2, 3, 16, 40)})
        for view in (MatrixView(-2, -1), MatrixView(2, 3, batch=(0, 1)), MatrixView((2,), (3,))):
            assert views(view, params) == {"w": ((0, 1), (2,), (3,))}
        assert views(MatrixView(0, (1, 3)), params) == {"w": ((2,), (0,), (1, 3))}

    def test_a_view_may_have_a_side_below_the_automatic_limit(self):
        assert views(MatrixView(0, 1), tree({"gate": (16, 4)})) == {"gate": ((), (0,), (1,))}

    def test_views_are_comparable_and_hashable(self):
        assert MatrixView(0, (1, 2)) == MatrixView((0,), [1, 2])
        assert hash(MatrixView(0, 1, blocks={1: 3})) == hash(MatrixView(0, 1, blocks=((1, 3),)))

    def test_every_entry_point_uses_select(self):
        chosen = [("mlp", None)]
        for tx in (
            natgalore.natural_galore(1.0, 4, select=chosen),
            natgalore.galore(1.0, 4, select=chosen),
            natgalore.project(4, optax.identity(), select=chosen),
            natgalore.chain(natgalore.project(4, select=chosen), optax.trace(0.9)),
        ):
            rows = {row.path: row for row in natgalore.describe(tx, PARAMS).rows}
            assert rows[UP].view == "excluded by `select`"
            assert rows[QUERY].rank == 4


class TestBlocks:
    """Several matrices side by side on one axis: `MatrixView(blocks=...)`."""

    def test_each_block_is_its_own_matrix(self):
        spec = jax.tree.leaves(
            select(tree({"qkv": (5, 12)}), 2, chosen=MatrixView(0, 1, blocks={1: 3}))[0]
        )[0]
        assert (spec.batch_shape, spec.m, spec.n, spec.core_shape) == ((3,), 4, 5, (3, 2, 5))
        x = jnp.arange(60.0).reshape(5, 12)
        q, k, v = np.split(np.asarray(x), 3, axis=1)
        np.testing.assert_array_equal(spec.to_view(x), np.stack([q.T, k.T, v.T]))
        np.testing.assert_array_equal(spec.from_view(spec.to_view(x)), x)
        for i, part in enumerate((q, k, v)):
            np.testing.assert_array_equal(spec.as_matrix(spec.cut(x, jnp.int32(i))), part.T)

    @settings(deadline=None, max_examples=10)  # each compiles a few reshapes
    @given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
    def test_blocks_equal_a_numpy_reshape(self, layers, size, count, data):
        """For a block axis at any position, with a batch axis and a second axis on its side."""
        sizes = {"stack": layers, "blocks": size * count, "beside": 2, "other": 5}
        order = data.draw(st.permutations(list(sizes)))
        position = {name: axis for axis, name in enumerate(order)}
        shape = tuple(sizes[name] for name in order)
        view = MatrixView(
            (position["blocks"], position["beside"]),
            position["other"],
            blocks={position["blocks"]: count},
        )
        spec = jax.tree.leaves(select(tree({"w": shape}), 1, "left", view)[0])[0]
        x = np.arange(float(np.prod(shape))).reshape(shape)
        moved = x.transpose([position[name] for name in sizes])
        blocks = moved.reshape(layers, count, size, 2, 5)
        np.testing.assert_array_equal(
            spec.to_view(jnp.asarray(x)), blocks.reshape(layers, count, size * 2, 5)
        )
        np.testing.assert_array_equal(spec.from_view(spec.to_view(jnp.asarray(x))), x)

    def test_training_a_fused_kernel_equals_training_its_parts(self):
        """One leaf of three blocks and three leaves have the same bases, moments and refreshes."""
        parts = [jax.random.normal(jax.random.key(i), (16, 12)) for i in range(3)]
        fused = {"qkv": jnp.concatenate(parts, axis=1)}
        apart = {name: part for name, part in zip("abc", parts, strict=True)}
        make = lambda view: natgalore.natural_galore(
            1e-2, 4, refresh_every=2, stagger=False, seed=3, select=view
        )
        one, three = make(MatrixView(0, 1, blocks={1: 3})), make(MatrixView(0, 1))
        one_state, three_state = one.init(fused), three.init(apart)
        for _ in range(5):
            fused_updates, one_state = jax.jit(one.update)(fused, one_state, fused)
            apart_updates, three_state = jax.jit(three.update)(apart, three_state, apart)
            fused = optax.apply_updates(fused, fused_updates)
            apart = optax.apply_updates(apart, apart_updates)
        # Batched and single matmuls round differently: five steps of 1e-2 in float32.
        expected = jnp.concatenate(list(apart.values()), axis=1)
        np.testing.assert_allclose(fused["qkv"], expected, rtol=2e-5, atol=2e-6)


class TestErrors:
    @pytest.mark.parametrize("argument", ["select", "rank"])
    def test_a_rule_without_a_leaf_lists_similar_names(self, argument):
        value = {"select": MatrixView(0, 1), "rank": 8}[argument]
        message = re.escape(f"`{argument}` has a rule for 'querry/kernel$', which matches no")
        with pytest.raises(ValueError, match=message + ".*'layers/0/attention/query/kernel'"):
            natgalore.galore(1.0, **{argument: [("querry/kernel$", value)]}).init(PARAMS)

    def test_rules_may_name_masked_leaves(self):
        rules = [("query", None), ("", "auto")]
        mask = jax.tree.map(lambda x: x.ndim < 3, PARAMS)
        tx = optax.masked(natgalore.galore(1.0, 4, select=rules), mask)
        assert {row.path for row in natgalore.describe(tx, PARAMS).rows if row.rank} == {
            "layers/0/mlp/up/kernel",
            "layers/1/mlp/up/kernel",
        }
        natgalore.galore(1.0, 4, select=rules).init({})  # no error for an empty tree either

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            ([("up", MatrixView(0, 2))], "'layers/0/mlp/up/kernel', of shape (16, 40).*has 2 axes"),
            ([("up", MatrixView(0, 0))], "each axis must be named once"),
            ([("up", MatrixView(0, ()))], "each side needs at least one axis"),
            ([("query", MatrixView(0, 1, batch=()))], "each axis must be named once"),
            ([("up", MatrixView(0, 1, blocks={1: 3}))], "axis 1 cannot be split into 3"),
            ([("query", MatrixView(0, 2, blocks={1: 2}))], "axis 1 cannot be split into 2"),
            ([("(up", None)], "bad pattern '(up'"),
            ([("up", "matrix")], "of a leaf is 'matrix'; it must be a MatrixView"),
            ({"layers": None}, "the tree of params: it has no value for 'wte/embedding'"),
            ({"layer": None, "wte": None}, "params: it has a value at 'layer', where they have no"),
            (("up", None), "does not fit the tree of params: it has a value at '0'"),
        ],
    )  # fmt: skip
    def test_views_that_do_not_fit(self, chosen, message):
        with pytest.raises(ValueError, match=re.escape(message).replace(re.escape(".*"), ".*")):
            natgalore.galore(1.0, 4, select=chosen).init(PARAMS)

    @pytest.mark.parametrize(
        ("name", "bad"),
        [
            ("rows", "a"),
            ("cols", 0.5),
            ("batch", ("a",)),
            ("blocks", {1: [64, 64]}),
            ("blocks", 4),
            ("blocks", (1, 2)),
        ],
    )
    def test_arguments_of_a_view(self, name, bad):
        view = object.__new__(MatrixView)  # users have no run-time type checker
        for field, value in {"rows": 0, "cols": 1, "batch": None, "blocks": (), name: bad}.items():
            object.__setattr__(view, field, value)
        with pytest.raises(TypeError, match=rf"`{name}` of a MatrixView must be"):
            view.__post_init__()

    @pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, float("nan"), True, "8", None])
    def test_invalid_ranks(self, rank):
        with pytest.raises((ValueError, TypeError), match="`rank`"):
            natgalore.galore(1.0, rank)

    @pytest.mark.parametrize("rank", [[("mlp", 0), ("", 4)], {"layers": 4, "wte": 2.0}])
    def test_invalid_ranks_in_rules_and_trees(self, rank):
        with pytest.raises(
            ValueError, match=r"of a leaf is .*; it must be an int of at least 1 or"
        ):
            natgalore.galore(1.0, rank).init(PARAMS)

    def test_a_leaf_without_a_rank_rule(self):
        with pytest.raises(ValueError, match=r"no rule for 'layers/0/attention/query/kernel'.*128"):
            natgalore.galore(1.0, [("mlp", 4)]).init(PARAMS)


class TestRank:
    def test_a_fraction_of_the_short_side(self):
        assert ranks(0.25) == {name: 4 for name in NAMES if "kernel" in name}
        assert ranks(1.0)[UP] == 16
        assert ranks(1e-9)[UP] == 1

    def test_rules_trees_and_functions(self):
        expected = {name: 2 if "mlp" in name else 8 for name in NAMES if "kernel" in name}
        assert ranks([("mlp", 2), ("", 0.5)]) == expected
        assert ranks({"layers": {i: {"mlp": 2, "attention": 8, "norm": 1} for i in "0"}
                      | {"1": {"mlp": 2, "attention": 0.5}}, "wte": 1}) == expected  # fmt: skip
        by_path = lambda path, _: 2 if "mlp" in str(path) else 8
        assert ranks(lambda p: jax.tree_util.tree_map_with_path(by_path, p)) == expected

    @pytest.mark.parametrize("side", SIDES)
    def test_rank_is_at_most_the_short_side(self, side):
        """Also for side="long": the rank of a gradient is at most its short side."""
        specs, _ = select(tree({"a/kernel": (64, 10), "b/kernel": (64, 40)}), 16, side)
        assert [s.rank for s in jax.tree.leaves(specs)] == [10, 16]


# (rows, cols) of a tall, a wide and a square matrix and of an attention output kernel.
ORIENTED = {
    "short": [((1,), (0,)), ((0,), (1,)), ((0,), (1,)), ((2,), (0, 1))],
    "long": [((0,), (1,)), ((1,), (0,)), ((0,), (1,)), ((0, 1), (2,))],
    "left": [((0,), (1,)), ((0,), (1,)), ((0,), (1,)), ((0, 1), (2,))],
    "right": [((1,), (0,)), ((1,), (0,)), ((1,), (0,)), ((2,), (0, 1))],
    "both": [((0,), (1,)), ((0,), (1,)), ((0,), (1,)), ((0, 1), (2,))],
}


@pytest.mark.parametrize("side", SIDES)
def test_rows_are_the_projected_side(side):
    shapes = {"a/tall": (40, 10), "b/wide": (10, 40), "c/square": (10, 10)}
    specs, _ = select(tree(shapes | {"d/attention/out/kernel": (4, 5, 12)}), 8, side)
    specs = jax.tree.leaves(specs)
    assert [(s.rows, s.cols) for s in specs] == ORIENTED[side]
    cores = [(8, 8)] * 4 if side == "both" else [(8, s.n) for s in specs]
    assert [s.core_shape for s in specs] == cores
    assert [s.transposed.basis_shape for s in specs] == [(s.n, 8) for s in specs]


def test_index_counts_matrices_in_leaf_order():
    specs, _ = select(tree({"a/kernel": (8, 9), "b/kernel": (5, 8, 9), "c/kernel": (8, 9)}), 4)
    assert [(s.index, s.matrices) for s in jax.tree.leaves(specs)] == [(0, 1), (1, 5), (6, 1)]


class Box:
    """A box with names of axes, as Linen's."""

    def __init__(self, value, names):
        self.value, self.names = value, names


jax.tree_util.register_pytree_with_keys(
    Box,
    lambda box: (((jax.tree_util.GetAttrKey("value"), box.value),), box.names),
    lambda names, children: Box(*children, names),
)


class TestAxisNames:
    SHAPE = (32, 12, 64, 64)
    NAMES = ("exp", "layers", "embed_moe", "mlp_moe")

    def test_names_in_boxes_reach_the_view(self):
        params = {"ff": {"w": Box(jax.ShapeDtypeStruct(self.SHAPE, jnp.float32), self.NAMES)}}
        (row,) = natgalore.describe(natgalore.galore(1.0, 4), params).rows
        assert row.view == "exp 32·layers 12 x (embed_moe 64 x mlp_moe 64)"

    def test_a_view_by_the_user_overrides_names(self):
        params = {"w": Box(jax.ShapeDtypeStruct(self.SHAPE, jnp.float32), self.NAMES)}
        tx = natgalore.galore(1.0, 4, select=[("w", MatrixView(2, (1, 3)))])
        (row,) = natgalore.describe(tx, params).rows
        assert row.view == "exp 32 x (embed_moe 64 x layers 12·mlp_moe 64)"

    def test_a_guess_is_shown(self):
        params = {"w": jax.ShapeDtypeStruct(self.SHAPE, jnp.float32)}
        (row,) = natgalore.describe(natgalore.galore(1.0, 4), params).rows
        assert row.view == "32·12 x (64 x 64), a guess"


class TestLeavesThatAreNoArrays:
    @pytest.mark.parametrize(
        "leaf", ["relu", 1.5, 3, True, len, jax.nn.relu, object()], ids=lambda x: type(x).__name__
    )
    @pytest.mark.parametrize(
        "call",
        [
            lambda params: natgalore.natural_galore(1.0, 4).init(params),
            lambda params: natgalore.describe(natgalore.galore(1.0, 4), params),
        ],
        ids=["init", "describe"],
    )
    def test_the_error_names_the_leaf(self, call, leaf):
        params = {"mlp": {"kernel": jnp.ones((16, 40)), "activation": leaf}}
        message = r"^The leaf 'mlp/activation' of the params is not an array.*`eqx\.filter\(model"
        with pytest.raises(TypeError, match=message) as error:
            call(params)
        assert "\n" not in str(error.value)
        assert type(leaf).__name__ in str(error.value)

    @pytest.mark.parametrize("leaf", [None, np.float32(1.0), jnp.float32(1.0)], ids=str)
    def test_none_and_scalars_with_a_dtype_are_allowed(self, leaf):
        natgalore.natural_galore(1.0, 4).init({"kernel": jnp.ones((16, 40)), "x": leaf})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64], ids=lambda d: d.__name__)
def test_leaves_that_are_not_real_are_not_projected(dtype):
    _, reasons = select({"up": {"kernel": jax.ShapeDtypeStruct((16, 16), dtype)}}, 4)
    assert reasons["up/kernel"].startswith("not real floating point")


def test_empty_nodes_are_kept():
    params = {"a": {"kernel": jnp.ones((8, 9))}, "frozen": None, "masked": optax.MaskedNode()}
    for chosen in (
        None,
        [("kernel", "auto")],
        MatrixView(0, 1),
        {"a": "auto", "frozen": None, "masked": None},
    ):
        specs, reasons = select(params, 4, chosen=chosen)
        assert reasons == {}
        assert isinstance(specs["a"]["kernel"], LeafSpec)
        assert jax.tree.structure(specs) == jax.tree.structure(params)
