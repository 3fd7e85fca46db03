from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.tree.cores import Basis, Core
from natgalore_jax.tree.state_roles import REGISTERED, Undeclared, register_state, walk
from tests.helpers.leaf_specs import KERNEL


def test_walk_passes_role_and_spec_of_every_array():
    params = {"up": {"kernel": jnp.ones((8, 20))}, "bias": jnp.ones(3)}
    tx = natgalore.project(4, optax.chain(natgalore.scale_by_core_fisher(), optax.scale_by_adam()))
    state = tx.init(params)
    seen = []
    same = walk(state, lambda x, role, spec: seen.append((x, role, spec)) or x)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert len(seen) == len(jax.tree.leaves(state))
    mine = sorted(role for _, role, spec in seen if spec is not None and spec.name == "up/kernel")
    assert mine == sorted(
        [
            "basis",
            "linear",
            "square",
            "fisher",
            "root",
            "root",
        ]
        + ["scalar"] * 4  # refreshed, skipped; the Fisher's weight and scale
    )
    assert all(spec is None or spec.shape == (8, 20) for _, _, spec in seen)


def test_walk_names_undeclared_fields():
    class Strange(NamedTuple):
        memory: object

    seen = []
    walk(Strange({"k": Core(jnp.ones(2), KERNEL)}), lambda x, role, spec: seen.append(role))
    assert seen == ["Strange.memory"]
    assert isinstance(seen[0], Undeclared)


def test_walk_recognises_bases_and_keys_anywhere():
    seen = []
    tree = {"k": Basis(jnp.ones(2), KERNEL), "l": Basis(jnp.ones(2, jnp.uint32), KERNEL)}
    walk(tree, lambda x, role, spec: seen.append((role, spec)))
    assert seen == [("basis", KERNEL), ("key", KERNEL)]


def test_register_state_refuses_unknown_roles_and_fields():
    class Momentum(NamedTuple):
        momentum: object

    with pytest.raises(ValueError, match=r"`momentum`.*'cubic'"):
        register_state(Momentum, momentum="cubic")
    with pytest.raises(ValueError, match="Momentum has no field `speed`"):
        register_state(Momentum, speed="linear")
    assert Momentum not in REGISTERED


@pytest.mark.parametrize(
    ("first", "second"), [("square_cols", "square_rows"), ("gram", "window"), ("linear", "gram")]
)
def test_paired_fields_must_be_adjacent(first, second):
    class Two(NamedTuple):
        a: object
        b: object

    with pytest.raises(ValueError, match="must follow one with role"):
        register_state(Two, a=first, b=second)
