"""Which tables of README.md and docs/*.md are out of date with benchmarks/results?

A page marks each generated table with two comments; only the text between them is replaced:

    <!-- table: NAME -->

    | ... |

    <!-- end -->

    python -m benchmarks.common.doc_tables            rewrites the tables of all pages
    python -m benchmarks.common.doc_tables --check    lists the pages that are out of date, exits 1
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.learning import (
    bench_finetune_text as study,
    bench_function_calling as calls,
    draw_frontier,
)
from benchmarks.learning.convergence import results as convergence
from benchmarks.learning.convergence.search import near


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
NAMES = {"contrib_galore": "optax.contrib.galore", "muon": "optax.contrib.muon"}
OURS = ("galore", "natural_galore_fisher")

Row = tuple[str, ...]
TABLES: dict[str, Callable[[], str]] = {}


def table(name: str, *header: str) -> Callable[[Callable[[], Iterable[Row]]], Callable]:
    """Registers a function that yields the rows of the table `name`."""

    def register(rows: Callable[[], Iterable[Row]]) -> Callable[[], Iterable[Row]]:
        TABLES[name] = lambda: markdown(header, rows())
        return rows

    return register


def markdown(header: Row, rows: Iterable[Row]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown(("rank", "MB"), [("8", "0.5")]))
        | rank | MB |
        | --- | --- |
        | 8 | 0.5 |
    """
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def regenerated(page: str) -> str:
    """The text of a page with its tables generated anew.

    Raises:
      KeyError: the page marks a table that no function here generates.
    """
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def pages() -> list[Path]:
    docs = sorted((ROOT / "docs").glob("*.md"))
    return [ROOT / "README.md", *docs, ROOT / "examples/tpu.md"]


@cache
def read(name: str) -> Any:
    """A results file: JSON by the name without its suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def trained(name: str) -> dict[str, Any]:
    """The methods of bench_train.py in its results for one device."""
    return read(name)["layouts"]["data"]["methods"]


code = lambda name: f"`{NAMES.get(name, name)}`"
megabytes = lambda n, digits=0: f"{n / 1e6:,.{digits}f} MB"
gigabytes = lambda n: f"{n / 1e9:.1f} GB"
gib = lambda n: f"{n / 2**30:.2f} GiB"
ratio = lambda x, reference: f"{x / reference:.2f}"
device = lambda name: read(name)["environment"]["device"].split(" ")[1]


# --- Other people's trainers: benchmarks/memory/bench_trainers.py ---------------------------------


TRAINERS = {
    "maxtext": "MaxText",
    "levanter": "Levanter",
    "nanodo": "nanodo",
    "ours": "`sharded`, this library's Llama",
}


def trainer_runs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Trainer, layout and runs by optimizer."""
    for name, trainer in TRAINERS.items():
        yield from ((trainer, layout, runs) for layout, runs in read("trainers")[name].items())


@table("trainers", "trainer", "layout", "AdamW", "Natural GaLore", "to AdamW")
def trainers() -> Iterator[Row]:
    for trainer, layout, runs in trainer_runs():
        adamw, ours = (runs[name]["device_bytes"] for name in ("adamw", "natural_galore"))
        yield trainer, layout, megabytes(adamw, 3), megabytes(ours, 3), ratio(ours, adamw)


@table("trainer-models", "model in MaxText", "AdamW", "Natural GaLore", "to AdamW")
def trainer_models() -> Iterator[Row]:
    for layout, runs in read("trainers")["maxtext_models"].items():
        sizes = [runs[name]["device_bytes"] for name in ("adamw", "natural_galore")]
        yield layout, *(gigabytes(n) for n in sizes), ratio(sizes[1], sizes[0])


@table(
    "trainers-compile",
    *("trainer", "layout", "AdamW", "Natural GaLore", "to AdamW", "the same without residual"),
)
def trainers_compile() -> Iterator[Row]:
    seconds = lambda run: f"{run['process_seconds']:.0f} s" if run else ""
    for trainer, layout, runs in trainer_runs():
        adamw, ours = (runs[name] for name in ("adamw", "natural_galore"))
        share = ratio(ours["process_seconds"], adamw["process_seconds"])
        yield trainer, layout, seconds(adamw), seconds(ours), share, seconds(runs.get("galore"))


