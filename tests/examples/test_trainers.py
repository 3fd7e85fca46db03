"""The recipes of examples/trainers/ for other people's trainers.

A recipe whose trainer is installed runs in it; benchmarks/memory/bench_trainers.py trains in
MaxText, Levanter and nanodo. The patches also run against stubs: their added lines, with the names
that the patched module has.
"""

import re
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import natgalore_jax as natgalore
from examples.trainers import ppo


FOLDER = Path(ppo.__file__).parent


def added_lines(patch: str) -> list[str]:
    """The text that a patch adds, by hunk."""
    hunks = re.split(r"^@@.*$", (FOLDER / patch).read_text(), flags=re.MULTILINE)[1:]
    lines = lambda hunk: re.findall(r"^\+(?!\+\+ )(.*)$", hunk, flags=re.MULTILINE)
    return ["\n".join(lines(hunk)) for hunk in hunks]


def branch(code: str, names: dict) -> dict:
    """Names after an added `elif` branch has run as an `if`."""
    exec(re.sub("^elif", "if", textwrap.dedent(code)), names)
    return names


def trained_steps(tx: optax.GradientTransformation, steps: int = 2) -> dict:
    """Params after steps on the weight itself as the gradient."""
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (8, 16)), "bias": jnp.ones(16)}}
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    """Equal up to the order in which rate, sign and decay are multiplied; weights are about 1."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), a, b)


def test_branch_of_maxtext_against_a_stub():
    enum, imported, code = added_lines("maxtext.patch")
    (_, name) = enum.split(" = ")
    config = types.SimpleNamespace(opt_type=eval(name), adam_weight_decay=0.1)
    schedule = optax.constant_schedule(1e-2)
    names = {"config": config, "learning_rate_schedule": schedule, "get_adamw_mask": lambda _: None}
    exec(imported, names)
    tx = branch(code, names)["base_opt"]
    ours = natgalore.natural_galore(schedule, 0.25, weight_decay=0.1)
    assert_equal(trained_steps(tx), trained_steps(ours))


def test_branch_of_nanodo_against_a_stub():
    imported, code = added_lines("nanodo.patch")
    mask = lambda params, exclude_names: jax.tree.map(lambda x: x.ndim > 1, params)
    names = {
        "optimizer_type": "natural_galore",
        "learning_rate_fn": optax.constant_schedule(1e-2),
        "weight_decay": 0.1,
        "weight_decay_exclusion_names": [],
        "_params_mask": mask,
    }
    exec(f"import functools\n{imported}", names)
    tx = branch(code, names)["base_optimizer"]
    decayed = {"up": {"kernel": True, "bias": False}}
    ours = natgalore.natural_galore(1e-2, 0.25, weight_decay=0.1, mask=decayed)
    assert_equal(trained_steps(tx), trained_steps(ours))


def test_transformation_of_big_vision_against_a_stub():
    """In the chain of big_vision's `make`: no rate, a mask, decay and schedule behind it."""
    imported, code = added_lines("big_vision.patch")
    stub = types.SimpleNamespace(**vars(optax), big_vision=types.SimpleNamespace())
    names = {"optax": stub}
    exec(f"{imported}\n{code}", names)
    make = stub.big_vision.scale_by_natural_galore
    everything = {"up": {"kernel": True, "bias": True}}
    tx = optax.chain(
        optax.masked(make(refresh_every=2), everything),
        optax.scale(1e-2),
        optax.add_decayed_weights(1e-3, {"up": {"kernel": True, "bias": False}}),
        optax.masked(optax.scale_by_schedule(lambda step: 1.0), everything),
        optax.scale(-1.0),
    )
    ours = natgalore.natural_galore(
        1e-2, 0.25, refresh_every=2, weight_decay=0.1, mask={"up": {"kernel": True, "bias": False}}
    )
    assert_close(trained_steps(tx, 3), trained_steps(ours, 3))
    state = tx.init({"up": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}})
    assert all(isinstance(x, jax.Array) for x in state[0].inner_state.values())


def test_easydel_builds_it_by_name():
    optimizers = pytest.importorskip("eformer.optimizers", reason="EasyDeL is not installed")
    from examples.trainers import easydel

    assert easydel.NaturalGaLoreConfig().rank == 128
    tx, _ = optimizers.OptimizerFactory.create(
        "natural_galore",
        scheduler_config=optimizers.SchedulerConfig(learning_rate=1e-2),
        weight_decay=0.1,
        rank=2,
    )
    ours = natgalore.natural_galore(1e-2, 2, weight_decay=0.1)
    assert_close(trained_steps(tx), trained_steps(ours))


