"""The README's training table: examples/pretrain.py at its defaults, once for each optimizer.

Runs them one after the other, each in a process of its own, writes the final losses, state bytes
and times, and draws all of them in one figure. A run that has its figure already is not repeated.

    python benchmarks/bench_pretrain.py [--runs runs/bench] [--out benchmarks/results/pretrain.json]
                                        [--figure docs/pretrain.png] [-- --steps 100 ...]
"""

import argparse
import json
import pathlib
import subprocess
import sys


sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import report


OPTIMIZERS = ("natural_galore", "galore", "adamw", "contrib_galore")
PRETRAIN = pathlib.Path(report.__file__).with_name("pretrain.py")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    parser.add_argument("--figure", type=pathlib.Path, help="draw the losses here")
    parser.add_argument("settings", nargs="*", help="for pretrain.py, after --")
    args = parser.parse_args()

    runs = []
    for optimizer in OPTIMIZERS:
        folder = args.runs / optimizer
        if not (folder / "loss.png").exists():  # drawn last: a run without it was cut off
            command = [sys.executable, PRETRAIN, "--optimizer", optimizer]
            command += ["--out", folder, "--overwrite", *args.settings]
            subprocess.run(command, check=True)
        runs.append(report.read(folder / "log.jsonl"))

    report.show_table(runs)
    results = {
        "environment": runs[0].header["environment"],
        "config": {k: v for k, v in runs[0].header["config"].items() if k != "out"},
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
        report.plot(runs, args.figure)


if __name__ == "__main__":
    main()
