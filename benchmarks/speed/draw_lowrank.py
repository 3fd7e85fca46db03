"""Draws docs/low-rank-gradients.png: arrays of the backward pass of one weight, and communication.

Arrays are in proportion, for an up-projection of Llama 1b at rank 512 (2048 x 5461) and 2,048
tokens. tests/lowrank_grads/test_value_and_grad.py checks that no other array exists.

    python benchmarks/speed/draw_lowrank.py [--out docs/low-rank-gradients.png]
"""

import argparse
import pathlib

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle


TOKENS, M, N, RANK = 2048, 2048, 5461, 512
SCALE = 1 / 2400  # of the picture, by entries
GIVEN, MADE, SENT = "#c8d5e3", "#f2c9a5", "#e07b54"


def box(ax: Axes, at: tuple[float, float], shape: tuple[int, int], text: str, color: str):
    """Draws an array of (rows, cols) centred at a point; returns half its width."""
    height, width = (n * SCALE for n in shape)
    corner = (at[0] - width / 2, at[1] - height / 2)
    ax.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor="0.25", lw=1))
    megabytes = 4 * shape[0] * shape[1] / 1e6
    label, y = f"{text}{', ' if height < 0.3 else chr(10)}{megabytes:.0f} MB", at[1]
    if width < 0.3:
        y += height / 2 + 0.12  # above it
    ax.text(at[0], y, label, ha="center", va="center", fontsize=9)
    return width / 2


def arrow(ax: Axes, start: float, end: float, y: float, text: str = "") -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "0.25"}
    ax.add_patch(FancyArrowPatch((start, y), (end, y), **style))
    ax.text((start + end) / 2, y + 0.08, text, ha="center", va="bottom", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default="docs/low-rank-gradients.png")
    args = parser.parse_args()
    figure, (whole, cores) = plt.subplots(2, 1, figsize=(11, 5.4), layout="constrained")
    for ax, title in (
        (whole, "jax.value_and_grad: the gradient is made, added up, sent, and then projected"),
        (cores, "natgalore.value_and_grad: the core is made, added up and sent"),
    ):
        box(ax, (0.5, 0), (TOKENS, M), "x", GIVEN)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set(xlim=(-0.1, 7.9), ylim=(-0.62, 0.62), aspect="equal")
        ax.axis("off")
    half = box(whole, (3.35, 0), (M, N), "G = xᵀȳ", SENT)
    arrow(whole, 0.95, 3.35 - half, 0, "times ȳ")
    box(whole, (6.6, 0), (RANK, N), "R = PᵀG", MADE)
    arrow(whole, 3.35 + half, 6.6 - half, 0)
    box(cores, (1.75, 0), (TOKENS, RANK), "x P", MADE)
    arrow(cores, 0.95, 1.62, 0)
    box(cores, (4.2, 0), (RANK, N), "R = (x P)ᵀȳ", SENT)
    arrow(cores, 1.88, 4.2 - half, 0, "times ȳ")
    whole.text(
        3.35, -0.58, "between devices, and once for each micro-batch", ha="center", fontsize=8
    )
    cores.text(
        4.2, -0.25, "between devices, and once for each micro-batch", ha="center", fontsize=8
    )
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