# --- The update alone: benchmarks/speed/bench_step.py ---------------------------------------------


@table(
    "update-350m",
    *("optimizer", "step without refresh, ms", "to AdamW", "slowest step / median"),
    *("first step, ms", "compile, s", "temporary", "state"),
)
def update_350m() -> Iterator[Row]:
    methods = read("step")["trees"][0]["methods"]
    for name, row in methods.items():
        yield (
            code(name),
            f"{row['hot_ms']:.2f}",
            ratio(row["hot_ms"], methods["adamw"]["hot_ms"]),
            ratio(row["slowest_ms"], row["median_ms"]),
            f"{row['first_ms']:.0f}",
            f"{row['compile_seconds']:.1f}",
            megabytes(row["temp_bytes"]),
            megabytes(row["state_bytes"]),
        )


@table(
    "update-dtypes",
    *("device", "weights", "weight decay", "`adamw`, ms"),
    *("`galore` to it", "`natural_galore_fisher` to it"),
)
def update_dtypes() -> Iterator[Row]:
    for name in ("step", "step-h100"):
        for tree in read(name)["trees"][:3]:
            adamw, *ours = (tree["methods"][method]["hot_ms"] for method in ("adamw", *OURS))
            cells = (tree["dtype"], f"{tree['decay']}", f"{adamw:.2f}")
            yield (device(name), *cells, *(ratio(x, adamw) for x in ours))


@table("trace", "update of an unrolled Llama 350m", "trace, s", "to AdamW")
def trace() -> Iterator[Row]:
    seconds = read("trace")["trace_seconds"]
    for name, taken in seconds.items():
        yield f"`{name}`", f"{taken:.2f}", ratio(taken, seconds["adamw"])


@table(
    "tpu",
    *("training step", "chips", "optimizer", "fits", "peak, GiB", "weights + state, GiB"),
    *("temporaries, GiB", "received per step, GiB", "compile, s"),
)
def tpu() -> Iterator[Row]:
    for run in read("tpu")["runs"]:
        if run["tokens"]:
            for name, row in run["methods"].items():
                yield (f"Llama {run['model']}", run["topology"], code(name), *tpu_cells(row))


def tpu_cells(row: dict[str, Any]) -> Row:
    gib = lambda *kinds: f"{sum(row[kind] for kind in kinds) / 2**30:.2f}"
    if "peak" not in row:
        return ("no", "", gib("weights", "state"), "", "", "")
    return (
        "yes" if row["fits"] else "no",
        gib("peak"),
        gib("weights", "state"),
        gib("temporaries"),
        gib("moved") if "moved" in row else "",
        f"{row['compile_seconds']:.0f}",
    )


@table(
    "tpu-update",
    *("update, Llama 350m on v5e:2x4", "compile before, s", "now", "code before, MB", "now"),
    *("temporaries before, MB", "now"),
)
def tpu_update() -> Iterator[Row]:
    before, now = (read(name)["runs"][0]["methods"] for name in ("tpu-update-before", "tpu-update"))
    for name, row in now.items():
        cells = []
        for kind, unit, digits in (
            ("compile_seconds", 1, 1),
            ("code", 1e6, 1),
            ("temporaries", 1e6, 0),
        ):
            cells += [f"{x[kind] / unit:.{digits}f}" for x in (before[name], row)]
        yield (code(name), *cells)


@table("tpu-pieces", "matrix and operation", "compile, s", "code, MB")
def tpu_pieces() -> Iterator[Row]:
    for name, row in read("tpu-pieces")["pieces"].items():
        yield (name, f"{row['compile_seconds']:.1f}", f"{row['code'] / 1e6:.2f}")


@table(
    "update-residual",
    *("optimizer", "residual", "mean update, ms", "to AdamW", "slowest step / median"),
    *("compile, s", "temporary"),
)
def update_residual() -> Iterator[Row]:
    methods = read("step-residual")["trees"][0]["methods"]
    residuals = {"galore": "None", "galore_isotropic": '`"isotropic"`'}
    residuals |= {"natural_galore": '`"whitened"`', "adamw": "", "muon": ""}
    for name, row in methods.items():
        yield (
            code(name.removesuffix("_isotropic")),
            residuals[name],
            f"{row['mean_ms']:.1f}",
            ratio(row["mean_ms"], methods["adamw"]["mean_ms"]),
            ratio(row["slowest_ms"], row["median_ms"]),
            f"{row['compile_seconds']:.1f}",
            megabytes(row["temp_bytes"]),
        )


