"""Migrate from optax.contrib.galore to natgalore: the changed arguments and their effect.

    python examples/quickstart/migrate_from_optax_galore.py     trains one model four times; 30 s

    optax.contrib.galore(                     natgalore.galore(
        3e-3, rank=48, scale=1.0,                 3e-3, rank=48, scale=1.0,
        update_proj_gap=80,                       refresh_every=80,
        weight_dimension_numbers=views,           select=views,
    )                                             side="long", basis="svd",
                                                  transport="keep", stagger=False,
                                              )

The last two lines give Optax's algorithm; `docs/coming-from.md` explains each argument. Both runs
agree up to rounding until the second basis and then depend on the signs of singular vectors.
"""

import jax
import numpy as np
import optax

import natgalore_jax as natgalore
from examples.quickstart import plain_jax


VIEW = optax.contrib.GaLoreDimensionNumbers(reduction_axis=0, output_axis=1)
VIEWS = {"embed": None, "up": VIEW, "down": VIEW, "head": None}
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


def main(steps: int = 200) -> dict[str, list[float]]:
    """Prints the memory of the four optimizers, then trains with each; returns their losses."""
    params = jax.eval_shape(plain_jax.init, jax.random.key(0))
    print(natgalore.memory_report(params, OPTIMIZERS))
    losses = {name: plain_jax.train(tx, steps) for name, tx in OPTIMIZERS.items()}
    for name, values in losses.items():
        print(f"{name:26} {values[0]:.3f} -> {np.mean(values[-20:]):.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main()
