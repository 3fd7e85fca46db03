"""How many bytes does a residual move between devices on a step without refresh?

Counted in the compiled update of one weight on 4 x 2 simulated CPU devices: bytes that one device
receives, for each sharding of the weight and each residual. Nothing is run.

    python benchmarks/speed/bench_residual_traffic.py --out benchmarks/results/residual-traffic.json
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import natgalore_jax as natgalore
from benchmarks.common.environment import environment
from benchmarks.common.hlo import collectives


RESIDUALS = ("isotropic", "whitened")
CASES = (  # shape of the weight, its partition spec
    ((256, 512), ("fsdp", None)),
    ((256, 512), (None, "fsdp")),
    ((256, 512), ("fsdp", "tensor")),
    ((4, 256, 512), (None, "fsdp", None)),
    ((4, 256, 512), ("fsdp", None, None)),
)


def received(
    shape: tuple[int, ...], spec: tuple[str | None, ...], residual: str, rank: int = 16
) -> int:
    """Bytes that one device receives on every step of `galore` with this residual."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = {"kernel": NamedSharding(mesh, PartitionSpec(*spec))}
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings["kernel"])}
    tx = natgalore.galore(1e-2, rank, refresh_every=4, residual=residual)
    tx = natgalore.sharded(tx, shardings)
    state_shardings = natgalore.state_shardings(tx, params, shardings)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(jax.eval_shape(tx.init, params), state_shardings),
    )
    update = jax.jit(tx.update, out_shardings=(shardings, state_shardings))
    program = update.lower(params, state, params).compile().as_text()
    return round(sum(one.times * one.received for one in collectives(program) if one.hot))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    results: dict = {"environment": environment(), "cases": []}
    for shape, spec in CASES:
        row = {"shape": shape, "sharding": spec}
        row |= {residual: received(shape, spec, residual) for residual in RESIDUALS}
        results["cases"].append(row)
        print(row, flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