@table(
    "orthogonalize",
    *("matrices", "Muon's five steps, ms", "direct, ms", "Gram, ms"),
    *("error of Muon's", "of direct", "of Gram"),
)
def orthogonalize() -> Iterator[Row]:
    cases = {(x["batch"], x["m"], x["n"]): x["methods"] for x in read("orthogonalize")["cases"]}
    methods = ("muon", "direct", "gram")
    for batch, m, n in sorted(cases):
        if batch == 24:
            times = (f"{cases[batch, m, n][name]['ms']:.2f}" for name in methods)
            one = cases.get((1, m, n), {})
            errors = (one.get(name, {}).get("gaussian", {}).get("error") for name in methods)
            yield f"{batch} x {m} x {n}", *times, *("" if x is None else f"{x:.3f}" for x in errors)


@table(
    "profile",
    *("model", "in all", "products", "reductions", "copies", "other"),
    *("one pass over gradients, weights and state", "kernels"),
)
def profile() -> Iterator[Row]:
    for name, row in read("profile")["updates"].items():
        kinds = (row["by_kind_ms"][kind] for kind in ("product", "reduction", "copy", "other"))
        times = (row["device_ms"], *kinds, row["unavoidable_ms"])
        yield name.split(",")[0], *(f"{x:.1f}" for x in times), f"{row['kernels']:.0f}"


@table(
    "update-unrolled",
    *("tree", "optimizer", "step without refresh, ms", "to AdamW", "to `optax.contrib.galore`"),
    *("slowest step / median", "refreshes of 200 steps, ms", "compile, s"),
)
def update_unrolled() -> Iterator[Row]:
    for tree in read("step")["trees"][3:]:
        methods = tree["methods"]
        for name, row in methods.items():
            yield (
                tree["tree"],
                code(name),
                f"{row['hot_ms']:.2f}",
                ratio(row["hot_ms"], methods["adamw"]["hot_ms"]),
                ratio(row["hot_ms"], methods["contrib_galore"]["hot_ms"]),
                f"{row['slowest_ms'] / row['median_ms']:.1f}",
                f"{row['refreshes_ms']:,.0f}",
                f"{row['compile_seconds']:.1f}",
            )


@table(
    "update-scaling",
    *("width", "rank", "layers", "`adamw`, ms", "`galore`, ms", "`natural_galore_fisher`, ms"),
)
def update_scaling() -> Iterator[Row]:
    for row in itertools.chain.from_iterable(read("step")["scaling"].values()):
        sizes = (str(row[name]) for name in ("width", "rank", "layers"))
        yield (*sizes, *(f"{row['methods'][x]['hot_ms']:.2f}" for x in ("adamw", *OURS)))


@table(
    "update-cpu",
    *("optimizer", "step without refresh, ms", "to `optax.contrib.galore`"),
    *("slowest step / median", "slowest, ms"),
)
def update_cpu() -> Iterator[Row]:
    methods = read("step-cpu")["trees"][0]["methods"]
    for name, row in methods.items():
        yield (
            code(name),
            f"{row['hot_ms']:.2f}",
            ratio(row["hot_ms"], methods["contrib_galore"]["hot_ms"]),
            ratio(row["slowest_ms"], row["median_ms"]),
            f"{row['slowest_ms']:.1f}",
        )


@table(
    "arithmetic",
    *("products in", "R = PᵀG, ms", "W + P U + a W, ms", "relative error of R", "of P U"),
)
def arithmetic() -> Iterator[Row]:
    labels = {
        "high": "tensor-float32 (`HIGH`, used by this library)",
        "BF16_BF16_F32_X3": "three bfloat16 products",
        "TF32_TF32_F32_X3": "three tensor-float32 products",
        "highest": "float32 (`HIGHEST`)",
    }
    for name, label in labels.items():
        row = read("matmul")["350m, float32"][name]
        times = (f"{row['down_ms']:.2f}", f"{row['up_ms']:.2f}")
        yield (label, *times, f"{row['down_error']:.0e}", f"{row['up_error']:.0e}")


