"""Plans: bytes by hand, ranks that fit where the next do not, and the command line."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from rich.console import Console

import natgalore_jax as natgalore
from examples.common import llama
from natgalore_jax.planning import model_shapes as shapes
from natgalore_jax.planning.byte_counts import byte_count_of, temporaries
from natgalore_jax.planning.cli import main
from natgalore_jax.planning.rank_candidates import largest_that_fits, rules
from natgalore_jax.planning.spectra import shares, smallest_rank
from natgalore_jax.reporting.memory_report import nbytes
from natgalore_jax.tree.leaf_spec import LeafSpec
from natgalore_jax.util.validation import check_bytes
from tests.helpers.cases import slow


F32, BF16 = jnp.float32, jnp.bfloat16
MIB = 2**20


def tree(m=64, n=256, dtype=F32, stack=()):
    """Two kernels, of which one lies the other way, an embedding and a norm."""
    of = lambda name, *shape: {name: jax.ShapeDtypeStruct(shape, dtype)}
    return {
        "embed": of("embedding", 99, m),
        "up": of("kernel", *stack, m, n),
        "down": of("kernel", *stack, n, m),
        "norm": of("scale", m),
    }


def arrays(params, seed=0):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def held(state):
    return sum(map(nbytes, jax.tree.leaves(state)))


# --- Bytes ----------------------------------------------------------------------------------------


def by_hand(m, n, r, width, bits):
    """Weights, gradients and state of `tree` at rank r, in weights of `width` bytes."""
    whole = 99 * m + m
    weights = width * (whole + 2 * m * n)
    gradients = width * whole + 4 * 2 * r * n  # cores are float32
    # Each leaf counts what it skips, each kernel its refreshes; there are the projection's count
    # and format, and Adam's count.
    counts = 4 * (4 + 2 + 3)
    if bits == 32:
        return weights, gradients, 2 * 4 * whole + 2 * 4 * (r * m + 2 * r * n) + counts
    coded = lambda numbers: numbers + 4 * numbers // 32  # the block of axes of 32, 128 and 256
    arrays = 2 * coded(99 * m) + 2 * 4 * m + 2 * (2 * coded(r * n) + coded(r * m))
    return weights, gradients, arrays + counts + 8  # and a key of two words


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bytes_are_those_by_hand(dtype, bits):
    planned = natgalore.plan(tree(128, dtype=dtype), rank=32, bits=bits)
    expected = by_hand(128, 256, 32, jnp.dtype(dtype).itemsize, bits)
    assert tuple(planned.bytes.values()) == expected
    assert planned.bytes.keys() == {"weights", "gradients", "state"}
    assert planned.total == sum(expected)
    assert planned.fits
    whole = natgalore.plan(tree(128, dtype=dtype), rank=32, bits=bits, low_rank_gradients=False)
    assert whole.bytes == planned.bytes | {"gradients": planned.bytes["weights"]}
    assert (planned.settings["stagger"], whole.settings["stagger"]) == (False, True)


@pytest.mark.parametrize(
    ("budget", "rank"),
    [(240_163, 1), *slow((246_819, 1), (246_820, 2), ("450kB", 32), ("1MB", 64))],
)
def test_the_largest_fraction_that_fits_by_hand(budget, rank):
    """Of 64 candidates, each of which takes 6656 bytes more than the one before it."""
    planned = natgalore.plan(tree(), budget, bits=32, multiple=1)
    assert planned.rank == rank
    assert planned.total == sum(by_hand(64, 256, rank, 4, 32))
    assert planned.fits == (budget != 240_163)


shape_lists = st.lists(
    st.sampled_from([(64, 128), (128, 64), (24, 100), (12, 8)]), min_size=1, max_size=3
)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    sizes=shape_lists,
    share=st.floats(0.2, 1.2),
    bits=st.sampled_from([8, 32]),
    side=st.sampled_from(["short", "long", "both"]),
    low=st.booleans(),
    multiple=st.sampled_from([5, 16]),
)
def test_a_plan_fits_and_the_next_candidate_does_not(sizes, share, bits, side, low, multiple):
    params = {f"w{i}": {"kernel": jax.ShapeDtypeStruct(s, F32)} for i, s in enumerate(sizes)}
    planning = functools.partial(
        natgalore.plan,
        params,
        bits=bits,
        side=side,
        low_rank_gradients=low,
        multiple=multiple,
    )
    budget = int(share * planning(rank=1.0).total)
    planned = planning(budget)
    assert planned.bytes["state"] == held(jax.eval_shape(planned.optimizer(1e-3).init, params))
    assert planned.fits == (planned.total <= budget)
    rank = {row.path: row.rank for row in planned.rows}

    def candidate(i):
        nearest = lambda short: multiple * int(i / 64 * short / multiple + 0.5)
        short = {f"w{i}/kernel": min(s) for i, s in enumerate(sizes)}
        return {name: min(max(multiple, nearest(s)), s) for name, s in short.items()}

    candidates = [candidate(i) for i in range(1, 65)]
    assert rank in candidates
    if not planned.fits:
        assert rank == candidates[0]
    elif larger := candidates[[i for i, x in enumerate(candidates) if x == rank][-1] + 1 :]:
        assert planning(rank=rules(larger[0])).total > budget


@pytest.mark.parametrize(
    ("recipe", "bits"), [(natgalore.galore, 8), *slow((natgalore.natural_galore, 32))]
)
def test_bytes_are_those_of_the_arrays_of_a_step(recipe, bits):
    """Of the state that is made, and of the gradients that come."""
    params = arrays({"up": tree(128, dtype=BF16)["up"], "norm": tree(128)["norm"]})
    planned = natgalore.plan(params, rank=32, bits=bits, recipe=recipe)
    tx = planned.optimizer(1e-3, weight_decay=0.1)
    state = tx.init(params)
    assert held(state) == planned.bytes["state"]
    loss = lambda p, x: jnp.square(x @ p["up"]["kernel"]).mean() + p["norm"]["scale"].sum()
    (_, grads), after = jax.eval_shape(
        natgalore.value_and_grad(loss, tx), params, state, jnp.ones((4, 128), BF16)
    )
    assert held(grads) == planned.bytes["gradients"]
    assert held(after) == planned.bytes["state"]
    assert held(params) == planned.bytes["weights"]


def test_a_schedule_keeps_a_count():
    planned = natgalore.plan(tree(128), rank=32)
    tx = planned.optimizer(optax.constant_schedule(1e-3))
    assert held(jax.eval_shape(tx.init, tree(128))) == planned.bytes["state"] + 4


@pytest.mark.slow
def test_bytes_by_dtype_and_what_is_reserved():
    planned = natgalore.plan(tree(128, dtype=BF16), "400kB", reserve="100kB")
    assert planned.dtypes["reserved"] == {"as asked": 100_000}
    assert planned.fits
    assert planned.total <= 400_000
    assert planned.bytes == {kind: sum(x.values()) for kind, x in planned.dtypes.items()}
    rank = planned.rank
    assert planned.dtypes["gradients"] == {
        "float32": 4 * 2 * rank * 256,
        "bfloat16": 2 * (99 * 128 + 128),
    }
    assert {"int8", "uint8", "float32", "int32", "uint32"} == planned.dtypes["state"].keys()
    assert natgalore.plan(tree(128, dtype=BF16), "300kB").rank == rank


def test_packed_weights_are_counted_as_they_are_packed():
    params = {"up": tree()["up"], "table": jax.ShapeDtypeStruct((7, 3), jnp.int4)}
    (table, up) = natgalore.plan(params, rank=8).rows
    assert (table.weights, table.gradients, table.state) == (11, 0, 2 * 11 + 4)
    assert up.why == ""
    assert "int4" in table.why


# --- Ranks ----------------------------------------------------------------------------------------


def test_ranks_of_several_shapes_are_one_fraction():
    params = {
        "a": {"0": tree(64)["up"], "1": tree(64)["up"]},
        "b": {"kernel": jax.ShapeDtypeStruct((400, 160), F32)},
    }
    half = 1 / 2 * sum(natgalore.plan(params, rank=r, bits=32).total for r in (0.5, 0.5))
    planned = natgalore.plan(params, half, bits=32)
    assert planned.rank == [(r"^a/\d+/kernel$", 32), (r"^b/kernel$", 80)]
    tx = planned.optimizer(1e-3)
    rows = natgalore.describe(tx, params).rows
    assert [row.rank for row in rows] == [32, 32, 80]
    same = natgalore.galore(1e-3, rank=planned.rank)
    assert [row.rank for row in natgalore.describe(same, params).rows] == [32, 32, 80]


def test_rules_say_what_they_are_made_of():
    assert rules({}) == 1
    assert rules({"a": 3, "b": 3}) == 3
    said = rules({"x/0": 3, "x/1": 4, "x.y/2/w": 5, "x.y/10/w": 5})
    assert said == [("^x/0$", 3), ("^x/1$", 4), (r"^x\.y/\d+/w$", 5)]


@given(st.integers(0, 70), st.integers(0, 70))
def test_the_search_ends_where_the_next_does_not_fit(count, until):
    asked = []
    found = largest_that_fits(count, lambda i: asked.append(i) or i < until)
    assert found == max(0, min(until, count) - 1)
    assert len(asked) == len({*asked}) <= 7


def gradient(m, n, sizes, seed=0):
    """With the given singular values."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(k, len(sizes))))[0] for k in (m, n))
    return jnp.asarray((U * np.asarray(sizes)) @ V.T, F32)