def test_levanter_builds_it_from_its_config():
    pytest.importorskip("levanter.optim.config", reason="Levanter is not installed")
    from levanter.optim.config import OptimizerConfig

    from examples.trainers import levanter

    assert OptimizerConfig.get_choice_class("natural_galore") is levanter.NaturalGaLoreConfig
    config = levanter.NaturalGaLoreConfig(
        learning_rate=1e-2,
        rank=2,
        lr_schedule="constant",
        warmup=0,
        max_grad_norm=None,
        default_weight_decay_mask=False,
    )
    ours = natgalore.natural_galore(1e-2, 2, weight_decay=config.weight_decay)
    assert_equal(trained_steps(config.build(10)), trained_steps(ours))


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
def test_tunix_shards_the_state_of_its_optimizer():
    """The steps of Tunix's PeftTrainer: `nnx.Optimizer` under `with mesh`, and its constraint.

    Against a stub of `PeftTrainer._shard_optimizer`, which reads `nnx.get_partition_spec`.
    """
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with mesh, nnx.use_eager_sharding(False):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tp"))
        model = nnx.Linear(64, 128, kernel_init=init, use_bias=False, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, natgalore.galore(1e-2, 16), wrt=nnx.Param)
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        specs = nnx.get_partition_spec(state)
        sharded = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, specs))(state)
    arrays = jax.tree.leaves(sharded)
    on_device = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert on_device <= 1.1 * sum(x.nbytes for x in arrays) / 8


def test_tunix_trains_with_a_sharded_state():
    trainers = pytest.importorskip("tunix.sft.peft_trainer", reason="Tunix is not installed")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with mesh, nnx.use_eager_sharding(False):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tp"))
        model = nnx.Linear(64, 64, kernel_init=init, use_bias=False, rngs=nnx.Rngs(0))
        trainer = trainers.PeftTrainer(
            model,
            natgalore.natural_galore(1e-2, rank=16, refresh_every=2),
            trainers.TrainingConfig(eval_every_n_steps=100, max_steps=3),
        ).with_loss_fn(lambda model, x: jnp.square(model(x) - x).mean())
        trainer.with_gen_model_input_fn(lambda x: {"x": x})
        x = np.random.default_rng(0).normal(size=(3, 16, 64)).astype(np.float32)
        trainer.train(list(x))
    arrays = jax.tree.leaves(nnx.state(trainer.optimizer, nnx.optimizer.OptState))
    on_device = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert on_device <= 1.1 * sum(x.nbytes for x in arrays) / 8
    assert max(float(jnp.abs(x).max()) for x in arrays) > 0


class TestPPO:
    def test_a_step_of_the_pole(self):
        """Gymnasium's CartPole-v1 from this state, pushed to the right, in float64."""
        state = np.array([0.1, -0.2, 0.05, 0.3])
        force, sin, cos = 10.0, np.sin(0.05), np.cos(0.05)
        shared = (force + 0.1 * 0.5 * 0.3**2 * sin) / 1.1
        turning = (9.8 * sin - cos * shared) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        pushing = shared - 0.1 * 0.5 * turning * cos / 1.1
        expected = state + 0.02 * np.array([-0.2, pushing, 0.3, turning])
        new, done = ppo.balance(jnp.array(state), jnp.array(1.0))
        np.testing.assert_allclose(new, expected, rtol=1e-5)  # a few roundings of float32
        assert not done
        assert ppo.balance(jnp.array([2.41, 0.0, 0.0, 0.0]), jnp.array(1.0))[1]
        assert ppo.balance(jnp.array([0.0, 0.0, 0.21, 0.0]), jnp.array(0.0))[1]

    @pytest.mark.slow
    def test_every_seed_learns(self, capsys):
        with jax.numpy_rank_promotion("allow"):  # as outside of these tests
            results = ppo.main(updates=40, seeds=2)
        for lengths in results.values():
            assert (lengths[:, :3].mean(1) < 60).all()
            assert (lengths[:, -5:].mean(1) > 120).all()
        assert "Natural GaLore: steps until the pole falls" in capsys.readouterr().out
