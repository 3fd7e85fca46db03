"""What a model writes with its past kept is what it writes without."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


sys.path.append(str(Path(__file__).parents[1] / "examples"))

import cache
import llama


SMALL = llama.LlamaConfig(
    hidden=16, intermediate=44, heads=4, layers=2, vocabulary=50, kv_heads=2, theta=100.0
)


def model(config):
    return llama.Llama(config, nnx.Rngs(0))


class TestCache:
    @pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
    def test_extending_equals_computing_all_anew(self, scan):
        net = model(replace(SMALL, scan=scan))
        tokens = np.random.default_rng(0).integers(50, size=(2, 9)).astype(np.int32)
        whole = jax.jit(lambda tokens: net(tokens))(tokens)
        extend = jax.jit(lambda tokens, past, start: cache.extend(net, tokens, past, start))
        past, logits = cache.empty(net.config, 2, 12), []
        for start, end in ((0, 5), (5, 6), (6, 9)):
            new, past = extend(tokens[:, start:end], past, jnp.int32(start))
            logits.append(new)
        # The same sums in another order.
        np.testing.assert_allclose(np.concatenate(logits, axis=1), whole, atol=1e-6, rtol=1e-5)
        assert past.keys.shape == (2, 2, 12, 2, 4)
        assert not np.any(past.keys[:, :, 9:])
        assert np.all(np.any(past.values[:, :, :9] != 0, axis=(-1, -2)))