SIZES = [4.0, 2.0, 1.0, 1.0, 0.5]  # squares 16, 4, 1, 1, 0.25 of 22.25


def test_shares_are_those_of_the_singular_values():
    spec = LeafSpec(("w",), (20, 12), (), (0,), (1,), rank=1)
    expected = np.cumsum(np.square(SIZES)) / 22.25
    found = shares(spec, [gradient(20, 12, SIZES)])
    assert found.shape == (1, 12)
    np.testing.assert_allclose(found[0, :5], expected, rtol=1e-6)  # of float32 gradients
    np.testing.assert_allclose(found[0, 5:], 1, rtol=1e-6)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_shares_are_held_by_the_best_basis(both, scale):
    """Of several gradients of stacked matrices, against NumPy's SVD of all side by side."""
    spec = LeafSpec(("w",), (6, 3, 9), (1,), (0,), (2,), rank=1, both=both)
    grads = [scale * jax.random.normal(jax.random.key(i), spec.shape) for i in range(3)]
    found = shares(spec, grads)
    for i in range(3):
        each = [np.float64(G)[:, i] / scale for G in grads]
        held = []
        for matrices in (each, [G.T for G in each]) if both else (each,):
            squares = np.linalg.svd(np.hstack(matrices), compute_uv=False) ** 2
            held.append(np.cumsum(squares)[:6] / squares.sum())
        np.testing.assert_allclose(found[i], np.min(held, axis=0), rtol=1e-6)


