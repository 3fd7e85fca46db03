"""`explain` of small programs, against rows worked out by hand.

Every x has T = 10 rows. A projected weight is m x n with r = 3.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax
from rich.console import Console

import natgalore_jax as natgalore
from examples.common import llama
from natgalore_jax.lowrank_grads.explain import Explanation


T, RANK, FLOAT = 10, 3, 4
VIEW = natgalore.MatrixView
ROWS = VIEW(-2, -1)


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def explained(loss, *shapes, select=ROWS, side="left", args=(), has_aux=False, **settings):
    """The rows of weights w0, w1, ... of these shapes; `select` may be a list, one per weight."""
    params = {f"w{i}": abstract(*shape) for i, shape in enumerate(shapes)}
    if isinstance(select, list):
        select = dict(zip(params, select, strict=True))
    tx = natgalore.project(RANK, optax.identity(), select=select, side=side, **settings)
    opt_state = jax.eval_shape(tx.init, params)
    loss_of_params = lambda params, *args: loss(*args, *params.values())
    explanation = natgalore.explain(loss_of_params, tx, has_aux)(params, opt_state, *args)
    assert [row.path for row in explanation.rows] == [*params]
    return explanation.rows


X = abstract(T, 12)


def nbytes(row):
    return row.full_bytes, row.core_bytes, row.formed_bytes


@pytest.mark.parametrize(("side", "core"), [("left", 3 * 8), ("right", 3 * 12), ("both", 3 * 3)])
def test_row_of_a_dense_layer(side, core):
    (row,) = explained(lambda x, W: jnp.sum(jnp.tanh(x @ W)), (12, 8), side=side, args=(X,))
    assert (row.operations, row.core, row.reason) == ({"dot_general": 1}, True, "")
    assert (row.shape, row.in_while) == ((12, 8), False)
    assert nbytes(row) == (12 * 8 * FLOAT, core * FLOAT, core * FLOAT)


@pytest.mark.parametrize("basis", ["power", "random"])  # "random": the basis is a key
def test_core_of_a_bfloat16_weight_is_float32(basis):
    params = {"w": abstract(12, 8, dtype=jnp.bfloat16)}
    tx = natgalore.project(RANK, optax.identity(), select=ROWS, side="left", basis=basis)
    loss = lambda params: jnp.sum(jnp.ones((T, 12)) @ params["w"])
    (row,) = natgalore.explain(loss, tx)(params, jax.eval_shape(tx.init, params)).rows
    assert nbytes(row) == (12 * 8 * 2, 3 * 8 * FLOAT, 3 * 8 * FLOAT)


@pytest.mark.parametrize("remat", [False, True])
def test_operation_in_a_scan_counts_per_iteration(remat):
    step = lambda y, w: (jnp.tanh(y @ w), None)
    step = jax.checkpoint(step) if remat else step
    loss = lambda x, W: jnp.sum(lax.scan(step, x, W)[0])
    (row,) = explained(loss, (5, 12, 12), args=(X,))
    assert (row.operations, row.core) == ({"dot_general": 5}, True)
    assert nbytes(row) == (5 * 144 * FLOAT, 5 * 3 * 12 * FLOAT, 5 * 3 * 12 * FLOAT)


def test_counts_of_nested_scans_multiply():
    inner = lambda y, W: lax.scan(lambda y, _: (jnp.tanh(y @ W), None), y, length=2)[0]
    loss = lambda x, W: jnp.sum(lax.scan(lambda y, _: (inner(y, W), None), x, length=7)[0])
    (row,) = explained(loss, (12, 12), args=(X,))
    assert row.operations == {"dot_general": 14}


def test_operation_in_a_while_counts_once():
    def loss(x, W):
        W = lax.stop_gradient(W)
        y = lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(y @ W), x)
        return jnp.sum(y)

    (row,) = explained(lambda x, W: loss(x, W) + jnp.sum(x @ W), (12, 12), args=(X,))
    assert not row.in_while  # the loop uses a constant

    def through(x, W):
        y = lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(y @ W), x)
        return jnp.sum(lax.stop_gradient(y)) + jnp.sum(x @ W)

    rows = explained(through, (12, 12), args=(X,))
    assert rows[0].in_while
    assert rows[0].operations == {"dot_general": 2}
    assert "dot_general x 2; one iteration of a while" in str(Explanation(rows))


def test_each_branch_and_each_call_of_one_jitted_function_counts():
    double = jax.jit(lambda x, W: jnp.tanh(x @ W))

    def loss(x, W):
        y = lax.cond(x[0, 0] > 0, lambda y: y @ W, lambda y: y @ W.T, x)
        return jnp.sum(double(double(y, W), W))

    (row,) = explained(loss, (12, 12), args=(X,))
    assert row.operations == {"dot_general": 4}


@pytest.mark.parametrize(("view", "core"), [(VIEW(0, (1, 2)), 3 * 10), (VIEW(0, 2), 2 * 3 * 5)])
def test_kernel_with_heads(view, core):
    """A (d, h, k) kernel used twice: as one 12 x 10 matrix, and as one 12 x 5 matrix per head."""

    def loss(x, W):
        y = jnp.einsum("td,dhk->thk", x, W)
        return jnp.sum(jnp.einsum("thk,dhk->td", jnp.tanh(y), W))

    (row,) = explained(loss, (12, 2, 5), select=view, args=(X,))
    assert (row.operations, row.core) == ({"dot_general": 2}, True)
    assert nbytes(row) == (120 * FLOAT, core * FLOAT, core * FLOAT)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_tied_embedding(side):
    def loss(tokens, W):
        return jnp.sum(jax.nn.log_softmax(jnp.tanh(jnp.take(W, tokens, axis=0)) @ W.T))

    tokens = abstract(2, 3, dtype=jnp.int32)
    (row,) = explained(loss, (30, 12), side=side, args=(tokens,))
    assert (row.operations, row.core) == ({"gather": 1, "dot_general": 1}, True)


def test_uses_that_fall_back():
    """One use has a rule, one is a product of two projected weights, one is elementwise."""

    def loss(x, W, V):
        return jnp.sum(x @ W) + jnp.sum(W**2) + jnp.sum(jnp.tanh(W @ V))

    first, second = explained(loss, (12, 8), (8, 9), args=(X,))
    assert first.operations == {"dot_general": 2, "integer_pow": 1}
    assert (first.core, first.reason) == (False, "integer_pow, dot_general")
    assert nbytes(first) == (96 * FLOAT, 24 * FLOAT, (24 + 2 * 96) * FLOAT)
    assert (second.core, second.reason) == (False, "dot_general")


def test_slice_that_falls_back_counts_its_own_bytes():
    loss = lambda x, W: jnp.sum(jnp.tanh(x @ W[:, :8])) + jnp.sum(W[:, 8:] ** 2)
    (row,) = explained(loss, (12, 16), args=(X,))
    assert (row.operations, row.reason) == ({"dot_general": 1, "integer_pow": 1}, "integer_pow")
    assert row.formed_bytes == (3 * 16 + 12 * 8) * FLOAT


def test_weights_that_are_not_projected():
    """One by `select`, one by its shape, one in a product with a projected weight."""
    loss = lambda x, W, V, b, L: jnp.sum((x + b[None]) @ W @ V) + jnp.sum(W @ L)
    select = [ROWS, None, "auto", None]
    rows = explained(loss, (12, 8), (8, 9), (12,), (8, 2), select=select, args=(X,))
    first, second, bias, third = rows
    assert (first.core, first.operations) == (True, {"dot_general": 2})
    assert [row.core for row in rows[1:]] == [False] * 3
    assert second.operations == third.operations == {"dot_general": 1}
    assert nbytes(second) == (72 * FLOAT, 0, 72 * FLOAT)
    assert bias.operations
    weights = {"w1": abstract(8, 9), "w2": abstract(12)}
    tx = natgalore.galore(1.0, select={"w1": None, "w2": "auto"})
    described = natgalore.describe(tx, weights)
    assert [second.reason, bias.reason] == [row.view for row in described.rows]


def test_weights_without_gradient():
    loss = lambda x, W, V, L: jnp.sum(x @ W) + jnp.sum(lax.stop_gradient(L) ** 2)
    rows = explained(loss, (12, 8), (8, 9), (7, 9), args=(X,))
    assert [row.operations for row in rows[1:]] == [{}, {"stop_gradient": 1}]
    assert [row.core for row in rows] == [True] * 3
    assert "nothing" in str(Explanation(rows))


def test_weights_that_are_outputs():
    """Of the body of a scan, and of the loss."""
    loss = lambda x, W: jnp.sum(lax.scan(lambda _, w: (0.0, w.T), 0.0, W)[1])
    (row,) = explained(loss, (5, 12, 12), args=(X,))
    assert (row.operations, row.reason) == ({"scan": 5}, "scan")
    loss = lambda x, W, b: b.reshape(())
    *_, row = explained(loss, (12, 8), (1,), select=[ROWS, None], args=(X,))
    assert row.operations == {"output": 1}
    assert nbytes(row) == (FLOAT, 0, FLOAT)


def test_static_arguments():
    """`power` is a string that selects the program."""
    params = {"w": abstract(12, 8)}
    tx = natgalore.galore(1e-3, rank=3)

    def loss(params, x, *, power):
        return jnp.sum(x @ params["w"]) if power == "one" else jnp.sum(params["w"] ** 2)

    opt_state = tx.init({"w": jnp.ones((12, 8))})
    (row,) = natgalore.explain(loss, tx)(params, opt_state, X, power="one").rows
    assert row.operations == {"dot_general": 1}


def test_errors():
    params = {"w": abstract(12, 8)}
    tx, other = natgalore.galore(1e-3, rank=3), natgalore.galore(1e-3, rank=4)
    opt_state = jax.eval_shape(tx.init, params)
    pair = lambda params: (jnp.sum(params["w"]), params["w"])
    cases = [
        (pair, tx, "real number, got .*float32.*has_aux"),
        (lambda params: params["w"], tx, r"real number, got float32\[12, 8\]"),
        (lambda params: 1, tx, "real number, got"),
        (lambda params: jnp.sum(params["w"]), other, "not a state of `tx`"),
    ]
    for loss, tx, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            natgalore.explain(loss, tx)(params, opt_state)
        assert "\n" not in str(error.value)


# --- models, and tables ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_llama_350m(scan):
    """The gradients of all matrices of the layers are cores; the table has a line per kind."""
    config = dataclasses.replace(llama.CONFIGS["350m"], scan=scan, remat=scan)
    graph, params = llama.structure(config), llama.abstract_params(config)
    loss = lambda params, tokens: llama.next_token_loss(nnx.merge(graph, params), tokens)
    tx = natgalore.natural_galore(1e-3, rank=256, fisher="core", residual=None)
    opt_state = jax.eval_shape(tx.init, params)
    tokens = abstract(8, 257, dtype=jnp.int32)
    explanation = natgalore.explain(loss, tx)(params, opt_state, tokens)
    layers = [
        row for row in explanation.rows if row.path.startswith("layers/") and "norm" not in row.path
    ]
    assert len(layers) == (7 if scan else 7 * 24)
    assert all(row.core for row in layers)
    up = [row for row in layers if row.path.endswith("up/kernel")]
    assert sum(row.formed_bytes for row in up) == 24 * 256 * 2736 * FLOAT
    label = "layers/mlp/up/kernel " if scan else "layers/*/mlp/up/kernel (24) "
    assert label in str(explanation)
    assert len(str(explanation).splitlines()) == 12 + 2


SMALL = {
    **{f"layer{i}": abstract(64, 256) for i in range(2)},
    "head": abstract(256, 10),
    "bias": abstract(10),
}


def small():
    tx = natgalore.galore(1e-3, rank=16, select=[("layer", ROWS), ("", "auto")])

    def loss(params, x):
        y = jnp.tanh(x @ params["layer0"]) * jnp.tanh(x @ params["layer1"])
        return jnp.sum((y @ params["head"] + params["bias"][None]) ** 2), y

    opt_state = jax.eval_shape(tx.init, SMALL)
    return natgalore.explain(loss, tx, has_aux=True)(SMALL, opt_state, x=abstract(100, 64))


# Two layers of 64 x 256 with cores of 16 x 256.
TABLE = """\
weight      used by      gradient                   full    formed
bias        add          full: a bias               40 B      40 B
head        dot_general  full: an output head   10.0 KiB  10.0 KiB
layer* (2)  dot_general  core                  128.0 KiB  32.0 KiB
total                                          138.0 KiB  42.0 KiB
"""


def test_table():
    assert str(small()) == TABLE.rstrip()


def test_rich_table_fits_the_screen():
    console = Console(width=80, record=True)
    console.print(small())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("layer*", "core", "bias", "head"):
        assert word in text


def test_table_in_the_documentation(capsys):
    page = (Path(__file__).parents[2] / "docs/low-rank-gradients.md").read_text()
    blocks = dict(re.findall(r"```python\n([^`]*)```\n+```text\n(.*?)```", page, re.S))
    ((code, printed),) = [block for block in blocks.items() if "natgalore.explain" in block[0]]
    exec(code, {})
    assert capsys.readouterr().out == printed
