"""Plain JAX: params in a dict, and a learning rate of their own for embedding and head.

python examples/quickstart/plain_jax.py   predicts the next byte of Python code; ten seconds
"""

import jax
import numpy as np
import optax

import natgalore_jax as natgalore
from examples.common import data


SHAPES = {"embed": (256, 24), "up": (192, 512), "down": (512, 192), "head": (192, 256)}
LABELS = {"embed": "rest", "up": "matrices", "down": "matrices", "head": "rest"}


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Random weights."""
    keys = dict(zip(SHAPES, jax.random.split(key, len(SHAPES)), strict=True))
    return {k: jax.random.normal(keys[k], m) * m[0] ** -0.5 for k, m in SHAPES.items()}


def next_byte_loss(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    """Mean cross-entropy of the last byte of each row, in nats."""
    x = params["embed"][batch[:, :-1]].reshape(len(batch), -1)
    x += jax.nn.relu(x @ params["up"]) @ params["down"]
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], batch[:, -1]).mean()


def train(tx: optax.GradientTransformation, steps: int) -> list[float]:
    """Trains on Python's standard library; returns the loss of each step."""

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(next_byte_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    text, params = data.load().train, init(jax.random.key(0))
    state, losses = tx.init(params), []
    for i in range(steps):
        batch = data.training_batch(text, batch_size=256, length=9, seed=0, step=i)
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses


def main(steps: int = 200) -> list[float]:
    """Prints what is projected, trains, returns the loss of each step."""
    matrices = natgalore.natural_galore(2.5e-3, rank=48)
    tx = optax.partition({"matrices": matrices, "rest": optax.adam(5e-3)}, LABELS)
    print(natgalore.describe(tx, jax.eval_shape(init, jax.random.key(0))))
    losses = train(tx, steps)
    print(f"nats per byte: {losses[0]:.2f} at first, {np.mean(losses[-20:]):.2f} at the end")
    return losses


if __name__ == "__main__":
    main()