def test_shares_of_nothing_and_of_what_is_not_finite():
    spec = LeafSpec(("w",), (4, 6), (), (0,), (1,), rank=1)
    assert (shares(spec, [jnp.zeros((4, 6))]) == 1).all()
    with pytest.raises(ValueError, match=r"^`grads` is not finite in `w`"):
        shares(spec, [jnp.full((4, 6), jnp.inf)])
    with pytest.raises(ValueError, match=r"^`grads` has shape \(6, 4\) for `w`, whose shape is"):
        shares(spec, [jnp.zeros((6, 4))])


@pytest.mark.parametrize(
    ("target", "rank"), [(0.5, 1), (0.72, 2), (0.9, 3), (0.95, 4), (0.999, 5), (1.0, 5)]
)
def test_the_least_rank_that_holds_a_share(target, rank):
    held = np.cumsum(np.square(SIZES)) / 22.25  # 0.719, 0.899, 0.944, 0.989, 1
    assert smallest_rank(held[None], target) == rank
    slower = np.linspace(0.2, 0.99, 5)  # never quite
    expected = max(rank, int((slower < target).sum()) + 1)
    assert smallest_rank(np.stack([held, slower]), target) == min(expected, 5)


class TestEnergy:
    """Of one matrix that 5 directions hold unevenly, and one of 10 equal directions."""

    @property
    def grads(self):
        return {
            "a": {"kernel": gradient(16, 40, SIZES)},
            "b": {"kernel": gradient(40, 16, np.ones(10))},
        }

    @property
    def params(self):
        return jax.tree.map(jnp.zeros_like, self.grads)

    def test_each_leaf_has_the_rank_that_it_needs(self):
        planned = natgalore.plan(self.params, energy=0.9, grads=self.grads, multiple=1)
        assert [row.rank for row in planned.rows] == [3, 9]
        np.testing.assert_allclose([row.energy for row in planned.rows], [21 / 22.25, 0.9])
        rounded = natgalore.plan(self.params, energy=0.9, grads=self.grads)
        assert [row.rank for row in rounded.rows] == [8, 16]

    @pytest.mark.slow
    def test_what_it_promises_is_explained(self):
        """By the bases of an optimizer that has seen these gradients."""
        planned = natgalore.plan(
            self.params, energy=0.95, grads=self.grads, multiple=1, bits=32, basis="svd"
        )
        tx = planned.optimizer(1e-3)
        _, state = tx.update(self.grads, tx.init(self.params), self.params)
        energy = natgalore.explained_energy(state, self.grads)
        for row in planned.rows:
            np.testing.assert_allclose(energy[row.path], row.energy, rtol=1e-5)
            assert row.energy >= 0.95

    def test_several_gradients_need_a_basis_of_all(self):
        twice = [self.grads, jax.tree.map(lambda G: jnp.flip(G, 0), self.grads)]
        ranks = [
            row.rank
            for row in natgalore.plan(self.params, energy=0.9, grads=twice, multiple=1).rows
        ]
        assert ranks[0] > 3
        same = natgalore.plan(self.params, energy=0.9, grads=[self.grads] * 3, multiple=1)
        assert [row.rank for row in same.rows] == [3, 9]

    def test_a_budget_lowers_the_share(self):
        planning = functools.partial(
            natgalore.plan, self.params, energy=1.0, grads=self.grads, multiple=1, bits=32
        )
        full = planning()
        assert [row.rank for row in full.rows] == [5, 10]
        planned = planning(full.total - 1)
        assert planned.fits
        assert planned.total < full.total
        lowest = min(row.energy for row in planned.rows)
        assert 0.5 < lowest < 1
        none = planning(1)
        assert not none.fits
        assert [row.rank for row in none.rows] == [1, 1]

    def test_gradients_are_shown_for_ranks_that_are_given(self):
        planned = natgalore.plan(self.params, rank=2, grads=self.grads)
        np.testing.assert_allclose([row.energy for row in planned.rows], [20 / 22.25, 0.2])
        head, first, *_ = str(planned).splitlines()
        assert head.split()[-4:] == ["energy", "weights", "gradients", "state"]
        assert first.split()[3:5] == ["2", "0.899"]


