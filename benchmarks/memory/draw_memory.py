"""Draws docs/memory.png: weights, gradients and optimizer state of Llama 1b and 7b, as bars.

Activations and other temporaries are not drawn: they depend on the batch and the compiler.

    python benchmarks/memory/draw_memory.py [--out docs/memory.png]
"""

import argparse
import json
import pathlib

import matplotlib.pyplot as plt
from matplotlib.axes import Axes


COLORS = {"weights": "#9fb3c8", "gradients": "#f2c9a5", "state": "#e07b54"}
SHOWN = {  # name of a method in the results: label in the picture
    "AdamW": "AdamW",
    "8-bit AdamW": "8-bit AdamW",
    "GaLore": "GaLore",
    "GaLore, low-rank gradients": "GaLore,\nlow-rank gradients",
    "GaLore in 8 bits, low-rank gradients": "GaLore in 8 bits,\nlow-rank gradients",
}


def draw(ax: Axes, figures: dict[str, dict[str, int]], labelled: bool) -> None:
    """A bar for each method, from the top, with its total at the end."""
    largest = max(sum(counted.values()) for counted in figures.values())
    for place, name in enumerate(SHOWN):
        left = 0.0
        for kind, color in COLORS.items():
            width = figures[name][kind] / 1e9
            ax.barh(place, width, left=left, color=color, edgecolor="white", height=0.7)
            if figures[name][kind] > 0.04 * largest:
                middle = left + width / 2
                ax.text(middle, place, f"{width:.1f}", ha="center", va="center", fontsize=8)
            left += width
        ax.text(left, place, f"  {left:.1f} GB", va="center", fontsize=9, weight="bold")
    ax.set_yticks(range(len(SHOWN)), SHOWN.values() if labelled else [""] * len(SHOWN), fontsize=9)
    ax.set(xlim=(0, 1.18 * largest / 1e9), ylim=(len(SHOWN) - 0.5, -0.5))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--figures",
        type=pathlib.Path,
        default="benchmarks/results/bytes.json",
        help="results of bench_bytes.py",
    )
    parser.add_argument("--out", type=pathlib.Path, default="docs/memory.png")
    args = parser.parse_args()
    results = json.loads(args.figures.read_text())
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 5.8), layout="constrained")
    for row, size in zip(axes, ("1b", "7b"), strict=True):
        for ax, dtype in zip(row, ("float32", "bfloat16"), strict=True):
            draw(ax, results[size][dtype], labelled=ax is row[0])
            title = f"Llama {size}, rank {results[size]['rank']}, weights in {dtype}"
            ax.set_title(title, fontsize=10, loc="left")
    for ax in axes[-1]:
        ax.set_xlabel("GB, without activations and other temporaries", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    labels = ["weights", "gradients", "optimizer state"]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
