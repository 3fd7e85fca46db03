"""What `explain` says of small programs, against what is worked out by hand.

Every x has T = 10 rows. A projected weight is m x n with r = 3; its whole gradient takes 2 T m n a
product, and 2 m n r to project it; its core 2 T r (m + n), on both sides 2 T r (m + n + r).
"""

import dataclasses
import math
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
from natgalore_jax.lowrank_grads.flops import projecting
from natgalore_jax.lowrank_grads.loss import backward, bases_in, bases_of
from natgalore_jax.util.text_tables import human_count
from tests.helpers.cases import slow


T, RANK, FLOAT = 10, 3, 4
VIEW = natgalore.MatrixView
ROWS = VIEW(-2, -1)


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def explained(loss, *shapes, select=ROWS, side="left", args=(), has_aux=False, **settings):
    """The rows of weights of these shapes, w0, w1, ...; `select` may be a list of theirs."""
    params = {f"w{i}": abstract(*shape) for i, shape in enumerate(shapes)}
    if isinstance(select, list):
        select = dict(zip(params, select, strict=True))
    tx = natgalore.project(RANK, optax.identity(), select=select, side=side, **settings)
    opt_state = jax.eval_shape(tx.init, params)
    of = lambda params, *args: loss(*args, *params.values())
    found = natgalore.explain(of, tx, has_aux)(params, opt_state, *args)
    assert [row.path for row in found.rows] == [*params]
    return found.rows


X = abstract(T, 12)


def flops(row):
    return row.whole_flops, row.here_flops


def nbytes(row):
    return row.whole_bytes, row.core_bytes, row.here_bytes


@pytest.mark.parametrize(
    ("side", "core", "here", "projecting"),
    [
        ("left", 3 * 8, 2 * T * 3 * (12 + 8), 2 * 12 * 8 * 3),
        ("right", 3 * 12, 2 * T * 3 * (12 + 8), 2 * 12 * 8 * 3),
        ("both", 3 * 3, 2 * T * 3 * (12 + 8 + 3), 2 * 12 * 8 * 3 + 2 * 3 * 8 * 3),
    ],
)
def test_dense(side, core, here, projecting):
    (row,) = explained(lambda x, W: jnp.sum(jnp.tanh(x @ W)), (12, 8), side=side, args=(X,))
    assert (row.operations, row.core, row.why) == ({"dot_general": 1}, True, "")
    assert (row.shape, row.in_while) == ((12, 8), False)
    assert nbytes(row) == (12 * 8 * FLOAT, core * FLOAT, core * FLOAT)
    assert flops(row) == (2 * T * 12 * 8 + projecting, here)


def test_a_core_has_its_own_dtype():
    """Of a bfloat16 weight the core is float32; a seeded basis has no dtype to say so."""
    for basis in ("power", "random"):
        params = {"w": abstract(12, 8, dtype=jnp.bfloat16)}
        tx = natgalore.project(RANK, optax.identity(), select=ROWS, side="left", basis=basis)
        loss = lambda params: jnp.sum(jnp.ones((T, 12)) @ params["w"])
        (row,) = natgalore.explain(loss, tx)(params, jax.eval_shape(tx.init, params)).rows
        assert nbytes(row) == (12 * 8 * 2, 3 * 8 * FLOAT, 3 * 8 * FLOAT)


@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_stack_counts_its_turns(remat):
    step = lambda y, w: (jnp.tanh(y @ w), None)
    step = jax.checkpoint(step) if remat else step
    loss = lambda x, W: jnp.sum(lax.scan(step, x, W)[0])
    (row,) = explained(loss, (5, 12, 12), args=(X,))
    assert (row.operations, row.core) == ({"dot_general": 5}, True)
    assert nbytes(row) == (5 * 144 * FLOAT, 5 * 3 * 12 * FLOAT, 5 * 3 * 12 * FLOAT)
    assert flops(row) == (5 * (2 * T * 144 + 2 * 144 * 3), 5 * 2 * T * 3 * 24)


