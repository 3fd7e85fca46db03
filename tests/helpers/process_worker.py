"""Trains on a mesh of all processes' devices; test_processes.py runs it as several.

    python -m tests.helpers.process_worker FOLDER PROCESSES ID PORT SECONDS

The jobs in FOLDER/jobs.json are done one after the other by all processes together; the weights
that each ends with are in FOLDER/<its name>.npz. After SECONDS a process tells where it stands and
exits, whatever became of who started it.
"""

import dataclasses
import faulthandler
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgalore_jax as natgalore


DEVICES = 4
SAVED_AT, STEPS = 3, 6  # with refresh_every=2 each matrix is refreshed before, and twice after
LAYOUT = {
    "layers": ((4, 8, 12), P("fsdp")),
    "up": ((16, 24), P("fsdp", "tensor")),
    "norm": ((24,), P()),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to the end, from the start or from a checkpoint.

    Attributes:
      name: of the file with the weights at the end.
      mesh: sizes of its axes, fsdp and tensor.
      kind: of its axes, `"Auto"` or `"Explicit"`.
      settings: of `natural_galore`.
      start: the checkpoint to start from, or None.
      save: where to save one on the way, or None.
      leaves: of LAYOUT.
    """

    name: str
    mesh: tuple[int, int] = (DEVICES, 1)
    kind: str = "Explicit"
    settings: dict = dataclasses.field(default_factory=dict)
    start: str | None = None
    save: str | None = None
    leaves: tuple[str, ...] = ("up", "norm")


def numbers(seed, leaves):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=LAYOUT[name][0]).astype("float32") for name in leaves}


def run(job):
    """The weights at the end, whole, in every process."""
    kinds = (AxisType[job.kind],) * 2
    devices = jax.devices()[:DEVICES]
    mesh = jax.make_mesh(job.mesh, ("fsdp", "tensor"), axis_types=kinds, devices=devices)
    lies = {name: NamedSharding(mesh, LAYOUT[name][1]) for name in job.leaves}
    tx, step = optimizer(json.dumps(job.settings))

    def put(seed):
        return {
            name: jax.make_array_from_callback(x.shape, lies[name], x.__getitem__)
            for name, x in numbers(seed, job.leaves).items()
        }

    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        params = put(0)
        of_state = natgalore.state_shardings(tx, params, lies)
        if job.start is None:
            first, state = 0, jax.jit(tx.init, out_shardings=of_state)(params)
        else:
            first = SAVED_AT
            saved = jax.eval_shape(lambda: (params, tx.init(params)))
            place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            target = jax.tree.map(place, saved, (lies, of_state))
            params, state = checkpointer.restore(job.start, target)
        for i in range(first, STEPS):
            if job.save is not None and i == SAVED_AT:
                checkpointer.save(job.save, (params, state))
            params, state = step(params, state, put(i + 1))
        return multihost_utils.process_allgather(params, tiled=True)


@functools.cache
def optimizer(settings):
    """The optimizer and its compiled step: jobs that share them share the compilation."""
    settings = {"fisher": "core", "residual": None} | json.loads(settings)
    tx = natgalore.natural_galore(1e-2, 3, refresh_every=2, weight_decay=0.1, **settings)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def main(folder, processes, number, port, seconds):
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    folder, processes, number = Path(folder), int(processes), int(number)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    address = f"localhost:{port}"
    jax.distributed.initialize(address, processes, number, coordinator_bind_address=address)
    (folder / f"connected.{number}").touch()
    for job in json.loads((folder / "jobs.json").read_text()):
        weights = run(Job(**job))
        if number == 0:
            np.savez(folder / f"{job['name']}.npz", **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
