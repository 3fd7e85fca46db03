"""What does optimizer state in host memory save on the device, and what does it cost?

Trains a Llama on random tokens (bfloat16 activations, float32 weights, scanned and recomputed
layers) with the state on the device, and with parts of it on the host; with one compiled program
for the whole step, or one for the gradients and one for the update. Bytes are those of the compiled
programs, arguments and temporaries. Times are medians.

    python benchmarks/memory/bench_offload.py --size 350m --out benchmarks/results/offload.json
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore
from benchmarks.common.environment import environment
from examples.common import llama


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
    core, window = (
        natgalore.natural_galore(1e-3, rank, fisher=fisher, residual=None)
        for fisher in ("core", "window")
    )
    return {
        "adamw": optax.adamw(1e-3),
        "adamw, moments on the host": natgalore.offload(optax.adamw(1e-3), "moments"),
        "natural_galore, core": core,
        "natural_galore, core, all on the host": natgalore.offload(core),
        "natural_galore, window": window,
        "natural_galore, window on the host": natgalore.offload(window, "window"),
    }


class Run:
    """A training step with `tx`, compiled as one program and as two."""

    def __init__(self, config: llama.LlamaConfig, tx, tokens):
        structure = llama.structure(config)
        device = NamedSharding(jax.make_mesh((1,), ("data",)), P(), memory_kind="device")

        def init(key):
            model = llama.Llama(config, nnx.Rngs(key))
            return nnx.to_pure_dict(nnx.state(model, nnx.Param))

        def gradients(params, tokens):
            loss = lambda p: llama.next_token_loss(nnx.merge(structure, p), tokens)
            return jax.value_and_grad(loss)(params)

        def update(grads, params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def step(params, state, tokens):
            loss, grads = gradients(params, tokens)
            return *update(grads, params, state), loss

        shardings = jax.tree.map(lambda _: device, jax.eval_shape(init, jax.random.key(0)))
        self.tokens = jax.device_put(tokens, device)
        self.params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
        state_shardings = natgalore.state_shardings(tx, self.params, shardings)
        self.state = jax.jit(tx.init, out_shardings=state_shardings)(self.params)
        self.step = (
            jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, state_shardings, device))
            .lower(self.params, self.state, self.tokens)
            .compile()
        )
        self.gradients = (
            jax.jit(gradients, out_shardings=(device, shardings))
            .lower(self.params, self.tokens)
            .compile()
        )
        self.update = (
            jax.jit(update, donate_argnums=(1, 2), out_shardings=(shardings, state_shardings))
            .lower(self.params, self.params, self.state)
            .compile()
        )

    def bytes(self) -> dict[str, int]:
        """State on device and host, and the peak on the device with one program and with two."""
        temporary = lambda program: program.memory_analysis().temp_size_in_bytes
        weights = nbytes(self.params, "device")
        resident = weights + nbytes(self.state, "device")
        largest = max(temporary(self.gradients), temporary(self.update))
        return {
            "state_on_device": nbytes(self.state, "device"),
            "state_on_host": nbytes(self.state, "pinned_host"),
            "device_bytes_one_program": resident + temporary(self.step),
            # The gradients, as large as the weights, pass between the two programs.
            "device_bytes_two_programs": resident + weights + largest,
        }

    def one_program(self) -> jax.Array:
        self.params, self.state, loss = self.step(self.params, self.state, self.tokens)
        return loss

    def two_programs(self) -> jax.Array:
        loss, grads = self.gradients(self.params, self.tokens)
        self.params, self.state = self.update(grads, self.params, self.state)
        return loss


def milliseconds(step, steps: int) -> float:
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times[2:]), 2)


def nbytes(tree, kind: str) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x.sharding.memory_kind == kind)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=llama.CONFIGS, default="350m")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64, help="sequences of 512 tokens")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each variant")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    config = dataclasses.replace(
        llama.CONFIGS[args.size], scan=True, remat=True, dtype=jnp.bfloat16
    )
    shape = (args.batch_size, 513)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocabulary)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    results: dict = {"environment": environment(), "settings": settings, "variants": {}}
    for name, tx in optimizers(args.rank).items():
        if args.only not in name:
            continue
        run = Run(config, tx, tokens)
        figures = run.bytes()
        one = milliseconds(run.one_program, args.steps)
        two = milliseconds(run.two_programs, args.steps)
        figures |= {"milliseconds_one_program": one, "milliseconds_two_programs": two}
        results["variants"][name] = figures
        gib = {key: f"{value / 2**30:6.2f}" for key, value in figures.items()}
        print(
            f"{name:36s} GiB of state: {gib['state_on_device']} on the device "
            f"{gib['state_on_host']} on the host;  in all, and milliseconds, with one program: "
            f"{gib['device_bytes_one_program']} {one:7.1f}, "
            f"two: {gib['device_bytes_two_programs']} {two:7.1f}",
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
