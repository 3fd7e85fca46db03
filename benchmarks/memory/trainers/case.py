"""What every trainer's run reports: bytes of optimizer state, losses, and the time to compile."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


STEPS = 4
REFRESH_EVERY = 2  # so that both kinds of step run
LAYERS, WIDTH, INNER, VOCABULARY, LENGTH, BATCH = 4, 128, 512, 512, 64, 8

COMPILE_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


def bytes_of(state: Any) -> dict[str, int]:
    """Bytes of all arrays of an optimizer state, and of their parts on the first device."""
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    device = jax.devices()[0]
    on_device = lambda x: sum(s.data.nbytes for s in x.addressable_shards if s.device == device)
    return {
        "total_bytes": sum(x.nbytes for x in arrays),
        "device_bytes": sum(on_device(x) for x in arrays),
        "arrays": len(arrays),
    }


def equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same names and arrays equal to the bit, wherever they live."""
    keystr = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    named = lambda tree: {keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    a, b = named(a), named(b)
    same = lambda x, y: x.shape == y.shape and np.array_equal(np.asarray(x), np.asarray(y))
    return a.keys() == b.keys() and all(same(x, b[name]) for name, x in a.items())


@contextlib.contextmanager
def compile_seconds() -> Iterator[dict[str, float]]:
    """Wall seconds of the slowest program, by phase, and CPU seconds of the whole block."""
    slowest: dict[str, float] = defaultdict(float)

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event in COMPILE_EVENTS:
            phase = f"{COMPILE_EVENTS[event]}_seconds"
            slowest[phase] = max(slowest[phase], seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.process_time()
    yield slowest
    slowest["process_seconds"] = time.process_time() - start