# --- A training step: benchmarks/speed/bench_train.py ---------------------------------------------


@table(
    "train",
    *("model", "device", "layers recomputed", "optimizer", "tokens/s", "to AdamW"),
    *("slowest step / median", "weights and state"),
)
def train() -> Iterator[Row]:
    labels = {"galore_isotropic": '`galore`, `residual="isotropic"`'}
    labels |= {"galore_every_200": "`galore`, `refresh_every=200`"}
    for name in ("train-350m", "train-residual", "train-60m", "train-1b"):
        settings, methods = read(name)["settings"], trained(name)
        model = (settings["size"], device(name), "yes" if settings["remat"] else "no")
        speed = methods["adamw"]["tokens_per_second"]
        for method in (
            "adamw",
            "galore_every_200",
            *OURS,
            "galore_isotropic",
            "natural_galore",
            "muon",
        ):
            if row := methods.get(method):
                yield (
                    *model,
                    labels.get(method, code(method)),
                    f"{row['tokens_per_second']:,.0f}",
                    ratio(row["tokens_per_second"], speed),
                    ratio(row["slowest_step_seconds"], row["median_step_seconds"]),
                    megabytes(row["argument_bytes"]),
                )


@table(
    "async",
    *("model", "tokens a step", "optimizer", "step, ms", "to AdamW"),
    *("waiting after each, ms", "to AdamW"),
)
def asynchronous() -> Iterator[Row]:
    for name in ("async-60m", "async-350m"):
        settings, methods = read(name)["settings"], read(name)["methods"]
        about = (settings["size"], f"{settings['batch'] * settings['seq_len']:,}")
        for method, row in methods.items():
            recipe = method.removesuffix("_two_programs")
            kinds = ("block_step_seconds", "waited_step_seconds")
            yield (
                *about,
                code(recipe) + ", `refresh_bases`" * (recipe != method),
                *(
                    cell
                    for kind in kinds
                    for cell in (f"{1e3 * row[kind]:.1f}", ratio(row[kind], methods["adamw"][kind]))
                ),
            )


@table(
    "train-8-bits",
    *("optimizer", "tokens/s", "to AdamW", "weights and state", "temporary", "peak"),
)
def train_8_bits() -> Iterator[Row]:
    methods = trained("quantized-1b")
    for name, row in methods.items():
        sizes = (gigabytes(row[f"{kind}_bytes"]) for kind in ("argument", "temp", "peak"))
        speed = row["tokens_per_second"]
        yield (
            code(name),
            f"{speed:,.0f}",
            ratio(speed, methods["adamw"]["tokens_per_second"]),
            *sizes,
        )


@table(
    "train-cores",
    *("model", "rank", "micro-batches", "optimizer", "tokens/s", "to AdamW"),
    *("slowest step / median", "temporary", "peak"),
)
def train_cores() -> Iterator[Row]:
    for size, rank, many in itertools.product(("350m", "1b"), (128, 512), ("", "-8")):
        name = f"cores-{size}{'' if rank == 128 else f'-{rank}'}{many}"
        methods = trained(name)
        for method, row in methods.items():
            speed = row["tokens_per_second"]
            yield (
                size,
                str(rank),
                str(read(name)["settings"]["micro_batches"]),
                code(method),
                f"{speed:,.0f}",
                ratio(speed, methods["adamw"]["tokens_per_second"]),
                f"{row['slowest_step_seconds'] / row['median_step_seconds']:.1f}",
                megabytes(row["temp_bytes"]),
                megabytes(row["peak_bytes"]),
            )


@table("cores-moved", "optimizer", "all-reduced in a step", "to AdamW")
def cores_moved() -> Iterator[Row]:
    methods = trained("cores-moved")
    moved = lambda name: methods[name]["collectives"]["every step"]["all-reduce"]["bytes"]
    for name in methods:
        yield code(name), megabytes(moved(name)), ratio(moved(name), moved("adamw"))