def test_scans_in_scans_multiply():
    inner = lambda y, W: lax.scan(lambda y, _: (jnp.tanh(y @ W), None), y, length=2)[0]
    loss = lambda x, W: jnp.sum(lax.scan(lambda y, _: (inner(y, W), None), x, length=7)[0])
    (row,) = explained(loss, (12, 12), args=(X,))
    assert row.operations == {"dot_general": 14}
    assert flops(row) == (14 * 2 * T * 144 + 2 * 144 * 3, 14 * 2 * T * 3 * 24)


def test_heads():
    """A (d, h, k) kernel as 12 x 10, used to and fro; and as one matrix for each head."""

    def loss(x, W):
        y = jnp.einsum("td,dhk->thk", x, W)
        return jnp.sum(jnp.einsum("thk,dhk->td", jnp.tanh(y), W))

    (row,) = explained(loss, (12, 2, 5), select=VIEW(0, (1, 2)), args=(X,))
    assert (row.operations, row.core) == ({"dot_general": 2}, True)
    assert flops(row) == (2 * 2 * T * 120 + 2 * 120 * 3, 2 * 2 * T * 3 * (12 + 10))
    (row,) = explained(loss, (12, 2, 5), select=VIEW(0, 2), args=(X,))
    assert flops(row) == (2 * 2 * T * 120 + 2 * (2 * 60 * 3), 2 * 2 * (2 * T * 3 * (12 + 5)))
    assert row.core_bytes == 2 * 3 * 5 * FLOAT


def test_stacks_that_share_their_tokens():
    """All experts see all of x: in x P they do not share."""
    loss = lambda x, W: jnp.sum(jnp.tanh(jnp.einsum("td,edf->etf", x, W)))
    (row,) = explained(loss, (4, 12, 8), args=(X,))
    assert flops(row) == (4 * (2 * T * 96 + 2 * 96 * 3), 4 * 2 * T * 3 * (12 + 8))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_tied_embedding(side):
    """Six rows are taken, of 30, and there are six rows of logits."""

    def loss(tokens, W):
        return jnp.sum(jax.nn.log_softmax(jnp.tanh(jnp.take(W, tokens, axis=0)) @ W.T))

    tokens = abstract(2, 3, dtype=jnp.int32)
    (row,) = explained(loss, (30, 12), side=side, args=(tokens,))
    assert (row.operations, row.core) == ({"gather": 1, "dot_general": 1}, True)
    extra = 3 if side == "both" else 0
    taken = 2 * 6 * 3 * (12 + extra)  # (rows of P)ᵀ ȳ, or ȳ Q; on both sides both
    product = 2 * 6 * 3 * (30 + 12 + extra)
    projecting = 2 * 30 * 12 * 3 + (2 * 3 * 12 * 3 if side == "both" else 0)
    assert flops(row) == (2 * 6 * 30 * 12 + projecting, taken + product)


def test_a_use_that_falls_back():
    """One use has a rule; one is a product that has none; one is no product."""

    def loss(x, W, V):
        return jnp.sum(x @ W) + jnp.sum(W**2) + jnp.sum(jnp.tanh(W @ V))

    first, second = explained(loss, (12, 8), (8, 9), args=(X,))
    assert first.operations == {"dot_general": 2, "integer_pow": 1}
    assert (first.core, first.why) == (False, "integer_pow, dot_general")
    whole = 2 * T * 96 + 2 * 12 * 8 * 9
    lowered = 2 * 96 * 3
    here = 2 * T * 3 * 20 + lowered + (2 * 12 * 8 * 9 + lowered)
    assert flops(first) == (whole + lowered, here)
    assert nbytes(first) == (96 * FLOAT, 24 * FLOAT, (24 + 2 * 96) * FLOAT)
    assert (second.core, second.why) == (False, "dot_general")
    assert flops(second) == (2 * 12 * 72 + 2 * 72 * 3, 2 * 12 * 72 + 2 * 72 * 3)


