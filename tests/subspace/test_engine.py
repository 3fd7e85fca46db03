"""The engine on a small tree; whole trajectories against the oracle are in test_trajectory.py."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import natgalore_jax as natgalore
from natgalore_jax.subspace.basis import expand
from natgalore_jax.subspace.refresh import GROUPS, phase
from natgalore_jax.subspace.state import FORMAT_VERSION
from natgalore_jax.tree.cores import cores
from tests.helpers.cases import quick, slow
from tests.helpers.compiling import AS_FOR_USERS
from tests.oracle import oracles


RANK = 4
SHAPES = {
    "embed": {"embedding": (30, 12)},
    "layers": {"norm": {"scale": (3, 12)}, "up": {"kernel": (3, 12, 20)}},
    "out": {"kernel": (20, 12)},
}
MATRICES = ("layers", "out")


def tree(key, dtype=jnp.float32):
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(shapes))
    return treedef.unflatten(
        [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
    )


FISHERS = ["core", "window", None]


@functools.cache
def optimizer(fisher="core", **kwargs):
    return natgalore.natural_galore(
        1e-2,
        RANK,
        fisher=fisher,
        **{"refresh_every": 4, "weight_decay": 0.1, "residual": None} | kwargs,
    )


@functools.cache  # one compilation for all tests of one optimizer
def stepper(tx, donate=()):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, updates

    return jax.jit(step, donate_argnums=donate)


class TestCalendar:
    @settings(max_examples=60, deadline=None)
    @given(total=st.integers(1, 300), every=st.integers(1, 300))
    def test_staggered_refreshes_are_evenly_spread(self, total, every):
        phases = phase(np.arange(total), every, total, stagger=True)
        assert 0 <= phases.min() <= phases.max() < every
        groups = min(GROUPS, every, total)
        busy, sizes = np.unique(phases, return_counts=True)
        assert len(busy) == groups
        assert sizes.max() <= -(-total // groups)
        assert (np.diff(busy) <= -(-every // groups)).all()

    def test_without_stagger_all_are_due_together(self):
        np.testing.assert_array_equal(phase(np.arange(7), 5, 7, stagger=False), 0)

    @pytest.mark.slow
    def test_engine_refreshes_on_schedule(self, key):
        """Bases change where the calendar says and nowhere else."""
        tx = natgalore.project(RANK, optax.identity(), refresh_every=3)
        params = tree(key)
        state, update = tx.init(params), jax.jit(tx.update)
        bases = lambda state: (
            [*state.basis["layers"]["up"]["kernel"].value, state.basis["out"]["kernel"].value]
        )
        for count in range(8):
            old = bases(state)
            _, state = update(tree(jax.random.fold_in(key, count)), state)
            changed = [bool((a != b).any()) for a, b in zip(old, bases(state), strict=True)]
            assert changed == [oracles.due(i, count, 3, 4, stagger=True) for i in range(4)]


@pytest.mark.parametrize("first", [0.0, *slow(jnp.nan)], ids=["zero", "nan"])
def test_first_finite_gradient_brings_a_basis_at_once(first, key):
    """Zero-initialised layers and loss scaling: a matrix does not wait for its turn."""
    tx = natgalore.project(RANK, optax.identity(), refresh_every=100)
    params = tree(key)
    state, update = tx.init(params), jax.jit(tx.update)
    left, right = jax.random.normal(key, (2, RANK, 12)), jax.random.normal(key, (2, RANK, 20))
    signal = left[0].T @ right[0]  # of the subspace's rank: a basis from it captures all of it
    for count in range(4):
        gradients = jax.tree.map(jnp.ones_like, params)
        kernel = jnp.stack([signal] * 3)
        if count < 2:
            kernel = kernel.at[1].set(first)
        gradients["layers"]["up"]["kernel"] = kernel
        updates, state = update(gradients, state)
    np.testing.assert_array_equal(state.refreshed["layers"]["up"]["kernel"].value, [1, 1, 1])
    got = updates["layers"]["up"]["kernel"][1]
    assert jnp.linalg.norm(got - signal) < 1e-2 * jnp.linalg.norm(signal)


SPOILERS = {
    "nan": lambda g: g.at[..., 3, 2].set(jnp.nan),
    "inf": lambda g: g.at[..., 3, 2].set(-jnp.inf),
    "all nan": lambda g: g * jnp.nan,
}


class TestGate:
    @pytest.mark.parametrize("entry", [(3, 2), (31, 255)])
    def test_nan_in_a_large_core_closes_the_gate(self, entry):
        """On CPUs the largest of 8192 numbers may be one of them although another is NaN."""
        tx = natgalore.project(32, optax.trace(0.9))
        state = tx.init({"up": {"kernel": jnp.ones((64, 256))}})
        step = jax.jit(tx.update)
        for count in range(2):
            g = jax.random.normal(jax.random.key(count), (64, 256))
            g = g.at[entry].set(jnp.nan) if count else g
            updates, state = step({"up": {"kernel": g}}, state)
        assert (updates["up"]["kernel"] == 0).all()
        assert state.skipped["up"]["kernel"].value == 1

    @pytest.mark.parametrize("spoil", quick(list(SPOILERS)[:1], SPOILERS))
    @pytest.mark.parametrize("when", [0, *slow(2, 4)], ids=["first", "hot", "refresh"])
    @pytest.mark.parametrize("fisher", quick(list(FISHERS)[:1], [*FISHERS]))
    def test_nonfinite_gradient_leaves_only_decay_and_other_matrices(
        self, fisher, when, spoil, key
    ):
        tx = optimizer(fisher, stagger=False)
        params = tree(key)
        state, step = tx.init(params), stepper(tx)
        for count in range(6):
            gradients = tree(jax.random.fold_in(key, count))
            if count == when:
                kernel = gradients["layers"]["up"]["kernel"]
                gradients["layers"]["up"]["kernel"] = kernel.at[1].set(spoil(kernel[1]))
                gradients["embed"]["embedding"] = spoil(gradients["embed"]["embedding"])
                before = state[0].basis["layers"]["up"]["kernel"].value[1]
            old = params
            params, state, updates = step(params, state, gradients)
            if count == when:
                for path in (("layers", "up", "kernel"), ("embed", "embedding")):
                    got, weight = (x[path[0]][path[1]] for x in (updates, old))
                    got, weight = (
                        (got["kernel"][1], weight["kernel"][1]) if "up" in path else (got, weight)
                    )
                    np.testing.assert_allclose(got, -1e-2 * 0.1 * weight, rtol=1e-6)
                np.testing.assert_array_equal(
                    state[0].basis["layers"]["up"]["kernel"].value[1], before
                )
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))
        skipped = state[0].skipped
        np.testing.assert_array_equal(skipped["layers"]["up"]["kernel"].value, [0, 1, 0])
        assert skipped["embed"]["embedding"] == 1
        assert skipped["out"]["kernel"].value == 0
        assert skipped["layers"]["norm"]["scale"] == 0

    @pytest.mark.parametrize("unit", [1e-25, 1e25])
    @pytest.mark.parametrize("when", [0, 2, 4], ids=["first", "hot", "refresh"])
    @pytest.mark.parametrize("fisher", FISHERS)
    def test_extreme_gradients_stay_finite(self, fisher, when, unit, key):
        tx = optimizer(fisher, stagger=False)
        params = tree(key)
        state, step = tx.init(params), stepper(tx)
        for count in range(6):
            gradients = tree(jax.random.fold_in(key, count))
            if count == when:
                gradients = jax.tree.map(lambda g: g * unit, gradients)
            params, state, updates = step(params, state, gradients)
            finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((params, updates))]
            assert all(finite)

    @pytest.mark.parametrize("fisher", quick(list(FISHERS)[:1], [*FISHERS]))
    def test_zero_and_rank_one_gradients_stay_finite(self, fisher, key):
        tx = optimizer(fisher)
        params = tree(key)
        state, step = tx.init(params), stepper(tx)
        for count in range(9):
            fill = 0.0 if count % 3 == 0 else 1.0
            gradients = jax.tree.map(lambda p, fill=fill: jnp.full_like(p, fill), params)
            params, state, _ = step(params, state, gradients)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))
        P = state[0].basis["out"]["kernel"].value
        np.testing.assert_allclose(P.T @ P, jnp.eye(RANK), atol=2e-6)


class TestState:
    @pytest.mark.parametrize("fisher", FISHERS)
    def test_arrays_are_smaller_than_the_projected_leaf(self, fisher):
        params = {"up": {"kernel": jnp.zeros((256, 1024))}}
        state = natgalore.natural_galore(1.0, 8, fisher=fisher).init(params)
        full, window = 256 * 1024, 20
        for x in jax.tree.leaves(state):
            assert x.size <= (window if fisher == "window" else 1) * 8 * 1024 < full

    def test_leaves_are_arrays_with_a_format_number(self, key):
        state = optimizer().init(tree(key))
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        assert state[0].version == FORMAT_VERSION

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    def test_state_is_float32_and_updates_have_the_leaf_dtype(self, dtype, key):
        params = tree(key, dtype)
        tx = optimizer()
        state = tx.init(params)
        _, new_state, updates = stepper(tx)(params, state, params)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        types = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
        assert types == [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(new_state)]
        assert {d for _, d, _ in types} == {jnp.dtype("float32"), jnp.dtype("int32")}

    @pytest.mark.slow
    def test_bfloat16_gradients_equal_their_float32_values(self, key):
        params = tree(key)
        gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        tx = natgalore.project(RANK, optax.trace(0.9))
        exact, _ = tx.update(
            jax.tree.map(lambda x: x.astype(jnp.float32), gradients), tx.init(params)
        )
        rounded, _ = tx.update(gradients, tx.init(gradients))
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
            np.testing.assert_allclose(b.astype(jnp.float32), a, rtol=2**-8)

    def test_seeds_and_matrices_have_distinct_initial_bases(self, key):
        params = tree(key)
        first = lambda seed: natgalore.project(RANK, optax.identity(), seed=seed).init(params).basis
        a, b = (first(seed)["layers"]["up"]["kernel"].value for seed in (0, 1))
        assert jnp.abs(a - b).max() > 0.1
        assert jnp.abs(a[0] - a[1]).max() > 0.1
        np.testing.assert_array_equal(a, first(0)["layers"]["up"]["kernel"].value)

    def test_another_tree_than_at_init_is_refused(self, key):
        """Labels that change between init and update leave another part of the params masked."""
        params = tree(key)
        tx = natgalore.galore(1e-3, RANK)
        state = tx.init(params)
        masked = params | {"layers": optax.MaskedNode()}
        with pytest.raises(ValueError, match=r"only one of them has `layers/[a-z/]*`\. A mask"):
            tx.update(masked, state, masked)
        with pytest.raises(ValueError, match=r"only one of them has `other`"):
            tx.update(params | {"other": jnp.ones(3)}, state)
        renamed = collections.OrderedDict(params)  # the same names in a node of another type
        with pytest.raises(ValueError, match=r"init`: .*OrderedDict"):
            tx.update(renamed, state)


class TestRandomBasis:
    def test_random_basis_stores_a_key_of_two_words_a_matrix(self, key):
        """And P is not there: what the key makes is made where it is used."""
        params = tree(key)
        tx = optimizer(basis="random", side="both")
        state = tx.init(params)[0]
        for bases in (state.basis, state.right_basis):
            assert [x.shape for x in jax.tree.leaves(bases)] == [
                (*x.spec.batch_shape, 2) for x in cores(state.refreshed)
            ]
        sizes = [x.size for x in jax.tree.leaves(state.inner_state)]
        assert max(sizes) <= max(x.size for x in jax.tree.leaves(params))

    def test_stored_basis_survives_another_seed(self, key):
        """The key is in the state, so a checkpoint does not depend on the argument."""
        params = tree(key)
        a, b = (natgalore.project(RANK, optax.trace(0.9), basis="random", seed=s) for s in (0, 1))
        _, state = a.update(params, a.init(params))
        jax.tree.map(
            np.testing.assert_array_equal, a.update(params, state), b.update(params, state)
        )

    @pytest.mark.slow
    def test_updates_lie_in_the_subspaces_of_the_keys(self, key):
        """P Pᵀ G Q Qᵀ of the bases that `expand` gives, before a refresh and after."""
        gradients = tree(key)
        tx = natgalore.project(RANK, optax.identity(), basis="random", side="both", refresh_every=2)
        state, update, seen = tx.init(gradients), jax.jit(tx.update), []
        for _ in range(4):
            updates, state = update(gradients, state)
            P, Q = (x["layers"]["up"]["kernel"] for x in (state.basis, state.right_basis))
            p, q = (np.asarray(expand(x.value, x.spec, jnp.float32)) for x in (P, Q))
            g = np.asarray(P.spec.to_view(gradients["layers"]["up"]["kernel"]))
            expected = p @ (p.mT @ g @ q) @ q.mT
            actual = P.spec.to_view(updates["layers"]["up"]["kernel"])
            np.testing.assert_allclose(actual, expected, atol=1e-5)
            seen.append(p[0])
        np.testing.assert_array_equal(seen[1], seen[0])
        assert np.abs(seen[3] - seen[0]).max() > 0.1


class TestProgram:
    @pytest.mark.slow
    @pytest.mark.parametrize("fisher", FISHERS)
    def test_donated_buffers_are_all_reused(self, fisher, key):
        params = tree(key)
        tx = optimizer(fisher)
        state = tx.init(params)
        program = stepper(tx, (0, 1)).lower(params, state, params).compile(AS_FOR_USERS)
        leaves = jax.tree.leaves((params, state))
        header = program.as_text().split("\n", 1)[0]
        assert len(re.findall(r"(?:may|must)-alias", header)) == len(leaves)
        assert program.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in leaves)

    def test_program_has_no_svd_or_eigendecomposition(self, key):
        params = tree(key)
        tx = optimizer()
        lowered = stepper(tx).lower(params, tx.init(params), params)
        program = lowered.compile(AS_FOR_USERS).as_text()
        assert not re.search("gesdd|gesvd|syevd|heevd", program)
        assert "geqrf" in program  # so that the names above are how this backend spells them

    def test_refresh_of_a_stack_takes_memory_of_one_matrix(self):
        """Temporaries do not grow with the layers."""

        def temporaries(layers):
            params = {"layers": {"up": {"kernel": jnp.zeros((layers, 32, 64))}}}
            tx = natgalore.project(RANK, optax.trace(0.9))
            lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, tx.init(params))
            return lowered.compile(AS_FOR_USERS).memory_analysis().temp_size_in_bytes

        core = 4 * RANK * 64  # the cores of all layers exist at once on the way through
        assert temporaries(32) - temporaries(8) <= 24 * 4 * core

    def test_update_compiles_once(self, key):
        params = tree(key)
        tx = optimizer(None)
        state = tx.init(params)
        step = jax.jit(chex.assert_max_traces(tx.update, n=1))
        for _ in range(10):
            updates, state = step(params, state, params)
            params = optax.apply_updates(params, updates)

    @pytest.mark.slow
    def test_update_in_a_scan_equals_a_loop(self, key):
        params = tree(key)
        tx = optimizer()
        state, step = tx.init(params), stepper(tx)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        (scanned, _), _ = jax.lax.scan(body, (params, state), length=6)
        for _ in range(6):
            params, state, _ = step(params, state, params)
        for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class TestTransport:
    def test_undeclared_state_is_refused_at_init(self, key):
        strange = optax.scale_by_sm3()
        with pytest.raises(
            TypeError, match=r"ScaleBySM3State\.mu.*register_state.*transport=\"keep\""
        ):
            natgalore.project(RANK, strange).init(tree(key))
        natgalore.project(RANK, strange, transport="keep").init(tree(key))

    def test_declared_state_is_rotated(self, key):
        """What a linear inner remembers is the projection of what it would remember in full."""
        tx = natgalore.project(8, optax.trace(0.9), refresh_every=2, basis="svd")
        params = {"up": {"kernel": jnp.zeros((8, 20))}}  # full rank: rotation loses nothing
        state, update = tx.init(params), jax.jit(tx.update)
        momentum = jnp.zeros((8, 20))
        for count in range(7):
            G = jax.random.normal(jax.random.fold_in(key, count), (8, 20))
            momentum = 0.9 * momentum + G
            updates, state = update({"up": {"kernel": G}}, state)
            np.testing.assert_allclose(updates["up"]["kernel"], momentum, rtol=1e-4, atol=1e-4)


def test_unprojected_leaves_equal_the_inner_optimizer(key):
    tx, adam = optimizer(), optax.adamw(1e-2, b2=0.95, weight_decay=0.1)
    params = tree(key)
    ours, theirs = tx.init(params), adam.init(params)
    for count in range(3):
        gradients = tree(jax.random.fold_in(key, count))
        _, ours, mine = stepper(tx)(params, ours, gradients)
        plain, theirs = adam.update(gradients, theirs, params)
        # Equal but for the order in which XLA fuses: a rounding or two of float32.
        np.testing.assert_allclose(
            mine["embed"]["embedding"], plain["embed"]["embedding"], rtol=1e-5, atol=1e-8
        )


def test_scale_multiplies_projected_leaves_only(key):
    params = tree(key)
    plain = optimizer(None, weight_decay=0.0)
    scaled = optimizer(None, weight_decay=0.0, scale=0.25)
    _, _, a = stepper(plain)(params, plain.init(params), params)
    _, _, b = stepper(scaled)(params, scaled.init(params), params)
    np.testing.assert_allclose(b["out"]["kernel"], 0.25 * a["out"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(b["embed"]["embedding"], a["embed"]["embedding"])


@pytest.mark.slow
def test_inner_gets_one_tree(key):
    """One global norm over cores and other leaves together."""
    params = tree(key)
    seen = {}

    def spy(updates, state, params=None):
        seen["cores"], seen["all"] = cores(updates), jax.tree.leaves(updates)
        return updates, state

    tx = natgalore.project(RANK, optax.GradientTransformation(lambda p: (), spy))
    tx.update(params, tx.init(params))
    assert [c.spec.name for c in seen["cores"]] == ["layers/up/kernel", "out/kernel"]
    assert [x.shape for x in seen["all"]] == [(30, 12), (3, 12), (3, RANK, 20), (RANK, 20)]
