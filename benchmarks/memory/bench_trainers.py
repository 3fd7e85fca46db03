"""How many bytes of optimizer state does a device hold in other people's trainers?

Trains a toy model on eight simulated devices with each trainer's own train step and shardings,
with AdamW and with the recipe of examples/trainers/, as a user would add it. Each run is a process
of its own; a run that is already in --out is not repeated.

    PYTHONPATH=.:NANODO python benchmarks/memory/bench_trainers.py --out runs/trainers.json

needs, in an environment of its own (Python 3.12), beside what these packages import:

    pip install jax==0.11.1 flax optax orbax-checkpoint equinox clu ml_collections
    pip install --no-deps maxtext==0.2.5
    pip install --no-deps marin-levanter==0.2.227.dev40316220070 marin-haliax
    git clone https://github.com/google-deepmind/nanodo NANODO    (10aefde)

The Linen layouts of MaxText need commit e591f30 of AI-Hypercomputer/maxtext: MAXTEXT_LINEN is the
path of its folder src/maxtext. `--suffix` keeps the figures of an older
version of the library beside those of this one.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
TRAINERS = ("maxtext", "maxtext_models", "levanter", "nanodo", "ours")
CHECKPOINTED = ("FSDP 8", "Linen, FSDP 8")  # layouts whose state is saved and restored
PACKAGES = ("flax", "haliax", "levanter", "marin-haliax", "marin-levanter", "maxtext", "equinox")
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",
}


def run_case(trainer: str, layout: str, optimizer: str, checkpoint: bool) -> dict[str, Any]:
    """One run in a process of its own; `does not run` has the last line of an error."""
    with tempfile.NamedTemporaryFile() as out:
        case = [trainer, layout, optimizer, out.name, *["--checkpoint"] * checkpoint]
        paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-W", "ignore", __file__, "--case", *case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        text = Path(out.name).read_text()
    if text:
        return json.loads(text)
    lines = [line for line in done.stderr.splitlines() if "Error" in line and ": " in line]
    return {"does not run": lines[-1][:300] if lines else f"exit status {done.returncode}"}


def run_here(trainer: str, layout: str, optimizer: str, out: str, checkpoint: bool) -> None:
    module = importlib.import_module(f"benchmarks.memory.trainers.{trainer}")
    Path(out).write_text(json.dumps(module.run(optimizer, layout, checkpoint)))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainers", default=",".join(TRAINERS))
    parser.add_argument("--layouts", help="only layouts whose name contains this text")
    parser.add_argument("--optimizers", default="adamw,natural_galore")
    parser.add_argument("--suffix", default="", help="of the optimizers' names in --out")
    parser.add_argument("--out", type=Path, help="read and write the figures here, as JSON")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return run_here(*args.case, args.checkpoint)

    os.environ.update(ENVIRONMENT)  # before JAX is imported
    from benchmarks.common.environment import environment

    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    found["environment"] = environment() | versions()
    for trainer in args.trainers.split(","):
        module = importlib.import_module(f"benchmarks.memory.trainers.{trainer}")
        layouts = [name for name in module.LAYOUTS if not args.layouts or args.layouts in name]
        for layout in layouts:
            runs = found.setdefault(trainer, {}).setdefault(layout, {})
            for optimizer in args.optimizers.split(","):
                name = optimizer + args.suffix
                if name not in runs:
                    checkpoint = layout in CHECKPOINTED
                    runs[name] = run_case(trainer, layout, optimizer, checkpoint)
                    if args.out:
                        args.out.write_text(json.dumps(found, indent=1) + "\n")
                print(trainer, layout, name, runs[name], sep=", ", flush=True)


if __name__ == "__main__":
    main()
