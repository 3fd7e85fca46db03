"""What a byte of optimizer state buys: loss against bytes of state per weight, of each method.

The longest runs are on top.

    python benchmarks/learning/draw_frontier.py benchmarks/results/long-runs.jsonl --size 11m

A point is a method at its best learning rate, its mean over seeds. Points that no other point beats
in both coordinates are joined: the frontier. Of a family's points with nearly the same state only
the best one has a number, and points far above AdamW are left out.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.learning.convergence import results
from benchmarks.learning.convergence.training import SIZES


NEARLY = 0.15  # part by which bytes of state may differ
ABOVE = 0.02  # nats above AdamW
FAMILIES = {"natural_galore": ("C3", "o"), "galore": ("C1", "o"), "muon": ("C0", "s")}
FAMILIES |= {"adamw": ("C7", "^"), "soap": ("C2", "D"), "cosmos": ("C4", "v")}


def weights(size: str) -> int:
    """The number of weights in the matrices of the layers."""
    model = SIZES[size]
    return model.layers * model.hidden * (4 * model.hidden + 3 * model.intermediate)


def bytes_per_weight(size: str, summary: results.Summary) -> float:
    return summary.runs[0].matrix_state_bytes / weights(size)


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is below in one coordinate and not above in the other.

    Example:
      >>> frontier([(1.0, 2.0), (2.0, 2.5), (4.0, 1.5), (1.0, 2.2)])
      [(1.0, 2.0), (4.0, 1.5)]
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def named(points: list[tuple[float, float]], families: list[str]) -> list[bool]:
    """Whether no other point of the family has a lower loss with nearly the same bytes.

    Example:
      >>> named([(1.0, 2.0), (1.05, 2.1), (1.0, 2.1), (4.0, 2.1)], ["a", "a", "b", "a"])
      [True, False, True, True]
    """
    places = range(len(points))
    is_better = lambda j, i: (
        families[i] == families[j]
        and points[j][1] < points[i][1]
        and abs(points[j][0] / points[i][0] - 1) < NEARLY
    )
    return [not any(is_better(j, i) for j in places) for i in places]


def label(method: str) -> str:
    """A method's name without the settings that all runs of the picture share."""
    for long, short in (
        ("natural_galore", "ours"),
        ("residual_momentum=", "momentum "),
        ("bits=8+momentum_bits=4", "8 bits, momentum 4"),
        ("bits=8", "8 bits"),
        ("rank=", "rank "),
        ("fisher=core+fisher.", "Fisher "),
        ("+fisher.", ", "),
        ("power=", "power "),
        ("damping=", "damping "),
        ("residual_scale=", "scale "),
        ("adamw_b2_95", "AdamW"),
        ("weight_decay=", "decay "),
    ):
        method = method.replace(long, short)
    return method.replace(":", ", ").replace("+", ", ")


def draw(axes: Axes, size: str, summaries: list[results.Summary]) -> None:
    adamw = [s.loss for s in summaries if s.method.startswith("adamw")]
    summaries = [s for s in summaries if not adamw or s.loss < max(adamw) + ABOVE]
    summaries.sort(key=lambda s: bytes_per_weight(size, s))
    points = [(bytes_per_weight(size, s), s.loss) for s in summaries]
    families = [s.method.partition(":")[0].removesuffix("_b2_95") for s in summaries]
    axes.step(*zip(*frontier(points), strict=True), where="post", color="0.7", zorder=0)
    names = named(points, families)
    number = 0
    for (x, y), s, family, has_name in zip(points, summaries, families, names, strict=True):
        color, marker = FAMILIES.get(family, ("C5", "x"))
        style = {"fmt": marker, "color": color, "capsize": 3}
        if not has_name:
            axes.errorbar(x, y, markersize=3, **style)
            continue
        number += 1
        name = f"{number}  {label(s.method)}"
        axes.errorbar(x, y, yerr=s.spread, markersize=7, label=name, **style)
        axes.annotate(str(number), (x, y), xytext=(6, 4), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="bytes of state per weight", ylabel="validation loss, nats per token")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    axes.grid(alpha=0.3)


def tokens(about: dict[str, Any]) -> int:
    """Tokens of the runs of a group."""
    setting = about["setting"]
    return setting["steps"] * setting["batch"] * setting["length"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", default="11m")
    parser.add_argument("--figure", type=Path, default="docs/frontier.png")
    args = parser.parse_args()
    groups = [x for x in results.groups(args.file) if x[0]["setting"]["size"] == args.size]
    if not groups:
        parser.error(f"{args.file} has no runs of {args.size}")
    groups.sort(key=lambda group: -tokens(group[0]))
    figure = Figure(figsize=(10, 3.5 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
    for axes, (about, runs) in zip(panels, groups, strict=True):
        draw(axes, args.size, [s for s in results.summaries(runs) if s.loss < float("inf")])
        axes.set_title(f"{args.size.upper()} weights, {tokens(about) / 1e6:.0f}M tokens")
    figure.savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
