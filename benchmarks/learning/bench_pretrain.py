"""How do four optimizers compare in `pretrain.py` at its defaults?

Writes the final losses, state bytes and times for the README, and draws the losses. An interrupted
comparison resumes: runs that the folder --runs already holds are not repeated.

    python benchmarks/learning/bench_pretrain.py [--runs runs/bench]
                                        [--out benchmarks/results/pretrain.json]
                                        [--figure docs/pretrain.png] [-- --steps 100 ...]
"""

import argparse
import json
import pathlib
import subprocess
import sys

from examples.common import run_display, run_log
from examples.pretraining import pretrain


OPTIMIZERS = ("natural_galore", "galore", "adamw", "contrib_galore")
PRETRAIN = pathlib.Path(pretrain.__file__)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    parser.add_argument("--figure", type=pathlib.Path, help="draw the losses here")
    parser.add_argument("settings", nargs="*", help="for pretrain.py, after --")
    args = parser.parse_args()

    begun = (args.runs / "log.jsonl").exists()
    what = ["--resume"] if begun else ["--compare", ",".join(OPTIMIZERS)]
    subprocess.run(
        [sys.executable, PRETRAIN, "--out", args.runs, *what, *args.settings], check=True
    )
    runs = [run_log.read(args.runs / optimizer / "log.jsonl") for optimizer in OPTIMIZERS]

    results = {
        "environment": runs[0].header["environment"],
        "config": runs[0].header["config"],
        "data": runs[0].header["data"],
    }
    for run in runs:
        results[run.name] = {
            "learning_rate": run.header["config"]["lr"],
            "train_loss": run.losses("train_loss")[1][-1],
            "validation_loss": run.losses("validation_loss")[1][-1],
            "state_bytes": run.header["state_bytes"],
            "tokens_per_second": run.tokens_per_second(),
            "seconds": run.records[-1]["seconds"],
        }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.figure:
        run_display.plot(runs).savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
