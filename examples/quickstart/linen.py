"""Flax Linen: Natural GaLore in a TrainState, used like any Optax optimizer.

python examples/quickstart/linen.py   predicts the next byte of Python code; ten seconds
"""

import jax
import numpy as np
import optax
from flax import linen
from flax.training.train_state import TrainState

import natgalore_jax as natgalore
from examples.common import data


class NextByte(linen.Module):
    """Logits of the next byte given the previous bytes."""

    @linen.compact
    def __call__(self, context):
        x = linen.Embed(256, 24)(context).reshape(len(context), -1)
        for _ in range(2):
            x = linen.relu(linen.Dense(320)(x))
        return linen.Dense(256, name="head")(x)


@jax.jit
def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss(params):
        logits = state.apply_fn({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def main(steps: int = 200) -> list[float]:
    """Trains on Python's standard library; returns the loss of each step."""
    text = data.load().train
    model = NextByte()
    params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    tx = natgalore.natural_galore(3e-3, rank=64)
    print(natgalore.describe(tx, params))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    losses = []
    for step in range(steps):
        batch = data.training_batch(text, batch_size=256, length=9, seed=0, step=step)
        state, loss = train_step(state, batch)
        losses.append(float(loss))
    print(f"nats per byte: {losses[0]:.2f} at first, {np.mean(losses[-20:]):.2f} at the end")
    return losses


if __name__ == "__main__":
    main()
