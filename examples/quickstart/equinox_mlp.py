"""Equinox: train a module with Natural GaLore, used like any Optax optimizer.

python examples/quickstart/equinox_mlp.py      learns to sort 16 numbers; about ten seconds
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import natgalore_jax as natgalore


NUMBERS = 16
CONSTANT = 0.0098  # loss of the best constant prediction: the mean of the k-th smallest number

tx = natgalore.natural_galore(2e-3, rank=16)


@eqx.filter_jit
def train_step(model: eqx.Module, state, key: jax.Array):
    x = jax.random.uniform(key, (256, NUMBERS))

    def loss(model):
        return jnp.square(jax.vmap(model)(x) - jnp.sort(x)).mean()

    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, value


def main(steps: int = 400) -> list[float]:
    """Trains on random numbers; returns the loss of each step."""
    model = eqx.nn.MLP(NUMBERS, NUMBERS, width_size=128, depth=3, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    print(natgalore.describe(tx, params))
    state = tx.init(params)
    losses = []
    for step in range(steps):
        model, state, loss = train_step(model, state, jax.random.key(step))
        losses.append(float(loss))
    print(
        f"mean squared error: {losses[0]:.4f} at first, {np.mean(losses[-20:]):.4f} at the end "
        f"(best constant prediction: {CONSTANT})"
    )
    return losses


if __name__ == "__main__":
    main()
