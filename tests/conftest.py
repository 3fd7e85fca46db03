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
gc.set_threshold(200_000, 20, 20)  # tracing makes many objects that stay: a twentieth of all time


@pytest.fixture
def key(request):
    """A key that is this test's own, and the same on every run."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of its own, a small Llama as the `tiny` one, and little time for the compiler."""
    from examples.common import llama

    monkeypatch.chdir(tmp_path)
    tiny = dataclasses.replace(llama.CONFIGS["tiny"], hidden=32, intermediate=88, layers=1)
    monkeypatch.setitem(llama.CONFIGS, "tiny", tiny)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
