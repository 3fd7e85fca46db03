"""Flax NNX: Natural GaLore in an nnx.Optimizer, used like any Optax optimizer.

python examples/quickstart/nnx_optimizer.py   predicts the next byte of Python code; 30 s
"""

import jax
import numpy as np
import optax
from flax import nnx

import natgalore_jax as natgalore
from examples.common import data


class NextByte(nnx.Module):
    """Logits of the next byte at each position: one transformer block."""

    def __init__(self, rngs: nnx.Rngs, length: int = 32, width: int = 48):
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, length, width)))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position
        x += self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.head(x + self.down(nnx.gelu(self.up(x))))


@nnx.jit
def train_step(model: NextByte, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    def loss(model):
        logits = model(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main(steps: int = 200) -> list[float]:
    """Trains on Python's standard library; returns the loss of each step."""
    text = data.load().train
    model = NextByte(nnx.Rngs(0))
    tx = natgalore.natural_galore(5e-3, rank=16)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for step in range(steps):
        batch = data.training_batch(text, batch_size=32, length=33, seed=0, step=step)
        losses.append(float(train_step(model, optimizer, batch)))
    print(natgalore.describe(tx, nnx.state(model, nnx.Param), optimizer.opt_state))
    print(f"nats per byte: {losses[0]:.2f} at first, {np.mean(losses[-20:]):.2f} at the end")
    return losses


if __name__ == "__main__":
    main()
