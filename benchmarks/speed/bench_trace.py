"""How long does an update take to trace, and how many modules does it pass through?

Trace seconds are processor time of `jax.jit(tx.update).trace` for an unrolled Llama 350m (24
layers, 168 projected matrices), the minimum of `--repeats`. Calls and crossings are counted for one
projected leaf: calls of functions of the package, and those of them from one module to another. The
programs that an update without `jax.jit` compiles are counted at its third step.

    python benchmarks/speed/bench_trace.py [--out benchmarks/results/trace.json]
"""

import argparse
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as natgalore
from benchmarks.common.environment import environment
from examples.common import llama


PACKAGE = pathlib.Path(natgalore.__file__).parent
RANK = 256
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "galore": lambda: natgalore.galore(1e-3, RANK),
    "natural_galore": lambda: natgalore.natural_galore(1e-3, RANK),
    "natural_galore, core Fisher": lambda: natgalore.natural_galore(1e-3, RANK, fisher="core"),
    "galore, 8 bits": lambda: natgalore.quantized(natgalore.galore(1e-3, RANK)),
}


def trace_seconds(tx: optax.GradientTransformation, repeats: int) -> float:
    """Processor seconds to trace one update of an unrolled Llama 350m."""
    params = llama.abstract_params(llama.CONFIGS["350m"])
    state = jax.eval_shape(lambda params: tx.init(params), params)
    taken = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.process_time()
        jax.jit(tx.update).trace(params, state, params)
        taken.append(time.process_time() - start)
    return min(taken)


def crossings(f: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Calls of the package's functions while `f` is traced, and what they cross."""
    stack: list[str] = []
    functions, modules = set(), set()
    calls = borders = 0

    def profile(frame, event, _):
        nonlocal calls, borders
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)):
            return
        if event == "call":
            module = code.co_filename
            calls += 1
            functions.add((module, code.co_qualname))
            modules.add(module)
            borders += bool(stack) and stack[-1] != module
            stack.append(module)
        elif event == "return" and stack:
            stack.pop()

    jax.clear_caches()
    sys.setprofile(profile)
    try:
        jax.jit(f).trace(*args)
    finally:
        sys.setprofile(None)
    return {
        "calls": calls,
        "functions": len(functions),
        "modules": len(modules),
        "crossings": borders,
    }


def one_leaf() -> dict[str, dict[str, int]]:
    """The crossings of three updates of one projected leaf."""
    params = {"up": {"kernel": jnp.ones((64, 128))}}
    found = {}
    for name, tx in (
        ("natural_galore.update", natgalore.natural_galore(1e-3, 8)),
        ("quantized(galore).update", natgalore.quantized(natgalore.galore(1e-3, 8))),
    ):
        found[name] = crossings(tx.update, params, tx.init(params), params)
    tx = natgalore.galore(1e-3, 8, stagger=False)
    loss = lambda params, x: jnp.sum(jnp.square(x @ params["up"]["kernel"]))
    gradients = natgalore.value_and_grad(loss, tx)
    found["value_and_grad"] = crossings(gradients, params, tx.init(params), jnp.ones((4, 64)))
    return found


def eager_compilations(tx: optax.GradientTransformation, params: Any, steps: int = 3) -> list[int]:
    """The number of programs that each of the first updates outside `jax.jit` compiles."""
    state, compiled, numbers = tx.init(params), [], []

    class Count(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Compiling"):
                compiled.append(record.getMessage())

    logger = logging.getLogger("jax")
    handlers, logger.handlers = logger.handlers, [Count()]
    jax.config.update("jax_log_compiles", True)
    try:
        for _ in range(steps):
            compiled.clear()
            _, state = tx.update(params, state, params)
            numbers.append(len(compiled))
    finally:
        logger.handlers = handlers
        jax.config.update("jax_log_compiles", False)
    return numbers


def twelve_matrices() -> dict[str, Any]:
    normal = jax.random.normal(jax.random.key(0), (64, 256))
    return {f"layer{i}": {"kernel": normal} for i in range(12)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    sources = list(PACKAGE.rglob("*.py"))
    lines = sum(len(path.read_text().splitlines()) for path in sources)
    results: dict[str, Any] = {
        "environment": environment(),
        "modules": len(sources),
        "lines": lines,
        "one_leaf": one_leaf(),
        "eager_compilations": eager_compilations(
            natgalore.natural_galore(1e-3, 16), twelve_matrices()
        )[2],
        "trace_seconds": {},
    }
    print(f"{len(sources)} modules, {lines} lines")
    for name, counts in results["one_leaf"].items():
        print(f"{name:26} {counts}")
    print(f"third eager update: {results['eager_compilations']} programs compiled")
    for name, make in METHODS.items():
        results["trace_seconds"][name] = trace_seconds(make(), args.repeats)
        print(f"{name:30} {results['trace_seconds'][name]:6.2f} s to trace", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