def test_part_of_a_weight_falls_back_alone():
    """One half has a rule; of the other alone the gradient is formed."""
    loss = lambda x, W: jnp.sum(jnp.tanh(x @ W[:, :8])) + jnp.sum(W[:, 8:] ** 2)
    (row,) = explained(loss, (12, 16), args=(X,))
    assert (row.operations, row.why) == ({"dot_general": 1, "integer_pow": 1}, "integer_pow")
    assert row.here_bytes == (3 * 16 + 12 * 8) * FLOAT
    assert flops(row) == (2 * T * 96 + 2 * 192 * 3, 2 * T * 3 * (12 + 8) + 2 * 96 * 3)


def test_convolutions_are_products():
    def loss(x, W):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(lax.conv_general_dilated(x, W, (1, 1), "SAME", dimension_numbers=numbers))

    (row,) = explained(loss, (3, 3, 6, 8), select=VIEW(2, 3), args=(abstract(2, 7, 7, 6),))
    whole, lowered = 2 * (2 * 7 * 7) * 9 * 6 * 8, 9 * 2 * 6 * 8 * 3
    assert (row.why, flops(row)) == ("conv_general_dilated", (whole + lowered, whole + lowered))


def test_weights_that_are_not_projected():
    """One by `select`, one by its shape, one that stands beside a projected weight in a product."""
    loss = lambda x, W, V, b, L: jnp.sum((x + b[None]) @ W @ V) + jnp.sum(W @ L)
    select = [ROWS, None, "auto", None]
    rows = explained(loss, (12, 8), (8, 9), (12,), (8, 2), select=select, args=(X,))
    first, second, bias, third = rows
    assert (first.core, first.operations) == (True, {"dot_general": 2})
    assert [row.core for row in rows[1:]] == [False] * 3
    assert second.why == "left whole by `select`"
    assert second.operations == third.operations == {"dot_general": 1}
    assert flops(second) == (2 * T * 72, 2 * T * 72)
    assert nbytes(second) == (72 * FLOAT, 0, 72 * FLOAT)
    assert flops(third) == (2 * 12 * 16, 2 * 12 * 16)
    assert bias.operations
    assert flops(bias) == (0, 0)
    assert bias.why == natgalore.describe(natgalore.galore(1.0), {"w2": abstract(12)}).rows[0].view


def test_weights_that_are_not_used():
    loss = lambda x, W, V, L: jnp.sum(x @ W) + jnp.sum(lax.stop_gradient(L) ** 2)
    rows = explained(loss, (12, 8), (8, 9), (7, 9), args=(X,))
    assert [row.operations for row in rows[1:]] == [{}, {"stop_gradient": 1}]
    assert [row.here_flops for row in rows[1:]] == [0, 0]
    assert [row.core for row in rows] == [True] * 3
    assert "nothing" in str(Explanation(rows))


def test_ends_of_programs():
    """A weight that leaves the loss, or the body of a loop, as it is."""
    loss = lambda x, W: jnp.sum(lax.scan(lambda _, w: (0.0, w.T), 0.0, W)[1])
    (row,) = explained(loss, (5, 12, 12), args=(X,))
    assert (row.operations, row.why) == ({"scan": 5}, "scan")
    assert flops(row) == (2 * 5 * 144 * 3, 2 * 5 * 144 * 3)
    loss = lambda x, W, b: b.reshape(())
    *_, row = explained(loss, (12, 8), (1,), select=[ROWS, None], args=(X,))
    assert row.operations == {"output": 1}
    assert nbytes(row) == (FLOAT, 0, FLOAT)


