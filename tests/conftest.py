import dataclasses
import gc
import os
import zlib


os.environ["OPENBLAS_NUM_THREADS"] = "1"  # batched LAPACK is 10 to 40 times slower without it

import jax
import pytest

from tests.helpers.compiling import QUICKLY


os.environ.setdefault("XLA_FLAGS", QUICKLY)
jax.config.update("jax_num_cpu_devices", 8)  # before the first array: sharding tests
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(200_000, 20, 20)  # tracing allocates many lasting objects: 5 % of the time


@pytest.fixture
def key(request):
    """A random key derived from the test's name."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An empty working folder, a smaller `tiny` Llama and few compiler optimizations."""
    from examples.common import llama

    monkeypatch.chdir(tmp_path)
    tiny = dataclasses.replace(llama.CONFIGS["tiny"], hidden=32, intermediate=88, layers=1)
    monkeypatch.setitem(llama.CONFIGS, "tiny", tiny)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