@table(
    "two-gpus",
    *("layout", "optimizer", "tokens/s", "to AdamW", "slowest step / median"),
    *("weights and state per device", "received per step", "more at a refresh"),
)
def two_gpus() -> Iterator[Row]:
    for layout, measured in read("sharded")["layouts"].items():
        methods = measured["methods"]
        for name, row in methods.items():
            unrolled = name in ("contrib_galore", "adamw_unrolled")
            adamw = methods["adamw_unrolled" if unrolled else "adamw"]
            received = (
                sum(kind["bytes"] for kind in row["collectives"].get(when, {}).values())
                for when in ("every step", "refresh")
            )
            yield (
                f"{layout}, unrolled" if unrolled else layout,
                code(name.removesuffix("_unrolled")),
                f"{row['tokens_per_second']:,.0f}",
                ratio(row["tokens_per_second"], adamw["tokens_per_second"]),
                ratio(row["slowest_step_seconds"], row["median_step_seconds"]),
                megabytes(row["argument_bytes"]),
                *map(megabytes, received),
            )


@table("residual-traffic", "matrix", "sharding", '`"isotropic"`', '`"whitened"`')
def residual_traffic() -> Iterator[Row]:
    for row in read("residual-traffic")["cases"]:
        shape = " x ".join(map(str, row["shape"]))
        received = (f"{row[residual]:,}" for residual in ("isotropic", "whitened"))
        yield shape, f"`P({', '.join(map(str, row['sharding']))})`", *received


# --- Bytes: benchmarks/memory ---------------------------------------------------------------------


@table("bytes", "", *(f"{x}, {y}" for x in ("1b", "7b") for y in ("float32", "bfloat16")))
def bytes_of_llama() -> Iterator[Row]:
    figures = read("bytes")
    cases = [figures[size][dtype] for size in ("1b", "7b") for dtype in ("float32", "bfloat16")]
    for name in cases[0]:
        yield name, *(gigabytes(sum(case[name].values())) for case in cases)


@table(
    "offload",
    *("", "state on device", "state on host", "device bytes, one program", "time"),
    *("device bytes, two programs", "time"),
)
def offload() -> Iterator[Row]:
    for name, row in read("offload")["variants"].items():
        yield (
            name,
            gib(row["state_on_device"]),
            gib(row["state_on_host"]),
            gib(row["device_bytes_one_program"]),
            f"{row['milliseconds_one_program']:.0f} ms",
            gib(row["device_bytes_two_programs"]),
            f"{row['milliseconds_two_programs']:.0f} ms",
        )


STATES = {  # column: method of bench_memory.py
    "`galore`, `natural_galore`": "galore",
    '`basis="random"`': "galore, random",
    '`fisher="core"`': "natural_galore, core",
    '`fisher="window"`': "natural_galore, window",
    '`... side="both"`': "natural_galore, window, both",
}


@table(
    "state",
    *("Llama", "rank"),
    *itertools.chain.from_iterable((f"{name}: projected", "in all") for name in STATES),
)
def state() -> Iterator[Row]:
    for size in ("60m", "130m", "350m", "1b", "7b"):
        figures = read("memory")[size]
        shares = (
            ratio(figures[leaves][method], figures[leaves]["adamw"])
            for method in STATES.values()
            for leaves in ("projected", "total")
        )
        yield size, str(figures["rank"]), *shares


@table("state-8-bits", "", "float32", "moments in 8 bits", "and bases", "and Fishers")
def state_8_bits() -> Iterator[Row]:
    figures = read("memory")["1b"]["projected"]
    rows = {
        "AdamW": ["adamw", "adamw, 8 bits"],
        "GaLore, Natural GaLore": ["galore", "galore, 8 bits", "galore, 8 bits, bases too"],
        'the same, `fisher="core"`': [
            "natural_galore, core",
            *(f"natural_galore, core, 8 bits{x}" for x in ("", ", bases too", ", Fishers too")),
        ],
        'GaLore, `basis="random"`': ["galore, random", "galore, random, 8 bits"],
    }
    for label, names in rows.items():
        shares = [figures[name] / figures["adamw"] for name in names]
        cells = [f"{share:.2f} ({2 * share:.2f})" for share in shares]
        yield (label, *cells, *[""] * (4 - len(cells)))


# --- Learning: benchmarks/learning ----------------------------------------------------------------


@table("pretrain", "optimizer", "learning rate", "validation loss", "optimizer state", "tokens/s")
def pretrain() -> Iterator[Row]:
    for name in ("natural_galore", "galore", "adamw", "contrib_galore"):
        row = read("pretrain")[name]
        yield (
            f"`{name}`",
            f"{row['learning_rate']:g}",
            f"{row['validation_loss']:.3f}",
            megabytes(row["state_bytes"], 2),
            f"{row['tokens_per_second']:,.0f}",
        )