def test_a_while_counts_as_one_turn():
    def loss(x, W):
        W = lax.stop_gradient(W)
        y = lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(y @ W), x)
        return jnp.sum(y)

    (row,) = explained(lambda x, W: loss(x, W) + jnp.sum(x @ W), (12, 12), args=(X,))
    assert not row.in_while  # of what is stopped no gradient is taken

    def through(x, W):
        y = lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(y @ W), x)
        return jnp.sum(lax.stop_gradient(y)) + jnp.sum(x @ W)

    rows = explained(through, (12, 12), args=(X,))
    assert rows[0].in_while
    assert rows[0].operations == {"dot_general": 2}
    assert "dot_general x 2; of a while, one turn" in str(Explanation(rows))


def test_each_branch_counts_and_programs_are_told_apart():
    double = jax.jit(lambda x, W: jnp.tanh(x @ W))

    def loss(x, W):
        y = lax.cond(x[0, 0] > 0, lambda y: y @ W, lambda y: y @ W.T, x)
        return jnp.sum(double(double(y, W), W))  # one program, called twice

    (row,) = explained(loss, (12, 12), args=(X,))
    assert row.operations == {"dot_general": 4}
    assert flops(row) == (4 * 2 * T * 144 + 2 * 144 * 3, 4 * 2 * T * 3 * 24)


# --- the programs themselves ----------------------------------------------------------------------