# --- Steps ----------------------------------------------------------------------------------------


def training_step(tx):
    def loss(params, x):
        y = x @ params["up"]["kernel"]
        return jnp.square(y).mean()

    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_a_compiled_step_says_what_it_holds():
    params, x = {"up": tree()["up"]}, jax.ShapeDtypeStruct((512, 64), F32)
    planned = natgalore.plan(params, rank=16, bits=32, step=training_step, batch=(x,))
    tx = planned.optimizer(1.0)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(training_step(tx), donate_argnums=(0, 1)).lower(params, state, x).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == held(params) + held(state)
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert beside < 100  # of a tuple
    assert planned.bytes == {
        "weights": held(params),
        "state": held(state),
        "temporaries": memory.temp_size_in_bytes + beside + held(x),
    }
    assert planned.bytes["temporaries"] >= 4 * 512 * 256  # y
    assert "gradients" not in planned.bytes
    assert planned.rows[0].gradients == 4 * 16 * 256
    assert "not counted" not in str(planned)


def test_what_a_step_does_not_donate_it_holds_twice():
    params, x = {"up": tree()["up"]}, jax.ShapeDtypeStruct((8, 64), F32)
    tx = natgalore.galore(1.0, 16)
    state = jax.eval_shape(tx.init, params)
    kept = jax.jit(training_step(tx))
    memory = kept.lower(params, state, x).compile().memory_analysis()
    beside = memory.output_size_in_bytes - held(params) - held(state)
    assert 0 <= beside < 100  # of a tuple
    assert temporaries(kept, params, state, x) == (
        held(params) + held(state) + memory.temp_size_in_bytes + held(x) + beside
    )