@table(
    "finetune",
    *("model", "optimizer", "tokens/s", "to AdamW", "weights", "state", "temporary", "in all"),
    "to AdamW",
)
def finetune() -> Iterator[Row]:
    names = {"roberta-base": "RoBERTa-base", "tinyllama": "TinyLlama 1.1B"}
    for task, measured in read("finetune")["tasks"].items():
        methods = measured["methods"]
        for name, row in methods.items():
            adamw = methods["adamw"]
            yield (
                names[task],
                code(name),
                f"{row['tokens_per_second']:,.0f}",
                ratio(row["tokens_per_second"], adamw["tokens_per_second"]),
                *(megabytes(row[f"{x}_bytes"]) for x in ("weights", "state", "temp", "total")),
                ratio(row["total_bytes"], adamw["total_bytes"]),
            )


FINETUNED = {
    "adamw": "AdamW",
    "adamw-frozen": "AdamW, embeddings fixed",
    "muon": "Muon",
    "lora-8": "LoRA, rank 8",
    "lora-32": "LoRA, rank 32",
    "galore-4": "GaLore, rank 4",
    "galore-8": "GaLore, rank 8",
    "window-8": "paper's form, rank 8",
    "core-8": "core Fisher, rank 8",
    "natural_galore-core-8": "core Fisher and residual, rank 8",
    "natural_galore-4": "`natural_galore`, rank 4",
    "natural_galore-8": "**`natural_galore`, rank 8**",
}


@table(
    "function-calling",
    *("optimizer", "rates tried", "best rate", "plans, %", "without arguments, %"),
    *("state", "peak of a step"),
)
def function_calling() -> Iterator[Row]:
    """Success on the test records of the first seed, at the rate best on the validation records."""
    found = [run for run in calls.read(RESULTS / "function-calling.jsonl") if run["seed"] == 0]
    for name in calls.METHODS:
        if not (runs := [run for run in found if run["method"] == name]):
            continue
        rate = calls.best_rate(runs)
        run = next(run for run in runs if run["rate"] == rate)
        success = [f"{100 * run[key]:.1f}" for key in ("test", "test_without_arguments")]
        if name == calls.UNTUNED:
            yield name, "", "", *success, "", ""
        else:
            tried = f"{len(runs)} of {len(calls.METHODS[name].rates)}"
            sizes = megabytes(run["state_bytes"]), gigabytes(run["peak_bytes"])
            yield code(name), tried, f"{rate:g}", *success, *sizes


@table(
    "finetune-text",
    *("optimizer", "state", "Reuters R52", "Debian sections", "20 Newsgroups", "mean", "macro-F1"),
)
def finetune_text() -> Iterator[Row]:
    found = study.read(RESULTS / "finetune_text.jsonl")
    states = read("finetune-bytes")["tasks"]["minilm"]["methods"]
    for method, name in FINETUNED.items():
        searches = [study.Search("pretrained", 32, method, task) for task in study.TASKS]
        results = [study.summary(found, search) for search in searches]
        assert None not in results, f"the study lacks a task of {method}"
        yield (
            name,
            megabytes(states[method]["state_bytes"], 1),
            *(f"{x.accuracy:.2f} ± {x.deviation:.2f}" for x in results),
            *(
                f"{statistics.mean(getattr(x, y) for x in results):.2f}"
                for y in ("accuracy", "macro_f1")
            ),
        )


@cache
def comparisons() -> list[tuple[dict[str, Any], list[convergence.Run]]]:
    return convergence.groups(RESULTS / "convergence.jsonl")


def compared(
    steps: int = 2000,
    batch: int = 64,
    size: str = "33m",
    rest_rate: float = 0.016,
    dataset: str = "python",
) -> list[convergence.Run]:
    """The runs of one setting of bench_convergence.py, without those of Fira's residual."""
    setting = {"steps": steps, "batch": batch, "size": size, "rest_rate": rest_rate}
    (runs,) = (
        runs
        for about, runs in comparisons()
        if about["data"]["dataset"] == dataset and setting.items() <= about["setting"].items()
    )
    return [run for run in runs if "residual=fira" not in run.method]


