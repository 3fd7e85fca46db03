"""What holds in long runs: the runs of the tables by length, batch and bytes, on several GPUs.

    python benchmarks/learning/bench_long_runs.py --tokens wheels.xz --out runs/long --minutes 9
    python benchmarks/learning/bench_long_runs.py --gpus 2,3 --sizes 6m --share 0.5 ...
    python benchmarks/learning/bench_long_runs.py --list        print the runs that remain

The runs are those of RUNS, in order of importance. Every worker process takes the next run that is
not finished, is not taken by another worker, and can end before the time is over; each finished
run is a file of one line in --out, so the same command continues, and `--done` names files of
results whose runs are not repeated. A run that is cut leaves its records so far, NAME.part.

Runs that differ in rate and seed alone are one program under `vmap`, --together of them: a small
model does not fill a GPU. Their lines have `together`, and their seconds are those of all of them.
"""

import argparse
import collections
import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.common.environment import environment
from benchmarks.learning.convergence import corpus, results
from benchmarks.learning.convergence.search import near
from benchmarks.learning.convergence.training import SIZES, Setting, Start, compiled, train


class Job(NamedTuple):
    """One run.

    Attributes:
      method: as in `bench_convergence.py`.
      rate: peak learning rate.
      size: of the model.
      steps: of the run.
      batch: sequences of 256 tokens per step.
      seed: of batches and initial weights.
      settings: other fields of Setting.
    """

    method: str
    rate: float
    size: str = "33m"
    steps: int = 8000
    batch: int = 64
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def setting(self) -> Setting:
        model = SIZES[self.size]
        defaults: dict[str, Any] = {
            "size": self.size,
            "vocabulary": 8192,
            "steps": self.steps,
            "batch": self.batch,
            "length": 256,
            "rank": model.hidden // 4,
            "refresh_every": 200,
            "rest_rate": 4e-3,
            "dtype": "bfloat16",
            "attention": "cudnn" if jax.default_backend() == "gpu" else "xla",
        }
        return Setting(**(defaults | dict(self.settings)))

    @property
    def name(self) -> str:
        """Of its file: the same in every session."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:16]

    @property
    def seconds(self) -> float:
        """Estimated time of the run alone on one H200, with a compilation."""
        setting, model = self.setting, SIZES[self.size]
        layer = model.hidden * (4 * model.hidden + 3 * model.intermediate)
        weights = model.layers * layer + 2 * model.hidden * setting.vocabulary
        launching = {"adamw_b2_95": 0.2e-3, "muon": 1.4e-3}.get(self.method.partition(":")[0], 8e-4)
        flops = 6 * weights * setting.batch * setting.length
        return 40 + self.steps * (model.layers * launching + flops / 1.5e14)

    @property
    def program(self) -> "Job":
        """Equal for runs of one program."""
        return self._replace(rate=0.0, seed=0)


MOMENTUM = "natural_galore:residual_momentum=0.95"
IN_8_BITS = "+bits=8"
IN_4_BITS = "+bits=8+momentum_bits=4"
GENTLE = {  # Fisher stages
    "power 1/4, damping 1": "+fisher=core+fisher.power=0.25+fisher.damping=1.0",
    "power 1/4": "+fisher=core+fisher.power=0.25",
    "damping 1": "+fisher=core+fisher.damping=1.0",
    "power 1/4, damping 1, decay 0.9": "+fisher=core+fisher.power=0.25+fisher.damping=1.0"
    "+fisher.decay=0.9",
    "power 1/4, damping 1, every step": "+fisher=core+fisher.power=0.25+fisher.damping=1.0"
    "+fisher.root_every=1",
}


def small(method: str, rate: float, **settings: Any) -> Job:
    """6M weights on 115M tokens: 20 tokens per weight."""
    return Job(method, rate, "6m", 7000, settings=tuple(settings.items()))


def middle(method: str, rate: float, **settings: Any) -> Job:
    """11M weights on 225M tokens: 20 tokens per weight."""
    return Job(method, rate, "11m", 13_700, settings=tuple(settings.items()))


def seeds(job: Job) -> Iterator[Job]:
    """The job with three seeds."""
    for seed in range(3):
        yield job._replace(seed=seed)


def around(method: str, rate: float) -> Iterator[Job]:
    """Small runs at twice and half a rate, and with three seeds at the rate."""
    yield from seeds(small(method, rate))
    yield small(method, 2 * rate)
    yield small(method, rate / 2)


def runs() -> Iterator[Job]:
    """All runs, the most telling of each size first."""
    # 6M weights, 20 tokens per weight: three seeds, the rates beside the best, and variants.
    best = MOMENTUM + IN_8_BITS + "+rank=16+residual_scale=0.4"
    main = {
        best: 2.5e-3,
        "muon": 1e-2,
        "adamw_b2_95": 2e-3,
        "natural_galore:bits=8+rank=16": 2.5e-3,
        "muon:bits=8": 1e-2,
    }
    for method, rate in main.items():
        yield from seeds(small(method, rate))
    # Fewer bytes.
    yield from seeds(small(best.replace("rank=16", "rank=8"), 2.5e-3))
    yield from seeds(small("natural_galore:bits=8", 2.5e-3))
    for method, rate in (
        ("adafactor", 1e-3),
        ("galore:bits=8+rank=16", 2.5e-3),
        ("apollo_mini", 8e-3),
    ):
        yield small(method, rate)
    for method, rate in main.items():
        yield small(method, 2 * rate)
        yield small(method, rate / 2)
    yield from seeds(small(best + GENTLE["power 1/4, damping 1"], 2.5e-3))
    yield from around("muon:bits=8+momentum_bits=4", 1e-2)
    yield from around(best.replace(IN_8_BITS, IN_4_BITS), 2.5e-3)
    yield from around("natural_galore:bits=8", 2.5e-3)
    # 6M weights, 20 tokens per weight: with and without momentum, of the residual or before.
    yield small("natural_galore", 2.5e-3)
    yield small(MOMENTUM, 2.5e-3)
    yield small("muon", 1e-2)
    yield small("adamw_b2_95", 2e-3)
    yield small(MOMENTUM + IN_8_BITS + "+rank=16", 2.5e-3)
    yield small("muon", 2e-2)
    yield small("muon:bits=8", 1e-2)
    yield small("adamw_b2_95", 1e-3)
    # Steps of the subspace and of the residual: the rate, and the rate times residual_scale. Muon's
    # best rate is 1e-2 / sqrt(n) in these units, 5e-4 to 7e-4.
    for rate, scale in ((1.25e-3, 0.4), (1.25e-3, 0.8), (2.5e-3, 0.4), (6.25e-4, 0.8)):
        yield small(MOMENTUM + IN_8_BITS + f"+rank=16+residual_scale={scale}", rate)
    yield small(MOMENTUM + IN_4_BITS + "+rank=16", 2.5e-3)
    yield small("muon:bits=8+momentum_bits=4", 1e-2)
    yield small(MOMENTUM + IN_8_BITS + "+rank=16+fisher=core+fisher.power=0.25", 2.5e-3)
    yield small("natural_galore:bits=8+rank=16", 2.5e-3)
    yield small(MOMENTUM, 5e-3)
    yield small(MOMENTUM, 1.25e-3)
    yield small("natural_galore", 1.25e-3)
    yield small("muon", 5e-3)
    yield small(MOMENTUM + IN_4_BITS + "+rank=16", 2.5e-3)
    yield small("natural_galore:bits=8", 2.5e-3)
    yield small("soap", 2e-3)
    yield small("adamw_b2_95", 4e-3)
    for scale in (0.1, 0.4):
        yield small(MOMENTUM + f"+residual_scale={scale}", 2.5e-3)
    yield small(MOMENTUM + "+b1=0.95", 2.5e-3)
    yield small("cosmos:rank=16", 5e-4)
    yield small("muon:bits=8+momentum_bits=4", 1e-2)
    for stage in GENTLE.values():
        yield small(MOMENTUM + stage, 2.5e-3)
    # More weights: the residual's scale by width, and rates below the lowest of small steps.
    smaller = best.replace("residual_scale=0.4", "residual_scale=0.2")
    yield Job(smaller, 2.5e-3)
    yield middle("adamw_b2_95", 2e-3)
    lower = ((smaller, 1.25e-3), (smaller, 6.25e-4), ("muon", 2.5e-3), ("adamw_b2_95", 2.5e-4))
    for method, rate in lower:
        yield Job(method, rate, steps=4000, batch=16)
    yield middle(best.replace("residual_scale=0.4", "residual_scale=0.3"), 2.5e-3)
    # 11M weights, 20 tokens per weight.
    yield middle(best.replace(IN_8_BITS, IN_4_BITS), 2.5e-3)
    yield middle("muon", 1e-2)
    # 33M weights, 4 tokens per weight.
    yield Job("muon", 1e-2)
    yield Job(best, 2.5e-3)
    yield Job(best.replace(IN_8_BITS, IN_4_BITS), 2.5e-3)
    yield Job("natural_galore:bits=8", 2.5e-3)
    yield Job("adamw_b2_95", 1e-3)
    yield Job("muon:bits=8", 1e-2)
    yield Job("natural_galore", 2.5e-3)
    yield Job(MOMENTUM, 2.5e-3)
    # Steps of 4,096 tokens, with decays of averages by steps or by tokens.
    small_steps = ((best, 2.5e-3), ("muon", 1e-2), ("adamw_b2_95", 1e-3))
    for settings in ((), (("decay_tokens", 16_384),)):
        for method, rate in small_steps:
            for peak in (rate / 2, rate):
                yield Job(method, peak, steps=4000, batch=16, settings=settings)
    # 11M weights, 20 tokens per weight: more methods and rates.
    yield middle("soap", 2e-3)
    yield middle(best, 2.5e-3)
    yield middle("natural_galore:bits=8+rank=16", 2.5e-3)
    yield middle("muon:bits=8", 1e-2)
    yield middle("muon", 2e-2)
    yield middle("adamw_b2_95", 1e-3)
    # 33M weights, 1 token per weight: stages of the Fisher beside the momentum.
    for stage in ("", *GENTLE.values()):
        yield Job(MOMENTUM + stage, 2.5e-3, steps=2000)
    # Weight decay and schedules to zero.
    for last in (0.1, 0.0):
        settings = {} if last == 0.1 else {"last_rate": last}
        for method, rate, decays in (
            (best, 2.5e-3, (0.03, 0.1, 0.3)),
            ("muon", 1e-2, (0.01, 0.03, 0.1)),
            ("adamw_b2_95", 2e-3, (0.03, 0.1, 0.3)),
        ):
            for decay in ((0.0,) if settings else ()) + decays:
                colon = "+" if ":" in method else ":"
                name = f"{method}{colon}weight_decay={decay}" if decay else method
                yield small(name, rate, **settings)
    # More seeds of the claims.
    for seed in (1, 2):
        for job in (
            small(MOMENTUM, 2.5e-3),
            small("muon", 1e-2),
            small("adamw_b2_95", 2e-3),
            small("natural_galore", 2.5e-3),
            Job(best, 2.5e-3),
            Job("muon", 1e-2),
        ):
            yield job._replace(seed=seed)


RUNS = list(dict.fromkeys(runs()))


def remaining(args: argparse.Namespace, text: corpus.Corpus | None = None) -> list[Job]:
    """The runs without a result."""
    found = []
    for path in args.done:
        for line in results.lines(path):
            setting = line["setting"] | {"attention": None}
            found.append((line["method"], line["rate"], line["seed"], setting, line["data"]))

    def is_done(job: Job) -> bool:
        asked = job.setting.recorded | {"attention": None}
        return (args.out / f"{job.name}.jsonl").exists() or any(
            (method, seed, setting) == (job.method, job.seed, asked)
            and near(rate, job.rate)
            and (text is None or data == text.about)
            for method, rate, seed, setting, data in found
        )

    shortened = (job._replace(steps=round(job.steps * args.share)) for job in RUNS)
    return [job for job in shortened if job.size in args.sizes and not is_done(job)]


# Peers with a condition on every step, which `vmap` would turn into both of its branches.
ALONE = ("soap", "cosmos", "ldadam", "dion", "fira", "apollo", "apollo_mini")


def claimed(job: Job, taken: Path) -> bool:
    """Takes the job, unless another worker has."""
    try:
        (taken / job.name).mkdir()
    except FileExistsError:
        return False
    return True


def work(args: argparse.Namespace) -> None:
    """One worker: takes runs until the time is over."""
    jax.config.update("jax_compilation_cache_dir", str(args.cache.absolute() / "programs"))
    text = corpus.unpacked(args.tokens)
    taken = args.out / "taken"
    pace = args.workers * args.pace  # processes of one GPU share it
    while True:
        left = args.until - time.time()
        jobs = remaining(args, text)
        alike = collections.Counter(job.program for job in jobs)
        seconds = [together_seconds(job, alike[job.program], args) for job in jobs]
        fitting = (job for job, x in zip(jobs, seconds, strict=True) if x * pace < left)
        first = next((job for job in fitting if claimed(job, taken)), None)
        if first is None:
            print(f"no run fits into {left:.0f} s", flush=True)
            return
        chosen = [first]
        if first.method.partition(":")[0] not in ALONE:
            for job in jobs:
                if len(chosen) < args.together and job.program == first.program:
                    chosen += [job] if claimed(job, taken) else []
        began = time.time()
        try:
            lines = result(chosen, text, args.out)
        except Exception:  # of one program; the others go on
            print(f"{tuple(first)} failed", flush=True)
            traceback.print_exc()
            continue
        pace = 1.1 * (time.time() - began) / together_seconds(first, len(chosen), args)
        for job, line in zip(chosen, lines, strict=True):
            losses = " ".join(f"{results.loss_of(x):.3f}" for x in line["records"][3::4])
            print(f"{tuple(job)}: {losses} in {time.time() - began:.0f} s", flush=True)
            part = args.out / f"{job.name}.part"
            part.rename(part.with_suffix(".jsonl"))


def together_seconds(job: Job, alike: int, args: argparse.Namespace) -> float:
    """Estimated time of the runs of one program: another run costs half of the first."""
    return job.seconds * (1 + min(alike, args.together)) / 2


def result(jobs: list[Job], text: corpus.Corpus, folder: Path) -> list[dict[str, Any]]:
    """The lines of runs in the results file, also written to NAME.part at every validation."""
    first = jobs[0]
    program = compiled(first.method, first.setting, together=len(jobs) > 1)
    about = {
        "setting": first.setting.recorded,
        "data": text.about,
        "environment": environment(),
        "method": first.method,
        "state_bytes": program.state_bytes,
        "matrix_state_bytes": program.matrix_state_bytes,
    }
    about |= {"together": len(jobs)} if len(jobs) > 1 else {}
    lines = [about | {"rate": job.rate, "seed": job.seed, "records": []} for job in jobs]
    starts = [Start(job.rate, job.seed) for job in jobs]
    for records in train(program, first.setting, text, starts):
        for job, line, record in zip(jobs, lines, records, strict=True):
            line["records"].append(record)
            (folder / f"{job.name}.part").write_text(json.dumps(line) + "\n")
    return lines


def supervise(args: argparse.Namespace) -> None:
    """Starts the workers and collects their results in one file."""
    (args.out / "taken").mkdir(parents=True, exist_ok=True)
    for claim in (args.out / "taken").iterdir():
        claim.rmdir()
    processes = []
    for gpu in args.gpus:
        for _ in range(args.workers):
            memory = f"{0.9 / args.workers:.2f}"
            settings = {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_MEM_FRACTION": memory}
            command = [sys.executable, *sys.argv, "--until", str(args.until)]
            processes.append(subprocess.Popen(command, env=os.environ | settings))
    codes = [process.wait() for process in processes]
    lines = [line for path in sorted(args.out.glob("*.jsonl")) for line in results.lines(path)]
    args.collect.unlink(missing_ok=True)
    for line in lines:
        results.append(args.collect, line)
    print(f"{len(remaining(args))} runs remain; workers ended with {codes}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, help="of corpus.pack")
    parser.add_argument("--out", type=Path, default="runs/long")
    parser.add_argument(
        "--done",
        type=lambda x: [*map(Path, x.split(","))],
        default=[Path("benchmarks/results/long-runs.jsonl")],
        help="files of results, separated by commas",
    )
    parser.add_argument(
        "--collect", type=Path, default="runs/long-runs.jsonl", help="all results of --out"
    )
    parser.add_argument("--cache", type=Path, default="runs/cache", help="of compiled programs")
    parser.add_argument("--gpus", type=lambda x: x.split(","), default=["0"])
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes of one GPU; with 5 a step of AdamW took 23 ms, of ours more than 70 ms",
    )
    parser.add_argument(
        "--together", type=int, default=6, help="runs of one program, of several rates and seeds"
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--pace", type=float, default=1.0, help="factor of the estimated times of first runs"
    )
    parser.add_argument(
        "--sizes", type=lambda x: x.split(","), default=[*SIZES], help="of the models"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of every run")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print the remaining runs")
    return parser.parse_args()


def main():
    args = arguments()
    if args.list:
        for job in remaining(args):
            print(f"{job.seconds:5.0f} s", *job)
    elif args.until:
        work(args)
    else:
        args.until = time.time() + 60 * args.minutes
        supervise(args)


if __name__ == "__main__":
    main()