@pytest.mark.slow
def test_ranks_are_lower_where_the_step_needs_room():
    params, x = {"up": tree()["up"]}, jax.ShapeDtypeStruct((64, 64), F32)
    planning = functools.partial(natgalore.plan, params, bits=32, multiple=16)
    alone = planning("280KiB")
    with_step = planning("280KiB", step=training_step, batch=(x,))
    assert (alone.fits, with_step.fits) == (True, True)
    assert with_step.rank < alone.rank
    assert with_step.total <= 280 * 1024


# --- What is printed ------------------------------------------------------------------------------


def test_the_table_and_the_verdict():
    params = {"layers": {str(i): tree(128, dtype=BF16) for i in range(3)}}
    planned = natgalore.plan(params, "1MiB", rank=32)
    lines = str(planned).splitlines()
    (up,) = [line for line in lines if line.startswith("layers/*/up/kernel (3)")]
    assert up.split("  ")[0] == "layers/*/up/kernel (3)"
    assert f" {planned.rank} " in up
    (total,) = [line for line in lines if line.startswith("total")]
    assert total.split()[1:3] == ["0.5", "MiB"] or total.split()[2] in ("KiB", "MiB")
    assert any(line.startswith("gradients: ") and "bfloat16" in line for line in lines)
    assert lines[-3].startswith("optimizer: quantized(galore(learning_rate, rank=")
    spare = MIB - planned.total
    assert lines[-1] == (
        f"fits in 1.0 MiB: {planned.total / 1024:.1f} KiB, {spare / 1024:.1f} KiB left for "
        "activations, decoded state and other temporaries, which are not counted"
    )
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(planned)
    assert lines[-1] in captured.get()
    assert "layers/*/up/kernel (3)" in captured.get()


@pytest.mark.slow
def test_what_does_not_fit_is_said_and_what_helps():
    params = tree(128)
    planned = natgalore.plan(params, "100KiB", bits=32, low_rank_gradients=False)
    assert not planned.fits
    assert planned.rank == 8
    less = natgalore.plan(params, rank=8, bits=32).total
    assert planned.savings["low_rank_gradients=True"] == planned.total - less
    halved = natgalore.plan(tree(128, dtype=BF16), rank=8, bits=32, low_rank_gradients=False)
    assert planned.savings["weights in bfloat16"] == planned.total - halved.total
    eight = natgalore.plan(params, rank=8, low_rank_gradients=False)
    assert planned.savings["bits=8"] == planned.total - eight.total
    assert (
        planned.savings["the state in the host's memory, by natgalore.offload"]
        == (planned.bytes["state"])
    )
    assert "does not fit in 100.0 KiB: " in str(planned)
    assert "KiB too much" in str(planned)
    assert "; what helps: bits=8 (" in str(planned)
    smallest = natgalore.plan(tree(128, dtype=BF16), 1, rank=8)
    assert smallest.savings.keys() == {"the state in the host's memory, by natgalore.offload"}
    residual = natgalore.plan(
        params, 1, rank=8, bits=32, low_rank_gradients=False, residual="isotropic"
    )
    assert "low_rank_gradients=True" not in residual.savings
    by_default = natgalore.plan(
        params, 1, rank=8, bits=32, low_rank_gradients=False, recipe=natgalore.natural_galore
    )
    assert "low_rank_gradients=True" not in by_default.savings


def test_it_says_where_adamw_fits():
    adamw = 4 * held(tree()) + 4
    for budget in (adamw, adamw - 1):
        planned = natgalore.plan(tree(), budget, rank=8, bits=32)
        assert planned.adamw == adamw
        assert (", which fits too" in str(planned)) == (budget == adamw)