def dots(jaxpr):
    """The operations of all products of a program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _), x = eqn.params["dimension_numbers"], eqn.invars[0].aval
            terms = math.prod(x.shape[i] for i in contracted)
            total += 2 * eqn.outvars[0].aval.size * terms
        inner = [getattr(x, "jaxpr", x) for x in eqn.params.values()]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(dots(program) for program in inner if hasattr(program, "eqns"))
    return total


def chain(x, W, V):
    step = lambda y, w: (jnp.tanh(y @ w), None)
    y, _ = lax.scan(step, x, W)
    return jnp.sum(jnp.tanh(jnp.einsum("td,dhk->thk", y, V)) ** 2)


def tied(x, W):
    y = jnp.tanh(jnp.take(W, jnp.array([3, 1, 2, 3]), axis=0)) @ W.T
    return jnp.sum(jnp.tanh(y @ W) ** 2)


def grouped(x, W, V):
    y = jnp.tanh(jnp.einsum("td,edf->etf", x, W))
    return jnp.sum(jnp.einsum("etf,efd->td", y, V) ** 2)


@pytest.mark.parametrize("side", ["left", *slow("right", "both")])
@pytest.mark.parametrize(
    ("loss", "shapes", "select"),
    [
        (chain, [(5, 12, 12), (12, 2, 5)], [ROWS, VIEW(0, (1, 2))]),
        *slow((tied, [(30, 12)], ROWS), (grouped, [(4, 12, 8), (4, 8, 12)], ROWS)),
    ],
)
def test_what_is_saved_is_what_the_programs_differ_in(loss, shapes, select, side):
    """The products in the program of `jax.grad`, less those in that of the cores."""
    rows = explained(loss, *shapes, select=select, side=side, args=(X,))
    params = {row.path: jnp.ones(row.shape) for row in rows}
    select = dict(zip(params, select, strict=True)) if isinstance(select, list) else select
    tx = natgalore.project(RANK, optax.identity(), select=select, side=side)
    opt_state, x = tx.init(params), jnp.ones(X.shape)
    of = lambda params: loss(x, *params.values())
    run = lambda params: backward(of, params, False, (), {})[0](bases_of([opt_state]))
    whole, cores = (dots(jax.make_jaxpr(f)(params).jaxpr) for f in (jax.grad(of), run))
    lowered = sum(projecting(P.spec) for P in bases_in(opt_state.basis))
    assert sum(row.whole_flops - row.here_flops for row in rows) == whole - cores + lowered


def test_what_the_page_prints_is_what_it_is(capsys):
    page = (Path(__file__).parents[2] / "docs/low-rank-gradients.md").read_text()
    section = page.split("## What each weight costs")[1]
    code, printed = (
        re.search(rf"```{kind}\n(.*?)```", section, re.S)[1] for kind in ("python", "text")
    )
    exec(code, {})
    assert capsys.readouterr().out == printed


# --- models, and what is printed ------------------------------------------------------------------


def llama_explained(config, tx):
    graph, params = llama.structure(config), llama.abstract_params(config)
    loss = lambda params, tokens: llama.next_token_loss(nnx.merge(graph, params), tokens)
    opt_state = jax.eval_shape(tx.init, params)
    return natgalore.explain(loss, tx)(params, opt_state, abstract(8, 257, dtype=jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_llama_of_350m(scan):
    """All matrices of its layers are cores, and the table has a line for each kind of them."""
    config = dataclasses.replace(llama.CONFIGS["350m"], scan=scan, remat=scan)
    found = llama_explained(
        config, natgalore.natural_galore(1e-3, rank=256, fisher="core", residual=None)
    )
    layers = [
        row for row in found.rows if row.path.startswith("layers/") and "norm" not in row.path
    ]
    assert len(layers) == (7 if scan else 7 * 24)
    assert all(row.core for row in layers)
    up = [row for row in layers if row.path.endswith("up/kernel")]
    m, n, r, tokens = 1024, 2736, 256, 8 * 256
    assert sum(row.whole_flops for row in up) == 24 * (2 * tokens * m * n + 2 * m * n * r)
    assert sum(row.here_flops for row in up) == 24 * 2 * tokens * r * (m + n)
    assert sum(row.here_bytes for row in up) == 24 * r * n * FLOAT
    kernels = "layers/mlp/up/kernel " if scan else "layers/*/mlp/up/kernel (24) "
    assert kernels in str(found)
    assert len(str(found).splitlines()) == 12 + 2


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


# 2·100·64·256 + 2·64·256·16 and 2·100·16·(64 + 256), twice; 2·100·256·10; cores of 16 x 256.
TABLE = """\
weight      used by      gradient                   whole      here  FLOPs whole  FLOPs here
bias        add          whole: a bias               40 B      40 B            0           0
head        dot_general  whole: an output head   10.0 KiB  10.0 KiB      512.0 k     512.0 k
layer* (2)  dot_general  core                   128.0 KiB  32.0 KiB        7.6 M       2.0 M
total                                           138.0 KiB  42.0 KiB        8.1 M       2.6 M
"""


def test_the_table():
    assert str(small()) == TABLE.rstrip()


def test_rich_shows_the_same_and_fits_the_screen():
    console = Console(width=80, record=True)
    console.print(small())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("layer*", "core", "bias", "head"):
        assert word in text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (2_340_000, "2.3 M"), (7e18, "7000.0 P")],
)
def test_human_count(n, text):
    assert human_count(n) == text


def test_static_arguments_stay_as_they_are():
    """`power` decides what the program is; it is no array."""
    params = {"w": abstract(12, 8)}
    tx = natgalore.galore(1e-3, rank=3)

    def loss(params, x, *, power):
        return jnp.sum(x @ params["w"]) if power == "one" else jnp.sum(params["w"] ** 2)

    opt_state = tx.init({"w": jnp.ones((12, 8))})
    (row,) = natgalore.explain(loss, tx)(params, opt_state, X, power="one").rows
    assert row.operations == {"dot_general": 1}


def test_refusals():
    params = {"w": abstract(12, 8)}
    tx, other = natgalore.galore(1e-3, rank=3), natgalore.galore(1e-3, rank=4)
    opt_state = jax.eval_shape(tx.init, params)
    pair = lambda params: (jnp.sum(params["w"]), params["w"])
    refused = [
        (pair, tx, "real number, got .*float32.*has_aux"),
        (lambda params: params["w"], tx, r"real number, got float32\[12, 8\]"),
        (lambda params: 1, tx, "real number, got"),
        (lambda params: jnp.sum(params["w"]), other, "not a state of `tx`"),
    ]
    for loss, tx, why in refused:
        with pytest.raises(ValueError, match=why) as error:
            natgalore.explain(loss, tx)(params, opt_state)
        assert "\n" not in str(error.value)
