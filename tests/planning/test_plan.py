"""plan: bytes against hand counts, chosen ranks, compiled steps, the printed table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from rich.console import Console

import natgalore_jax as natgalore
from natgalore_jax.planning.byte_counts import byte_count_of, temporaries
from natgalore_jax.planning.rank_candidates import rules
from natgalore_jax.reporting.memory_report import nbytes
from tests.helpers.cases import slow

from .known_spectrum import SIZES, gradient


F32, BF16 = jnp.float32, jnp.bfloat16
MIB = 2**20


def tree(m=64, n=256, dtype=F32, stack=()):
    """Params with two kernels, one the transposed shape of the other, an embedding and a norm."""
    param = lambda name, *shape: {name: jax.ShapeDtypeStruct(shape, dtype)}
    return {
        "embed": param("embedding", 99, m),
        "up": param("kernel", *stack, m, n),
        "down": param("kernel", *stack, n, m),
        "norm": param("scale", m),
    }


def arrays(params, seed=0):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def bytes_in(tree):
    return sum(map(nbytes, jax.tree.leaves(tree)))


# --- Bytes ----------------------------------------------------------------------------------------


def by_hand(m, n, r, width, bits):
    """Weights, gradients and state of `tree` at rank r, in weights of `width` bytes."""
    unprojected = 99 * m + m
    weights = width * (unprojected + 2 * m * n)
    gradients = width * unprojected + 4 * 2 * r * n  # cores are float32
    # Skipped steps of 4 leaves, refreshes of 2 kernels; the projection's count and format version,
    # Adam's count.
    counts = 4 * (4 + 2 + 3)
    if bits == 32:
        return weights, gradients, 2 * 4 * unprojected + 2 * 4 * (r * m + 2 * r * n) + counts
    coded = lambda numbers: numbers + 4 * numbers // 32  # blocks of 32 divide 32, 128 and 256
    arrays = 2 * coded(99 * m) + 2 * 4 * m + 2 * (2 * coded(r * n) + coded(r * m))
    return weights, gradients, arrays + counts + 8  # and a key of two words


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bytes_against_a_hand_count(dtype, bits):
    planned = natgalore.plan(tree(128, dtype=dtype), rank=32, bits=bits)
    expected = by_hand(128, 256, 32, jnp.dtype(dtype).itemsize, bits)
    assert tuple(planned.bytes.values()) == expected
    assert planned.bytes.keys() == {"weights", "gradients", "state"}
    assert planned.total == sum(expected)
    assert planned.fits
    full = natgalore.plan(tree(128, dtype=dtype), rank=32, bits=bits, low_rank_gradients=False)
    assert full.bytes == planned.bytes | {"gradients": planned.bytes["weights"]}
    assert (planned.settings["stagger"], full.settings["stagger"]) == (False, True)


@pytest.mark.parametrize(
    ("budget", "rank"),
    [(240_163, 1), *slow((246_819, 1), (246_820, 2), ("450kB", 32), ("1MB", 64))],
)
def test_largest_fitting_fraction_against_a_hand_count(budget, rank):
    """64 candidates, each 6656 bytes larger than the previous one."""
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
def test_plan_fits_and_next_candidate_does_not(sizes, share, bits, side, low, multiple):
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
    assert planned.bytes["state"] == bytes_in(jax.eval_shape(planned.optimizer(1e-3).init, params))
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
def test_bytes_against_the_arrays_of_a_step(recipe, bits):
    """Counts the shapes of tx.init, value_and_grad and the returned state."""
    params = arrays({"up": tree(128, dtype=BF16)["up"], "norm": tree(128)["norm"]})
    planned = natgalore.plan(params, rank=32, bits=bits, recipe=recipe)
    tx = planned.optimizer(1e-3, weight_decay=0.1)
    state = jax.eval_shape(tx.init, params)
    assert bytes_in(state) == planned.bytes["state"]
    loss = lambda p, x: jnp.square(x @ p["up"]["kernel"]).mean() + p["norm"]["scale"].sum()
    (_, grads), after = jax.eval_shape(
        natgalore.value_and_grad(loss, tx), params, state, jnp.ones((4, 128), BF16)
    )
    assert bytes_in(grads) == planned.bytes["gradients"]
    assert bytes_in(after) == planned.bytes["state"]
    assert bytes_in(params) == planned.bytes["weights"]


def test_schedule_adds_a_count_to_the_state():
    planned = natgalore.plan(tree(128), rank=32)
    tx = planned.optimizer(optax.constant_schedule(1e-3))
    assert bytes_in(jax.eval_shape(tx.init, tree(128))) == planned.bytes["state"] + 4


@pytest.mark.slow
def test_bytes_by_dtype_and_reserve():
    planned = natgalore.plan(tree(128, dtype=BF16), "400kB", reserve="100kB")
    assert planned.dtypes["reserved"] == {"as requested": 100_000}
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


def test_int4_weights_are_counted_packed():
    params = {"up": tree()["up"], "table": jax.ShapeDtypeStruct((7, 3), jnp.int4)}
    (table, up) = natgalore.plan(params, rank=8).rows
    assert (table.weights, table.gradients, table.state) == (11, 0, 2 * 11 + 4)
    assert up.why == ""
    assert "int4" in table.why


# --- Ranks ----------------------------------------------------------------------------------------


def test_ranks_of_several_shapes_share_one_fraction():
    params = {
        "a": {"0": tree(64)["up"], "1": tree(64)["up"]},
        "b": {"kernel": jax.ShapeDtypeStruct((400, 160), F32)},
    }
    half = natgalore.plan(params, rank=0.5, bits=32).total
    planned = natgalore.plan(params, half, bits=32)
    assert planned.rank == [(r"^a/\d+/kernel$", 32), (r"^b/kernel$", 80)]
    tx = planned.optimizer(1e-3)
    rows = natgalore.describe(tx, params).rows
    assert [row.rank for row in rows] == [32, 32, 80]
    same = natgalore.galore(1e-3, rank=planned.rank)
    assert [row.rank for row in natgalore.describe(same, params).rows] == [32, 32, 80]


class TestEnergy:
    """One matrix with 5 unequal singular values and one with 10 equal ones."""

    @property
    def grads(self):
        return {
            "a": {"kernel": gradient(16, 40, SIZES)},
            "b": {"kernel": gradient(40, 16, np.ones(10))},
        }

    @property
    def params(self):
        return jax.tree.map(jnp.zeros_like, self.grads)

    def test_ranks_per_leaf(self):
        planned = natgalore.plan(self.params, energy=0.9, grads=self.grads, multiple=1)
        assert [row.rank for row in planned.rows] == [3, 9]
        np.testing.assert_allclose([row.energy for row in planned.rows], [21 / 22.25, 0.9])
        rounded = natgalore.plan(self.params, energy=0.9, grads=self.grads)
        assert [row.rank for row in rounded.rows] == [8, 16]

    @pytest.mark.slow
    def test_energy_equals_explained_energy(self):
        """In the bases of an optimizer after one update with these gradients."""
        planned = natgalore.plan(
            self.params, energy=0.95, grads=self.grads, multiple=1, bits=32, basis="svd"
        )
        tx = planned.optimizer(1e-3)
        _, state = tx.update(self.grads, tx.init(self.params), self.params)
        energy = natgalore.explained_energy(state, self.grads)
        for row in planned.rows:
            np.testing.assert_allclose(energy[row.path], row.energy, rtol=1e-5)
            assert row.energy >= 0.95

    def test_several_gradients_share_a_basis(self):
        twice = [self.grads, jax.tree.map(lambda G: jnp.flip(G, 0), self.grads)]
        ranks = [
            row.rank
            for row in natgalore.plan(self.params, energy=0.9, grads=twice, multiple=1).rows
        ]
        assert ranks[0] > 3
        same = natgalore.plan(self.params, energy=0.9, grads=[self.grads] * 3, multiple=1)
        assert [row.rank for row in same.rows] == [3, 9]

    def test_budget_lowers_the_energy(self):
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

    def test_energy_column_of_a_given_rank(self):
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


def test_temporaries_of_a_compiled_step():
    params, x = {"up": tree()["up"]}, jax.ShapeDtypeStruct((512, 64), F32)
    planned = natgalore.plan(params, rank=16, bits=32, step=training_step, batch=(x,))
    tx = planned.optimizer(1.0)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(training_step(tx), donate_argnums=(0, 1)).lower(params, state, x).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == bytes_in(params) + bytes_in(state)
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert beside < 100  # of a tuple
    assert planned.bytes == {
        "weights": bytes_in(params),
        "state": bytes_in(state),
        "temporaries": memory.temp_size_in_bytes + beside + bytes_in(x),
    }
    assert planned.bytes["temporaries"] >= 4 * 512 * 256  # y
    assert "gradients" not in planned.bytes
    assert planned.rows[0].gradients == 4 * 16 * 256
    assert "not counted" not in str(planned)


@pytest.mark.slow
def test_temporaries_lower_the_ranks():
    params, x = {"up": tree()["up"]}, jax.ShapeDtypeStruct((64, 64), F32)
    planning = functools.partial(natgalore.plan, params, bits=32, multiple=16)
    alone = planning("280KiB")
    with_step = planning("280KiB", step=training_step, batch=(x,))
    assert (alone.fits, with_step.fits) == (True, True)
    assert with_step.rank < alone.rank
    assert with_step.total <= 280 * 1024


def test_step_without_donation_counts_outputs_too():
    params, x = {"up": tree()["up"]}, jax.ShapeDtypeStruct((8, 64), F32)
    tx = natgalore.galore(1.0, 16)
    state = jax.eval_shape(tx.init, params)
    kept = jax.jit(training_step(tx))
    memory = kept.lower(params, state, x).compile().memory_analysis()
    beside = memory.output_size_in_bytes - bytes_in(params) - bytes_in(state)
    assert 0 <= beside < 100  # of a tuple
    assert temporaries(kept, params, state, x) == (
        bytes_in(params) + bytes_in(state) + memory.temp_size_in_bytes + bytes_in(x) + beside
    )


def test_byte_count_of_any_optimizer():
    counted = byte_count_of(optax.sgd(1.0), tree())
    assert counted.bytes == {"weights": bytes_in(tree()), "gradients": bytes_in(tree()), "state": 0}
    assert {row.why for row in counted.rows} == {"not given to natgalore"}


def test_low_rank_gradients_drop_the_residual():
    """The counted optimizer is one that value_and_grad accepts."""
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), F32)}}
    planned = natgalore.plan(params, rank=8, bits=32, recipe=natgalore.natural_galore)
    assert planned.settings["residual"] is None
    tx = planned.optimizer(1e-3)
    loss = lambda params, x: jnp.sum((x @ params["up"]["kernel"]) ** 2)
    state, x = jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((4, 64), F32)
    (_, grads), _ = jax.eval_shape(natgalore.value_and_grad(loss, tx), params, state, x)
    assert grads["up"]["kernel"].value.shape == (8, 256)
    full = natgalore.plan(
        params, rank=8, bits=32, recipe=natgalore.natural_galore, low_rank_gradients=False
    )
    assert "residual" not in full.settings


# --- Printed reports ------------------------------------------------------------------------------


def test_table_and_verdict():
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
def test_verdict_and_savings_when_nothing_fits():
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


def test_report_mentions_adamw_if_it_fits():
    adamw = 4 * bytes_in(tree()) + 4
    for budget in (adamw, adamw - 1):
        planned = natgalore.plan(tree(), budget, rank=8, bits=32)
        assert planned.adamw == adamw
        assert (", which fits too" in str(planned)) == (budget == adamw)


def test_plan_of_a_tree_without_matrices():
    planned = natgalore.plan({"norm": tree()["norm"]}, "1kB")
    assert planned.rows[0].why == "a norm"
    assert planned.rank == 1


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, r"^`plan` needs a `budget`, an `energy` or a `rank`"),
        ({"budget": "24XB"}, r"^`budget` must be a number of bytes or a string .* got '24XB'"),
        ({"budget": -1}, r"^`budget` must be a number of bytes"),
        ({"budget": 1, "reserve": "much"}, r"^`reserve` must be a number of bytes"),
        ({"budget": 1, "bits": 4}, r"^`bits` must be one of 8, 32, got 4"),
        ({"budget": 1, "multiple": 0}, r"^`multiple` must be in \[1"),
        ({"budget": 1, "side": "up"}, r"^`side` must be one of"),
        ({"budget": 1, "residual": "whitened"}, r"^`residual` needs full gradients"),
        ({"rank": 8, "energy": 0.9}, r"^`rank` and `energy` both determine"),
        ({"energy": 0.9}, r"^`energy` is a share of the energy of `grads`"),
        ({"energy": 1.1, "grads": tree()}, r"^`energy` is a share, at most 1, got 1.1"),
        ({"energy": 0.0, "grads": tree()}, r"^`energy` must be above 0"),
        ({"energy": 0.9, "grads": []}, r"^`grads` must have the structure of `params`"),
        ({"energy": 0.9, "grads": [tree(), {}]}, r"^`grads` must have the structure of `params`"),
        ({"rank": 0}, r"^`rank` must be in \[1"),
    ],
)
def test_invalid_arguments(settings, match):
    with pytest.raises(ValueError, match=match):
        natgalore.plan(tree(), **settings)


def test_the_name_of_a_recipe_is_refused():
    unchecked = getattr(natgalore.plan, "__wrapped__", natgalore.plan)
    with pytest.raises(TypeError, match=r"^`recipe` must be a function .* got 'galore'"):
        unchecked(tree(), rank=8, recipe="galore")


def test_padding_on_tpus_is_counted():
    """One axis of 128, one of 8: 100 columns of a basis are 104, and 100 of n are 128."""
    params = {"up": {"kernel": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}}
    counted = lambda rank, tpu: natgalore.plan(params, rank=rank, bits=32, tpu=tpu).bytes
    for rank in (16, 100, 128):
        exact, padded = counted(rank, False), counted(rank, True)
        assert padded["weights"] == exact["weights"]
        assert padded["gradients"] * rank == exact["gradients"] * -(-rank // 8) * 8
        scalars = 5 * (512 - 4)  # counts and a version, in a tile each
        arrays = (256 + 2 * 1024) * 4
        assert padded["state"] - exact["state"] == scalars + arrays * (-rank % 8)
    planned = natgalore.plan(params, rank=100, bits=32, tpu=True)
    assert sum(row.state for row in planned.rows) <= planned.bytes["state"]
    assert planned.adamw == 4 * 4 * 256 * 1024 + 512