def test_a_tree_that_is_not_projected_has_a_plan_too():
    planned = natgalore.plan({"norm": tree()["norm"]}, "1kB")
    assert planned.rows[0].why == "a norm"
    assert planned.rank == 1


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, r"^`plan` needs a `budget`, an `energy` or a `rank`"),
        ({"budget": "24XB"}, r"^`budget` must be a number of bytes or a text .* got '24XB'"),
        ({"budget": -1}, r"^`budget` must be a number of bytes"),
        ({"budget": 1, "reserve": "much"}, r"^`reserve` must be a number of bytes"),
        ({"budget": 1, "bits": 4}, r"^`bits` must be one of 8, 32, got 4"),
        ({"budget": 1, "multiple": 0}, r"^`multiple` must be in \[1"),
        ({"budget": 1, "side": "up"}, r"^`side` must be one of"),
        ({"budget": 1, "residual": "fira"}, r"^`residual` needs whole gradients"),
        ({"rank": 8, "energy": 0.9}, r"^`rank` and `energy` both say"),
        ({"energy": 0.9}, r"^`energy` is that of `grads`"),
        ({"energy": 1.1, "grads": tree()}, r"^`energy` is a share, at most 1, got 1.1"),
        ({"energy": 0.0, "grads": tree()}, r"^`energy` must be above 0"),
        ({"energy": 0.9, "grads": []}, r"^`grads` must have the structure of `params`"),
        ({"energy": 0.9, "grads": [tree(), {}]}, r"^`grads` must have the structure of `params`"),
        ({"rank": 0}, r"^`rank` must be in \[1"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ValueError, match=match):
        natgalore.plan(tree(), **settings)


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("22GiB", 22 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 kib", 1536),
        ("2TB", 2 * 10**12),
        ("7", 7),
        ("3 MB", 3_000_000),
        (2.5e3, 2500),
        (1e22, 10**22),
        (0, 0),
    ],
)
def test_bytes_as_people_say_them(said, count):
    assert check_bytes("budget", said) == count


@pytest.mark.parametrize("said", ["", "GB", "1.2.3GB", "5 gigs", True, None, float("nan"), "-1"])
def test_what_is_no_number_of_bytes(said):
    with pytest.raises(ValueError, match=r"^`budget` must be a number of bytes or a text such as"):
        check_bytes("budget", said)


# --- Shapes and the command line ------------------------------------------------------------------


@pytest.mark.parametrize("size", shapes.LLAMA)
def test_the_papers_models_are_those_of_the_examples(size):
    scanned = dataclasses.replace(llama.CONFIGS[size], scan=True)
    assert shapes.llama(size) == llama.abstract_params(scanned)


def test_files_of_shapes(tmp_path):
    plain = tmp_path / "shapes.json"
    plain.write_text('{"up/kernel": [64, 256], "norm/scale": [[64], "float32"], "scalar": []}')
    expected = {
        "up": {"kernel": jax.ShapeDtypeStruct((64, 256), BF16)},
        "norm": {"scale": jax.ShapeDtypeStruct((64,), F32)},
        "scalar": jax.ShapeDtypeStruct((), BF16),
    }
    assert shapes.read_shapes([plain], "bfloat16") == expected
    named = {
        "__metadata__": {"format": "pt"},
        "model.up.weight": {"dtype": "BF16", "shape": [256, 64], "data_offsets": [0, 32768]},
        "model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [32768, 33024]},
    }
    header = tmp_path / "header.json"
    header.write_text(json.dumps(named))
    whole = tmp_path / "model.safetensors"
    text = json.dumps(named).encode()
    whole.write_bytes(len(text).to_bytes(8, "little") + text + bytes(33024))
    tensors = {
        "model.up.weight": jax.ShapeDtypeStruct((256, 64), BF16),
        "model.norm.weight": jax.ShapeDtypeStruct((64,), F32),
    }
    for path in (header, whole):
        assert shapes.read_shapes([path]) == tensors
    assert shapes.read_shapes([plain, whole], "bfloat16") == expected | tensors


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "must hold a JSON object, name -> shape"),
        ("{", "is neither JSON nor a .safetensors file"),
        ('{"metadata": {}, "weight_map": {"w": "a.safetensors"}}', "is an index: .* no shapes"),
        ('{"w": 3}', "'w' must have a shape, a list of sizes, got 3"),
        ('{"w": [3, -1]}', "'w' must have a shape"),
        ('{"w": [3, true]}', "'w' must have a shape"),
        ('{"w": {"dtype": "F32"}}', "'w' must have a shape"),
        ('{"w": [[3], "f33"]}', "'w' has a dtype that is not known, 'f33'"),
        ('{"w": [[3], 7]}', "'w' has a dtype that is not known, 7"),
        ('{"w": [3], "w/b": [3]}', "'w/b' is within what is a leaf too"),
        ('{"w/b": [3], "w": [3]}', "'w' is there twice"),
        ("{}", "no shape is named"),
    ],
)
def test_files_that_hold_no_shapes(tmp_path, capsys, text, match):
    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        shapes.read_shapes([path])
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--shapes", str(path), "--budget", "1GB"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_is_no_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"is neither JSON nor a .safetensors file: a header of"):
        shapes.read_shapes([path])


