"""Gradients with known singular values."""

import jax.numpy as jnp
import numpy as np


def gradient(m, n, sizes, seed=0):
    """A random m x n gradient with the given singular values."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(k, len(sizes))))[0] for k in (m, n))
    return jnp.asarray((U * np.asarray(sizes)) @ V.T, jnp.float32)


SIZES = [4.0, 2.0, 1.0, 1.0, 0.5]  # squares 16, 4, 1, 1, 0.25 of 22.25
