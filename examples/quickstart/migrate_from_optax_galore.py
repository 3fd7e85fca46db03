"""Migrate from optax.contrib.galore to natgalore: the changed arguments and their effect.

    python examples/quickstart/migrate_from_optax_galore.py     trains one model four times; 30 s

    optax.contrib.galore(                     natgalore.galore(
        3e-3, rank=48, scale=1.0,                 3e-3, rank=48, scale=1.0,
        update_proj_gap=80,                       refresh_every=80,
        weight_dimension_numbers=views,           select=views,
    )                                             side="long", basis="svd",
                                                  transport="keep", stagger=False,
                                              )

The last two lines give Optax's algorithm: the long side of a matrix is projected, bases come from
an SVD, all matrices are refreshed at the same step, and the moments are kept when the basis
changes. The two runs agree up to rounding until the second basis; afterwards each depends on the
signs of its singular vectors. Without those two lines natgalore projects the short side, as in
GaLore's paper (r (m + 2n) numbers for an m x n weight with m < n, instead of r (n + 2m)), computes
bases without an SVD, and rotates the moments into the new basis. Without `select`, Optax projects
every matrix including embedding and head, and natgalore those that `natgalore.describe` lists.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgalore_jax as natgalore
from examples.common import data
from examples.quickstart.plain_jax import init, next_byte_loss


VIEWS = {
    "embed": None,
    "up": optax.contrib.GaLoreDimensionNumbers(reduction_axis=0, output_axis=1),
    "down": optax.contrib.GaLoreDimensionNumbers(reduction_axis=0, output_axis=1),
    "head": None,
}
LIKE_OPTAX = {"side": "long", "basis": "svd", "transport": "keep", "stagger": False}
OPTIMIZERS = {
    "optax.contrib.galore": optax.contrib.galore(
        3e-3, rank=48, update_proj_gap=80, weight_dimension_numbers=VIEWS
    ),
    "natgalore, the same": natgalore.galore(
        3e-3, rank=48, refresh_every=80, select=VIEWS, **LIKE_OPTAX
    ),
    "natgalore.galore": natgalore.galore(3e-3, rank=48, refresh_every=80),
    "natgalore.natural_galore": natgalore.natural_galore(3e-3, rank=48, refresh_every=80),
}


def train(tx: optax.GradientTransformation, text: np.ndarray, steps: int) -> list[float]:
    """Trains on `text`; returns the loss of each step."""

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(next_byte_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = init(jax.random.key(0))
    state = tx.init(params)
    losses = []
    for i in range(steps):
        batch = data.training_batch(text, batch_size=256, length=9, seed=0, step=i)
        params, state, loss = step(params, state, jnp.asarray(batch))
        losses.append(float(loss))
    return losses


def main(steps: int = 200) -> dict[str, list[float]]:
    """Prints the memory of the four optimizers, then trains with each; returns their losses."""
    text = data.load().train
    print(natgalore.memory_report(jax.eval_shape(init, jax.random.key(0)), OPTIMIZERS))
    losses = {name: train(tx, text, steps) for name, tx in OPTIMIZERS.items()}
    for name, values in losses.items():
        print(f"{name:26} {values[0]:.3f} -> {np.mean(values[-20:]):.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main()