def test_the_command_prints_a_plan(capsys):
    assert main(["plan", "--model", "60m", "--rank", "128", "--budget", "300MB"]) == 0
    params = shapes.llama("60m", "bfloat16")
    planned = natgalore.plan(params, "300MB", rank=128, side="short")
    assert capsys.readouterr().out == f"{planned}\n"


def test_the_command_has_settings(tmp_path, capsys):
    path = tmp_path / "shapes.json"
    path.write_text('{"up/kernel": [64, 256]}')
    words = "--budget 70KiB --reserve 1KiB --dtype float32 --bits 32 --whole-gradients"
    words += " --recipe natural_galore --side long --multiple 32"
    assert main(["plan", "--shapes", str(path), *words.split()]) == 1
    planned = natgalore.plan(
        {"up": tree()["up"]},
        "70KiB",
        reserve=1024,
        bits=32,
        low_rank_gradients=False,
        recipe=natgalore.natural_galore,
        side="long",
        multiple=32,
    )
    assert capsys.readouterr().out == f"{planned}\n"
    assert main(["plan", "--shapes", str(path), "--rank", "0.25"]) == 0
    assert "rank=0.25" in capsys.readouterr().out
    assert main(["plan", "--shapes", str(path), "--rank", "24"]) == 0
    assert "rank=24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model 60m", "one of the arguments --budget --rank is required"),
        ("--budget 1GB", "one of the arguments --model --shapes is required"),
        ("--model 60m --shapes x --rank 8", "not allowed with argument --model"),
        ("--model 9b --rank 8", "invalid choice: '9b'"),
        ("--model 60m --rank many", "'many' is no number"),
        ("--model 60m --rank 1.5", "`rank` of a leaf is 1.5"),
        ("--model 60m --rank 8 --dtype f33", "no dtype is called 'f33'"),
        ("--model 60m --budget 24XB", "`budget` must be a number of bytes"),
        ("--shapes no.json --rank 8", "No such file or directory: 'no.json'"),
    ],
)
def test_bad_words_are_one_line_and_status_2(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *words.split()])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("python -m natgalore_jax plan: error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not captured.out


@pytest.mark.parametrize(("words", "said"), [([], "plan"), (["plan"], "--budget BYTES")])
def test_help_helps(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_the_module_runs():
    command = [sys.executable, "-m", "natgalore_jax", "plan", "--model", "7b", "--budget", "24GiB"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "fits in 24.0 GiB" in ran.stdout


def test_a_bill_of_any_optimizer():
    bill = byte_count_of(optax.sgd(1.0), tree())
    assert bill.bytes == {"weights": held(tree()), "gradients": held(tree()), "state": 0}
    assert {row.why for row in bill.rows} == {"not given to natgalore"}


def test_a_recipe_leaves_its_residual_out_where_gradients_are_cores():
    """As value_and_grad asks of it; the optimizer that is counted is one that it takes."""
    params = {"up": {"kernel": jnp.ones((64, 256))}}
    planned = natgalore.plan(params, rank=8, bits=32, recipe=natgalore.natural_galore)
    assert planned.settings["residual"] is None
    tx = planned.optimizer(1e-3)
    loss = lambda params, x: jnp.sum((x @ params["up"]["kernel"]) ** 2)
    natgalore.value_and_grad(loss, tx)(params, tx.init(params), jnp.ones((4, 64)))
    whole = natgalore.plan(
        params, rank=8, bits=32, recipe=natgalore.natural_galore, low_rank_gradients=False
    )
    assert "residual" not in whole.settings