def formatted(rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    for name, *rest in map(convergence.cells, rows):
        yield f"`{name}`", *rest


@table("learning", *convergence.COLUMNS)
def learning() -> Iterator[Row]:
    """Methods with three seeds."""
    yield from formatted(row for row in convergence.rows(compared()) if row["seeds"] >= 3)


@table("learning-variants", "one or two seeds", *convergence.COLUMNS[1:])
def learning_variants() -> Iterator[Row]:
    yield from formatted(row for row in convergence.rows(compared()) if row["seeds"] < 3)


@table("learning-98m", *convergence.COLUMNS)
def learning_98m() -> Iterator[Row]:
    yield from formatted(convergence.rows(compared(size="130m")))


REST_RATES = (0.0025, 0.016)


@table("learning-rest", "method", *(f"others at {rate}" for rate in REST_RATES))
def learning_rest() -> Iterator[Row]:
    one, other = (
        {row["method"]: row["loss"] for row in convergence.rows(compared(1000, rest_rate=rate))}
        for rate in REST_RATES
    )
    for name in filter(other.__contains__, one):
        yield f"`{name}`", f"{one[name]:.3f}", f"{other[name]:.3f}"


BATCHES = ((2000, 8), (4000, 16), (2000, 64), (500, 256))  # steps, sequences
EVERY_200 = "natural_galore:refresh_every=200"


@table(
    "learning-batches",
    *("tokens a step", "steps", "`adamw`", "`galore`", "`natural_galore`"),
    *(f"`{EVERY_200}`", "`muon`", "`soap`"),
)
def batches() -> Iterator[Row]:
    for steps, batch in BATCHES:
        row = {row["method"]: row for row in convergence.rows(compared(steps, batch))}
        names = ("galore", "natural_galore", EVERY_200, "muon", "soap")
        apart = (f"{row[name]['to_reference']:+.3f}" if name in row else "-" for name in names)
        yield f"{256 * batch:,}", f"{steps:,}", f"{row['adamw']['loss']:.3f}", *apart


@table(
    "learning-long",
    *("weights", "tokens", "per weight", "passes over the text", "method", "learning rate"),
    *("state to AdamW", "validation loss"),
)
def learning_long() -> Iterator[Row]:
    """Runs of at least 1.5 tokens per weight in steps of 16,384, the most per weight first.

    State is that of the layers' matrices, AdamW's in float32.
    """
    found = []
    for about, runs in [*convergence.groups(RESULTS / "long-runs.jsonl"), *comparisons()]:
        size, tokens = about["setting"]["size"], runs[0].records[-1]["tokens"]
        per_weight = tokens / 1e6 / int(size.removesuffix("m"))
        if per_weight >= 1.5 and about["setting"]["batch"] == 64:
            found.append((per_weight, size.upper(), tokens, about["data"]["train_tokens"], runs))
    for per_weight, size, tokens, of_text, runs in sorted(found, key=lambda x: (-x[0], -x[3])):
        length = (f"{tokens / 1e6:.0f}M", f"{per_weight:.1f}", f"{tokens / of_text:.1f}")
        adamw = 8 * draw_frontier.weights(size.lower())
        for s in convergence.summaries(runs):
            state = f"{s.runs[0].matrix_state_bytes / adamw:.2f}"
            spread = "" if s.spread is None else f" ± {s.spread:.3f}"
            yield size, *length, f"`{s.method}`", f"{s.rate:g}", state, f"{s.loss:.3f}{spread}"


@table("learning-small-steps", "method", "learning rate", "state to AdamW", "validation loss")
def learning_small_steps() -> Iterator[Row]:
    """Runs of 33M weights on 4,000 steps of 4,096 tokens."""
    for about, runs in convergence.groups(RESULTS / "long-runs.jsonl"):
        setting = about["setting"]
        if (setting["size"], setting["steps"], setting["batch"]) == ("33m", 4000, 16):
            for run in sorted(runs, key=lambda run: run.loss):
                state = f"{run.matrix_state_bytes / 8 / draw_frontier.weights('33m'):.2f}"
                yield f"`{run.method}`", f"{run.rate:g}", state, f"{run.loss:.3f}"


IN_LONG_RUNS = {  # name in docs/choosing.md by method and rate
    ("natural_galore:bits=8+rank=16", 2.5e-3): "`tiny` below",
    ("muon:bits=8", 1e-2): "`muon`",
    (
        "natural_galore:residual_momentum=0.95+bits=8+rank=16+residual_scale=0.4",
        2.5e-3,
    ): "`momentum`",
    ("muon", 1e-2): "`optax.contrib.muon(1e-2)`",
    ("adamw_b2_95", 2e-3): "`optax.adamw(2e-3, b2=0.95)`",
}


@table("by-bytes", "bytes of state per weight", "optimizer", "loss")
def by_bytes() -> Iterator[Row]:
    """The longest runs of 6M weights."""
    groups = convergence.groups(RESULTS / "long-runs.jsonl")
    small = [(about["setting"], runs) for about, runs in groups if about["setting"]["size"] == "6m"]
    _, runs = max(small, key=lambda group: group[0]["steps"])
    for (method, rate), name in IN_LONG_RUNS.items():
        seeds = [run for run in runs if run.method == method and near(run.rate, rate)]
        losses = [run.loss for run in seeds]
        state = seeds[0].matrix_state_bytes / draw_frontier.weights("6m")
        loss = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
        yield f"{state:.2g}", name, loss


@table("learning-rates", "tokens a step", "weights", "`natural_galore`", "AdamW")
def learning_rates() -> Iterator[Row]:
    settings = [(f"{256 * batch:,}", "33M", compared(steps, batch)) for steps, batch in BATCHES]
    for tokens, weights, runs in [*settings, ("16,384", "98M", compared(size="130m"))]:
        rate = {one.method: one.rate for one in convergence.summaries(runs)}
        yield tokens, weights, *(f"{rate[name]:.3g}" for name in ("natural_galore", "adamw"))


@table(
    "learning-ahead",
    *("step", "second text, 10,000 steps", "the same, `refresh_every=200`"),
    *(f"first text, {steps} steps" for steps in ("2,000", "4,000", "10,000")),
)
def ahead() -> Iterator[Row]:
    def lead(ours: str, adamw: str, steps: int, dataset: str) -> dict[int, str]:
        losses = {
            (run.method, run.rate): {x["step"]: x["validation_loss"] for x in run.records}
            for run in compared(steps, dataset=dataset)
            if run.seed == 0
        }
        a, b = losses[ours, 0.0025], losses[adamw, 0.001]
        return {step: f"{b[step] - a[step]:.3f}" for step in a}

    columns = [
        lead("natural_galore", "adamw_b2_95", 10_000, "wheels"),
        lead(EVERY_200, "adamw_b2_95", 10_000, "wheels"),
        *(lead(EVERY_200, "adamw", steps, "python") for steps in (2000, 4000, 10_000)),
    ]
    for step in (1000, 2000, 4000, 6000, 8000, 10_000):
        yield f"{step:,}", *(column.get(step, "") for column in columns)


PEERS = {"natural_galore": ("natural_galore",), "AdamW": ("adamw", "adamw_b2_95")} | {
    "Muon": ("muon",),
    "SOAP": ("soap",),
    "GaLore": ("galore",),
}


@table("learning-runs", "length of the run", "tokens a step", *PEERS)
def runs() -> Iterator[Row]:
    settings: list[dict[str, Any]] = [{"steps": x, "batch": y} for x, y in BATCHES]
    for setting in [*settings, {"steps": 10_000, "batch": 64, "dataset": "wheels"}]:
        losses = {row["method"]: row["loss"] for row in convergence.rows(compared(**setting))}
        best = [min((losses[x] for x in y if x in losses), default=None) for y in PEERS.values()]
        steps, tokens = setting["steps"], 256 * setting["batch"]
        yield (
            f"{steps:,} steps, {steps * tokens / 1e6:.0f}M tokens"
            + ", other text" * ("dataset" in setting),
            f"{tokens:,}",
            *("" if loss is None else f"{loss:.3f}" for loss in best),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    args = parser.parse_args()
    stale = []
    for page in pages():
        text = page.read_text()
        if (new := regenerated(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(new)
    print(*stale or ["all tables are up to date"], sep="\n")
    sys.exit(bool(stale) and args.check)


if __name__ == "__main__":
    main()
