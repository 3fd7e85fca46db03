"""Does it learn better? A Llama under many optimizers, each at its own best learning rate.

    python benchmarks/learning/bench_convergence.py --methods adamw,galore,natural_galore
    python benchmarks/learning/bench_convergence.py --methods galore:refresh_every=20+basis=svd
    python benchmarks/learning/bench_convergence.py --size toy    a run of a minute on a CPU
    python benchmarks/learning/bench_convergence.py --show        print the tables of --out
    python benchmarks/learning/bench_convergence.py --show --figure loss.png  draw this setting,
                                                         all methods or those of --methods

All methods share data, data order, schedule and initial weights. Each method's learning rate is
searched among at least four; the best one is run with more seeds. Every finished run is one line
of --out, so an interrupted search resumes and no run is repeated.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.common.environment import environment
from benchmarks.learning.convergence import corpus, results
from benchmarks.learning.convergence.contenders import contender
from benchmarks.learning.convergence.search import next_run
from benchmarks.learning.convergence.training import SIZES, Setting, Start, compiled, train


USUAL = {  # size: vocabulary, steps, batch, length
    "toy": (512, 60, 8, 64),
    "11m": (8192, 1000, 64, 256),
    "33m": (8192, 1000, 64, 256),
    "60m": (32_000, 1000, 64, 256),
    "130m": (32_000, 2000, 128, 256),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda x: x.split(",")
    parser.add_argument("--size", choices=SIZES, default="33m")
    parser.add_argument("--methods", type=words, help="adamw,galore,natural_galore by default")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best rate")
    parser.add_argument("--rate", type=float, help="use this learning rate, without a search")
    parser.add_argument(
        "--finer", action="store_true", help="also try rates half a step from the best"
    )
    parser.add_argument(
        "--rest-rate", type=float, default=4e-3, help="learning rate of embedding, head, norms"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="sequences in a step")
    parser.add_argument("--length", type=int, help="tokens in a sequence")
    parser.add_argument(
        "--vocabulary", type=int, help="number of tokens, by default that of the size"
    )
    parser.add_argument("--rank", type=int, help="a quarter of the width by default")
    parser.add_argument(
        "--refresh-every",
        type=int,
        default=200,
        help="steps between bases of all but natural_galore, which has its own (:refresh_every=20)",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--dataset",
        choices=corpus.DATASETS,
        default="python",
        help="Python files, installed or of fetched wheels; descriptions of packages; or C4",
    )
    parser.add_argument("--tokens", type=Path, help="read these tokens, of corpus.pack, instead")
    parser.add_argument(
        "--last-rate", type=float, default=0.1, help="last learning rates, as a share of the peak"
    )
    parser.add_argument(
        "--decay-tokens",
        type=int,
        help="tokens of a step at which b1, b2, ... hold; elsewhere the same half-lives in tokens",
    )
    parser.add_argument("--texts", type=int, help="maximum number of texts")
    parser.add_argument(
        "--cache", type=Path, default="runs/cache", help="folder of tokens and compiled programs"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time")
    parser.add_argument("--out", type=Path, default="runs/convergence.jsonl")
    parser.add_argument("--figure", type=Path, help="draw the losses to this file")
    parser.add_argument(
        "--show", action="store_true", help="run nothing, print the tables of --out"
    )
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    args = parser.parse_args()
    args.drawn = args.methods  # None draws all
    args.methods = args.methods or ["adamw", "galore", "natural_galore"]
    try:
        args.methods = {name: contender(name).first for name in args.methods}
    except ValueError as error:
        parser.error(str(error))
    for name in ("seeds", "steps", "batch", "length", "rank", "refresh_every", "texts"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    sizes = corpus.VOCABULARIES
    if args.vocabulary is not None and args.vocabulary not in sizes:
        parser.error(f"--vocabulary is from {sizes[0]} to {sizes[-1]}, got {args.vocabulary}")
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    vocabulary, steps, batch, length = USUAL[args.size]
    quick = jax.default_backend() == "gpu" and args.dtype == "bfloat16"
    return Setting(
        size=args.size,
        vocabulary=args.vocabulary or vocabulary,
        steps=args.steps or steps,
        batch=args.batch or batch,
        length=args.length or length,
        rank=args.rank or SIZES[args.size].hidden // 4,
        refresh_every=args.refresh_every,
        rest_rate=args.rest_rate,
        dtype=args.dtype,
        attention="cudnn" if quick else "xla",
        last_rate=args.last_rate,
        decay_tokens=args.decay_tokens,
    )


def search(args: argparse.Namespace, setting: Setting, text: corpus.Corpus) -> None:
    """Runs until the search is complete or the time is over."""
    until = time.time() + 60 * args.minutes
    about = {"setting": setting.recorded, "data": text.about}
    header: dict[str, Any] = about | {"environment": environment()}
    programs: dict[str, Any] = {}
    while time.time() < until:
        done = results.read(args.out, about)
        if args.rate is None:
            run = next_run(args.methods, args.seeds, [one.done for one in done], args.finer)
        else:
            asked = [(name, args.rate, seed) for seed in range(args.seeds) for name in args.methods]
            made = [one.done[:3] for one in done]
            run = next((one for one in asked if one not in made), None)
        if run is None:
            return
        name, rate, seed = run
        if name not in programs:
            programs = {name: compiled(name, setting)}  # one at a time: programs hold memory
        program, records = programs[name], []
        print(f"{name}, rate {rate:g}, seed {seed}: ", end="", flush=True)
        began = time.time()
        for (record,) in train(program, setting, text, [Start(rate, seed)]):
            records.append(record)
            if len(records) % 4 == 0 or record["validation_loss"] is None:
                print(f"{results.loss_of(record):.3f} ", end="", flush=True)
        print(f"in {time.time() - began:.0f} s", flush=True)
        sizes = {name: getattr(program, name) for name in ("state_bytes", "matrix_state_bytes")}
        line = header | {"method": name, "rate": rate, "seed": seed, **sizes, "records": records}
        results.append(args.out, line)


def main():
    args = arguments()
    jax.config.update("jax_compilation_cache_dir", str(args.cache.absolute() / "programs"))
    setting = setting_of(args)
    if not args.show:
        try:
            if args.tokens:
                text = corpus.unpacked(args.tokens)
                args.dataset = text.about["dataset"]
            else:
                text = corpus.load(args.dataset, setting.vocabulary, args.cache, args.texts)
        except ValueError as error:
            sys.exit(f"error: {error}")
        shortest = min(len(text.train), len(text.validation))
        if shortest <= setting.length + 1:
            sys.exit(f"error: {shortest} tokens are too few for sequences of {setting.length}")
        print(", ".join(f"{name} {value}" for name, value in text.about.items()), flush=True)
        try:
            search(args, setting, text)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command resumes after the finished runs")
    asked = setting.recorded | {"attention": None}  # which depends on the device
    for about, runs in results.groups(args.out):
        this = about["setting"] | {"attention": None} == asked
        this &= about["data"]["dataset"] == args.dataset
        if args.show or this:
            if args.markdown:
                print(results.markdown(runs))
            else:
                console = Console(width=None if sys.stdout.isatty() else 140)
                console.print(results.table(about, runs))
        if args.figure and this:
            drawn = [run for run in runs if not args.drawn or run.method in args.drawn]
            results.draw(drawn).savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
