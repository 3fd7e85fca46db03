import jax
import jax.numpy as jnp
import optax

from natgalore_jax.tree.cores import Core, cores, replace_cores
from tests.helpers.leaf_specs import KERNEL


def test_key_of_a_core_child_repeats_its_parents_key():
    tree = {"up": {"kernel": Core(jnp.ones((4, 20)), KERNEL)}}
    ((path, _),) = jax.tree_util.tree_leaves_with_path(tree)
    assert [key.key for key in path] == ["up", "kernel", "kernel"]


def test_optax_states_contain_cores():
    tree = {"up": {"kernel": Core(jnp.ones((3, 4, 20)), KERNEL)}, "bias": jnp.ones(3)}
    state = optax.scale_by_adam().init(tree)
    assert isinstance(state.mu["up"]["kernel"], Core)
    assert state.nu["up"]["kernel"].spec is KERNEL


def test_cores_and_replace_cores_skip_masked_cores():
    tree = [Core(jnp.ones(2), KERNEL), {"b": jnp.ones(3)}, Core(optax.MaskedNode(), KERNEL), None]
    tree.append(Core(jnp.zeros(2), KERNEL))
    assert [float(core.value[0]) for core in cores(tree)] == [1.0, 0.0]
    replaced = replace_cores(tree, ["first", "second"])
    assert replaced[0].value == "first"
    assert replaced[4].value == "second"
    assert replaced[1] is tree[1] or replaced[1]["b"] is tree[1]["b"]
