import os
import zlib


os.environ["OPENBLAS_NUM_THREADS"] = "1"  # batched LAPACK is 10 to 40 times slower without it

import jax
import pytest

from .compiling import QUICKLY


os.environ.setdefault("XLA_FLAGS", QUICKLY)
jax.config.update("jax_num_cpu_devices", 8)  # before the first array: sharding tests
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key(request):
    """A key that is this test's own, and the same on every run."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))
