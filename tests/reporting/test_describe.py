"""describe and memory_report: bytes against hand counts, views, reasons and printed tables."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen
from rich.console import Console

import natgalore_jax as natgalore
from examples.common import llama
from natgalore_jax.reporting.memory_report import bytes_by_leaf, human_bytes, nbytes


ABSTRACT = {
    "embed": {"embedding": jax.ShapeDtypeStruct((99, 16), jnp.bfloat16)},
    "layers": {
        str(i): {"up": {"kernel": jax.ShapeDtypeStruct((16, 40), jnp.bfloat16)}} for i in range(3)
    },
    "down": {"kernel": jax.ShapeDtypeStruct((40, 16), jnp.bfloat16)},
}


def test_describe_after_an_earlier_trace():
    tx = natgalore.galore(1.0, 4)
    natgalore.memory_report(ABSTRACT, {"galore": tx})
    assert natgalore.describe(tx, ABSTRACT).rows[-1].rank == 4


def test_rows_of_a_description():
    rows = {row.path: row for row in natgalore.describe(natgalore.galore(1.0, 4), ABSTRACT).rows}
    up, down, embed = (rows[p] for p in ("layers/1/up/kernel", "down/kernel", "embed/embedding"))
    assert (up.view, up.side, up.rank) == ("16 x 40", "left", 4)
    assert (down.view, down.side, down.rank) == ("16 x 40", "right", 4)
    assert (embed.view, embed.side, embed.rank) == ("an embedding", "", None)
    # P (16 x 4) and two moments (4 x 40) in float32, and two int32 that count.
    assert up.state_bytes == 4 * (16 * 4 + 2 * 4 * 40) + 8
    assert up.adamw_bytes == 2 * 2 * 16 * 40
    assert embed.state_bytes == 4 * 2 * 99 * 16 + 4


def test_similar_leaves_share_a_line():
    table = str(natgalore.describe(natgalore.galore(1.0, 4), ABSTRACT)).splitlines()
    (line,) = [line for line in table if line.startswith("layers")]
    assert line.split()[:2] == ["layers/*/up/kernel", "(3)"]
    assert line.endswith(human_bytes(3 * (4 * (16 * 4 + 2 * 4 * 40) + 8)))
    assert len(table) == 5


@pytest.mark.parametrize("wrap", ["chain", "masked", "MultiSteps"])
def test_describe_of_wrapped_optimizers(wrap):
    tx = natgalore.galore(1.0, 4)
    tx = {
        "chain": lambda: optax.chain(optax.clip(1.0), tx),
        "masked": lambda: optax.masked(tx, True),
        "MultiSteps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
    }[wrap]()
    rows = natgalore.describe(tx, ABSTRACT).rows
    assert [row.rank for row in rows if row.path == "down/kernel"] == [4]


def test_describe_of_two_projections():
    labels = {"embed": "b", "layers": "a", "down": "b"}
    tx = optax.partition({"a": natgalore.galore(1.0, 4), "b": natgalore.galore(1.0, 8)}, labels)
    rows = {row.path: row.rank for row in natgalore.describe(tx, ABSTRACT).rows}
    assert (rows["layers/1/up/kernel"], rows["down/kernel"]) == (4, 8)
    frozen = optax.masked(tx, {"embed": True, "layers": False, "down": True})
    views = {row.path: row.view for row in natgalore.describe(frozen, ABSTRACT).rows}
    assert views["layers/1/up/kernel"] == "not given to natgalore"


def test_full_rank_is_marked():
    rows = {r.path: r for r in natgalore.describe(natgalore.galore(1.0, 16), ABSTRACT).rows}
    assert (rows["down/kernel"].rank, rows["down/kernel"].full) == (16, True)
    described = natgalore.describe(natgalore.galore(1.0, 64), ABSTRACT)
    assert "16 (full)" in str(described)
    rows = natgalore.describe(natgalore.galore(1.0, 15), ABSTRACT).rows
    assert not any(row.full for row in rows)


def test_describe_of_two_sided_projection():
    tx = natgalore.galore(1.0, 4, side="both")
    rows = {row.path: row for row in natgalore.describe(tx, ABSTRACT).rows}
    assert (rows["down/kernel"].view, rows["down/kernel"].side) == ("40 x 16", "both")
    # P (40 x 4), Q (16 x 4), two moments (4 x 4), two counts.
    assert rows["down/kernel"].state_bytes == 4 * (40 * 4 + 16 * 4 + 2 * 4 * 4) + 8


@pytest.mark.slow
def test_measured_columns_of_a_state():
    params = jax.tree.map(lambda x: jnp.ones(x.shape), ABSTRACT)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    tx = natgalore.natural_galore(1.0, 4, fisher="core")
    _, state = tx.update(grads, tx.init(params), params)
    bad = jax.tree.map(lambda x: x, grads) | {"down": {"kernel": jnp.full((40, 16), jnp.nan)}}
    _, state = tx.update(bad, state, params)
    described = natgalore.describe(tx, params, state, grads)
    rows = {row.path: row.measured for row in described.rows}
    energy = natgalore.explained_energy(state, grads)
    assert rows["layers/1/up/kernel"]["energy"] == energy["layers/1/up/kernel"]
    assert rows["down/kernel"]["skipped"] == 1
    assert set(rows["embed/embedding"]) == {"skipped"}
    head, *lines = str(described).splitlines()
    assert head.split()[-4:] == ["here", "energy", "condition", "skipped"]
    (down,) = [line for line in lines if line.startswith("down")]
    assert down.split()[-1] == "1"
    assert "energy" not in str(natgalore.describe(tx, params, state))
    with pytest.raises(ValueError, match=r"`grads`.*`state`"):
        natgalore.describe(tx, params, grads=grads)


@pytest.mark.parametrize("fisher", [None, "core", "window"])
def test_shapes_of_a_state_are_not_measured(fisher):
    tx = natgalore.natural_galore(1.0, 4, fisher=fisher)
    state = jax.eval_shape(tx.init, ABSTRACT)
    described = natgalore.describe(tx, ABSTRACT, state)
    assert str(described) == str(natgalore.describe(tx, ABSTRACT))
    with pytest.raises(ValueError, match=r"`grads`.*arrays"):
        natgalore.describe(tx, ABSTRACT, state, ABSTRACT)


def test_describe_refuses_an_optimizer_without_projection():
    with pytest.raises(ValueError, match=r"contains no natgalore\.project"):
        natgalore.describe(optax.adam(1.0), ABSTRACT)


def test_bytes_by_leaf_sum_to_the_state():
    tx = optax.adamw(1.0)
    state = jax.eval_shape(tx.init, ABSTRACT)
    report = natgalore.memory_report(ABSTRACT, {"adamw": tx})
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    assert report.total["adamw"] == sum(sizes)
    assert sum(bytes_by_leaf(state, ABSTRACT).values()) == sum(sizes) - 4  # the step count


@pytest.mark.parametrize(
    ("dtype", "shape", "count"),
    [
        ("int4", (3, 5), 8),  # 7.5 bytes rounded up
        ("uint4", (4, 4), 8),
        ("float4_e2m1fn", (4, 4), 8),
        ("int2", (3, 5), 4),
        ("float8_e4m3fn", (3, 5), 15),
        ("bool", (3, 5), 15),
        ("bfloat16", (), 2),
        ("complex64", (3,), 24),
        ("int4", (0, 5), 0),
    ],
)
def test_nbytes_of_packed_dtypes(dtype, shape, count):
    assert nbytes(jax.ShapeDtypeStruct(shape, dtype)) == count


def test_memory_report_of_packed_state():
    four_bits = lambda params: jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.int4), params)
    tx = optax.GradientTransformation(four_bits, lambda g, state, params=None: (g, state))
    report = natgalore.memory_report(ABSTRACT, {"packed": tx})
    assert report.total["packed"] == (99 * 16 + 4 * 16 * 40) // 2
    keys = optax.GradientTransformation(lambda params: jax.random.key(0), tx.update)
    assert natgalore.memory_report(ABSTRACT, {"a key": keys}).total["a key"] == 8


def test_memory_report_refuses_no_optimizers():
    with pytest.raises(ValueError, match=r"`optimizers`"):
        natgalore.memory_report(ABSTRACT, {})
    unchecked = getattr(natgalore.memory_report, "__wrapped__", natgalore.memory_report)
    for arguments in [(optax.adam(1.0), ABSTRACT), (ABSTRACT, optax.adam(1.0))]:
        with pytest.raises(TypeError, match=r"takes the params, then a mapping from names"):
            unchecked(*arguments)


def test_state_of_llama_1b_at_rank_512():
    """At most 1.12 of GaLore's state and 0.40 of AdamW's on the projected leaves, in float32."""
    params = llama.abstract_params(replace(llama.CONFIGS["1b"], scan=True))
    report = natgalore.memory_report(
        params,
        {
            "adamw": optax.adamw(1.0),
            "galore": natgalore.galore(1.0, 512),
            "natural_galore": natgalore.natural_galore(1.0, 512, fisher="core"),
        },
    )
    ours = report.projected["natural_galore"]
    assert ours <= 1.12 * report.projected["galore"]
    assert ours <= 0.40 * report.projected["adamw"]
    # By hand: 24 layers of 4 attention kernels (2048 x 2048) and 3 of the MLP (2048 x 5461).
    r, matrices = 512, {2048: 4 * 24, 5461: 3 * 24}
    fisher = 4 * (2 * r * r + 3)
    by_hand = sum(k * (4 * (2048 * r + 2 * r * n) + fisher + 8) for n, k in matrices.items())
    assert ours == by_hand


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5120.0 GiB")]
)
def test_human_bytes(n, text):
    assert human_bytes(n) == text


class TestViews:
    """The column with the matrix view of a leaf or the reason why it is not projected."""

    def view(self, shape, path=("w", "kernel"), **settings):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        tx = natgalore.galore(1.0, 4, **settings)
        (row,) = natgalore.describe(tx, {path[0]: {path[1]: leaf}}).rows
        return row.view

    def test_folded_and_stacked_axes(self):
        assert self.view((16, 40)) == "16 x 40"
        assert self.view((16, 4, 12), ("query", "kernel")) == "16 x 4·12"
        assert self.view((16, 1, 40)) == "16 x 40"
        folded = natgalore.MatrixView((2, 3), 0)
        assert self.view((40, 6, 4, 5), select=folded) == "6 x (4·5 x 40)"
        qkv = natgalore.MatrixView(0, 1, blocks={1: 3})
        assert self.view((16, 48), select=qkv) == "3 x (16 x 16)"

    def test_guessed_views_are_marked(self):
        assert self.view((5, 16, 40)) == "5 x (16 x 40), a guess"
        assert self.view((5, 16, 40), ("experts", "up")) == "5 x (16 x 40)"
        assert self.view((5, 16, 40), select=natgalore.MatrixView(1, 2)) == "5 x (16 x 40)"

    def test_reasons_why_a_leaf_is_not_projected(self):
        assert self.view((16, 40), select=[("", None)]) == "excluded by `select`"
        assert self.view((99, 16), ("wte", "embedding")) == "an embedding"
        both = natgalore.MatrixView(0, 1)
        assert self.view((99, 16), ("wte", "embedding"), select=both) == "16 x 99"

    def test_axis_names_of_flax_boxes(self):
        """Linen's logical axis names; an axis named None has no name."""
        kernel = jax.ShapeDtypeStruct((3, 16, 4, 12), jnp.float32)
        box = linen.LogicallyPartitioned(kernel, ("layers", "embed", None, "kv"))
        tx = natgalore.galore(1.0, 4)
        params = {"layers": {"query": {"kernel": box, "bias": jnp.ones((3, 4, 12))}}}
        rows = {row.path: row for row in natgalore.describe(tx, params).rows}
        assert rows["layers/query/kernel"].view == "layers 3 x (embed 16 x 4·kv 12)"


def test_rich_table_has_the_same_cells():
    described = natgalore.describe(natgalore.galore(1.0, 4), ABSTRACT)
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(described)
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    for line in str(described).splitlines():
        assert " ".join(line.split()) in lines
    narrow = Console(width=60, color_system=None)
    with narrow.capture() as captured:
        narrow.print(described)
    assert max(map(len, captured.get().splitlines())) <= 60
