"""A program of a user, for type checkers: test_wheel.py checks it against the installed wheel."""

from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as natgalore


params = {"up": {"kernel": jnp.ones((64, 256))}}
schedule = optax.cosine_decay_schedule(2.5e-3, 100)
tx = natgalore.natural_galore(schedule, rank=[("up", 16), ("", 0.25)], weight_decay=0.1)
assert_type(tx, optax.GradientTransformationExtraArgs)
state = tx.init(params)
updates, state = tx.update(params, state, params)
params = optax.apply_updates(params, updates)

stages: optax.GradientTransformation = natgalore.chain(
    natgalore.project(rank=16, side="long", select=[("up", natgalore.MatrixView(0, 1))]),
    natgalore.scale_by_core_fisher(),
    optax.scale_by_adam(),
    natgalore.project_back(),
    optax.scale_by_learning_rate(2.5e-3),
)
small: optax.GradientTransformation = natgalore.quantized(natgalore.galore(2.5e-3))
planned = natgalore.plan(params, budget="1MiB")
assert_type(planned.fits, bool)
assert_type(planned.bytes, dict[str, int])


def loss_fn(params: optax.Params, x: jax.Array) -> jax.Array:
    return jnp.square(x).mean()


gradients = natgalore.value_and_grad(loss_fn, natgalore.galore(2.5e-3, stagger=False))


def wrong() -> None:
    """Each line is an error, which every checker must report, also one that ignores Optax's types.

    Optax 0.2.8 has no py.typed: for mypy its types are Any.
    """
    natgalore.natural_galore(2.5e-3, refresh_every="50")  # wrong: a string
    natgalore.galore(2.5e-3, ranks=8)  # wrong: no such argument
    print(planned.fit)  # wrong: no such attribute
