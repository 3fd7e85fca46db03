"""Writes a checkpoint of the state's present format, for later releases to read.

    python -m tests.helpers.write_checkpoint      writes tests/data/natural_galore_v1.zip

In it, `state` is what Orbax saves of weights and state after SAVED_AT steps, `expected.npz` the
weights after STEPS, gone on in float64, and how far from them float32 ends here (`rounding`).
A format that was released is never written again: a new one gets its own file beside it.
"""

import itertools
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import natgalore_jax as natgalore
from natgalore_jax.subspace.state import FORMAT_VERSION
from natgalore_jax.tree.leaf_spec import path_name


FILE = Path(__file__).parents[1] / "data" / f"natural_galore_v{FORMAT_VERSION}.zip"
SHAPES = {"layers": {"up": {"kernel": (2, 8, 12)}}, "down": {"kernel": (12, 8), "bias": (8,)}}
SAVED_AT, STEPS = 4, 10  # each matrix is refreshed before, and twice after

tx = natgalore.natural_galore(
    1e-2, rank=3, fisher="core", residual=None, b2=0.999, refresh_every=3, weight_decay=0.1
)


def numbers(step):
    """A tree of numbers in [-1, 1] that are the same on every machine, in steps of 1/50."""
    start = itertools.count(7 * step, 31)

    def leaf(shape):
        i = next(start) + np.arange(np.prod(shape))
        return jnp.asarray((i * i * (i + 3) % 101 - 50) / 50).reshape(shape)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def go_on(weights, state, first, last):
    """Weights and state after the steps `first` to `last`."""
    update = jax.jit(tx.update)
    for step in range(first, last):
        updates, state = update(numbers(step + 1), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


def start():
    weights = numbers(0)
    return weights, tx.init(weights)


def restored(folder):
    """Weights and state as saved, in the dtypes that JAX has now."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", jax.tree.map(place, jax.eval_shape(start)))


def by_name(weights):
    return {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(weights)}


def main():
    if FILE.exists():
        sys.exit(f"{FILE} is there: a format that was released is never written again.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "state", go_on(*start(), 0, SAVED_AT))
        here = by_name(go_on(*restored(folder), SAVED_AT, STEPS)[0])
        with jax.enable_x64(True):
            expected = by_name(go_on(*restored(folder), SAVED_AT, STEPS)[0])
        rounding = max(np.abs(here[name] - expected[name]).max() for name in expected)
        np.savez(folder / "expected.npz", rounding=rounding, **expected)
        (folder / "state" / "commit_success.txt").unlink(missing_ok=True)  # names the folder
        with zipfile.ZipFile(FILE, "x", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder))
    print(f"{FILE}: {FILE.stat().st_size} bytes, rounding {rounding:.1e}")


if __name__ == "__main__":
    main()
