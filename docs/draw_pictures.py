"""Draws the pictures of "How it works": arrays as blocks, in proportion.

python docs/draw_pictures.py      writes docs/*.svg
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle


M, N, R = 2.0, 3.2, 0.5  # sides of a weight, and the rank
GRADIENT, BASIS, CORE, RESIDUAL, UPDATE = "#9fb3c8", "#f2c9a5", "#e07b54", "#d5dde5", "#b5d3a8"
PICTURES: dict[str, Callable[[], None]] = {}

plt.rcParams |= {"svg.hashsalt": "natgalore", "font.size": 11, "mathtext.fontset": "cm"}


def picture(name: str, width: float, height: float, unit: float = 0.62):
    """Registers a function that draws on axes of this size, the y axis downwards."""

    def register(draw: Callable[[Axes], None]) -> Callable[[Axes], None]:
        def write() -> None:
            figure = plt.figure(figsize=(width * unit, height * unit))
            ax = figure.add_axes((0, 0, 1, 1))
            ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
            ax.axis("off")
            draw(ax)
            path = Path(__file__).with_name(f"{name}.svg")
            figure.savefig(path, metadata={"Date": None}, facecolor="white")
            plt.close(figure)

        PICTURES[name] = write
        return draw

    return register


def block(
    ax: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    label: str,
    color: str,
    sides=("", ""),
) -> None:
    """An array with its name and, on the left and above, the names of its sides."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="#33414f", lw=0.9))
    ax.text(x + width / 2, y + height / 2, label, ha="center", va="center")
    ax.text(
        x - 0.08, y + height / 2, sides[0], ha="right", va="center", fontsize=9, color="#55626f"
    )
    ax.text(x + width / 2, y - 0.08, sides[1], ha="center", fontsize=9, color="#55626f")


def arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    label: str = "",
    shift=(0.0, -0.12),
) -> None:
    """An arrow with a label, by default above its middle."""
    style = {"arrowstyle": "-|>", "color": "#33414f", "lw": 1.1, "shrinkA": 2, "shrinkB": 2}
    ax.annotate("", end, start, arrowprops=style)
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    ax.text(
        middle[0] + shift[0], middle[1] + shift[1], label, ha="center", va="bottom", fontsize=9.5
    )


def stage(
    ax: Axes, x: float, y: float, label: str, width: float = 1.7, dashed: bool = False
) -> None:
    """A transformation, with its middle at (x, y)."""
    box = Rectangle(
        (x - width / 2, y - 0.42), width, 0.84, facecolor="white", edgecolor="#33414f", lw=0.9
    )
    box.set_linestyle("--" if dashed else "-")
    ax.add_patch(box)
    ax.text(x, y, label, ha="center", va="center", fontsize=9.5)


@picture("how-it-works", 19.4, 5.2)
def overview(ax: Axes) -> None:
    core, rest = 1.35, 3.9
    block(ax, 0.5, 1.55, N, M, "gradient $G$", GRADIENT, ("m", "n"))
    arrow(ax, (3.8, 2.1), (4.8, core + 0.1), "$P^T G$", (-0.3, -0.2))
    block(ax, 5.2, core - R / 2, N, R, "core $R$", CORE, ("r", "n"))
    arrow(ax, (8.45, core), (9.1, core))
    stage(ax, 10.05, core, "Fisher stage\n(optional)", 1.9, dashed=True)
    arrow(ax, (11.0, core), (11.55, core))
    stage(ax, 12.15, core, "Adam", 1.2)
    arrow(ax, (12.75, core), (13.35, core))
    block(ax, 13.5, core - R / 2, 1.6, R, "$U$", CORE, ("", "r x n"))
    arrow(ax, (15.15, core), (15.8, 2.0), "$P\\,U$", (0.35, -0.1))
    arrow(ax, (3.8, 3.0), (4.75, rest - 0.1), "$G - P R$", (-0.55, 0.55))
    block(ax, 5.2, rest - 0.8, 2.6, 1.6, "residual", RESIDUAL, ("m", "n"))
    arrow(ax, (7.85, rest), (9.1, rest))
    stage(ax, 10.4, rest, "orthogonalise\n(Newton-Schulz)", 2.5)
    arrow(ax, (11.7, rest), (15.9, 3.0))
    block(ax, 16.0, 1.55, N - 0.1, M, "update of $W$", UPDATE, ("m", "n"))
    ax.text(12.15, core - 0.62, "moments of r x n", ha="center", fontsize=9, color="#a4461f")
    ax.text(10.4, rest + 0.78, "no state", ha="center", fontsize=9, color="#a4461f")


@picture("projection", 14.6, 3.6)
def projection(ax: Axes) -> None:
    block(ax, 0.7, 1.0, N, M, "$G$", GRADIENT, ("m", "n"))
    ax.text(4.35, 2.0, "$\\approx$", fontsize=15, ha="center", va="center")
    block(ax, 4.9, 1.0, R, M, "$P$", BASIS, ("", "r"))
    block(ax, 5.6, 1.0, N, R, "$R = P^T G$", CORE, ("", "n"))
    ax.text(7.1, 2.55, "state: m r + 2 r n numbers", ha="center", fontsize=9.5)
    ax.text(7.1, 2.95, "AdamW: 2 m n numbers", ha="center", fontsize=9.5)
    rng = np.random.default_rng(0)
    inset = ax.inset_axes((10.3, 0.75, 4.0, 2.3), transform=ax.transData)
    values = np.exp(-np.arange(40) / 6) + 0.015 * rng.random(40)
    inset.bar(range(40), np.sort(values)[::-1], color=[CORE] * 10 + [RESIDUAL] * 30, width=0.9)
    inset.set(xticks=[], yticks=[])
    inset.set_title("singular values of $G$ (sketch)", fontsize=9.5)
    inset.text(4.5, -0.13, "$P$ keeps", ha="center", fontsize=9, color="#a4461f")
    inset.text(25, -0.13, "residual", ha="center", fontsize=9, color="#55626f")
    inset.spines[["top", "right"]].set_visible(False)


@picture("transport", 14.4, 3.7)
def transport(ax: Axes) -> None:
    for x, angle, name in ((1.9, 20, "old"), (12.3, 50, "new")):
        a = np.deg2rad(angle)
        for i, (dx, dy) in enumerate([(np.cos(a), -np.sin(a)), (-np.sin(a), -np.cos(a))]):
            ax.annotate(
                "", (x + 1.35 * dx, 2.1 + 1.35 * dy), (x, 2.1),
                arrowprops={"arrowstyle": "-|>", "color": "#a4461f", "lw": 1.8},
            )  # fmt: skip
            ax.text(x + 1.62 * dx, 2.1 + 1.62 * dy, f"$p_{i + 1}$", ha="center", va="center")
        ax.annotate(
            "", (x + 1.1, 2.1 - 0.8), (x, 2.1),
            arrowprops={"arrowstyle": "-|>", "color": "#33414f", "lw": 1.4, "ls": "--"},
        )  # fmt: skip
        ax.text(
            x,
            3.3,
            f"{name} basis; the momentum\nstays where it is",
            ha="center",
            va="center",
            fontsize=9.5,
        )
    block(ax, 4.6, 1.4, 1.5, R + 0.3, "$m$", CORE, ("r", "n"))
    arrow(ax, (6.3, 1.8), (8.3, 1.8), "$C = P_{new}^T P_{old}$")
    block(ax, 8.6, 1.4, 1.5, R + 0.3, "$C\\,m$", CORE)
    ax.text(
        7.3, 2.75, "linear state: $C m$;  squares: $(C \\circ C)\\,v$", ha="center", fontsize=9.5
    )


@picture("fisher", 15.0, 3.9)
def fisher(ax: Axes) -> None:
    block(ax, 0.6, 1.7, 1.8, R, "$R$", CORE, ("r", "n"))
    ax.text(1.5, 0.55, "core form", ha="center", weight="bold", fontsize=10)
    arrow(ax, (2.5, 1.95), (3.3, 1.95))
    block(ax, 3.5, 1.6, 0.7, 0.7, "$L$", BASIS, ("", "r x r"))
    ax.text(3.85, 2.75, "decayed mean of $R R^T$", ha="center", fontsize=9)
    arrow(ax, (4.3, 1.95), (6.5, 1.95), "$(L + \\lambda I)^{-1/2} R$")
    ax.plot([7.2, 7.2], [0.3, 3.5], color="#c9d2da", lw=1)
    ax.text(9.0, 0.55, "window form (paper)", ha="center", weight="bold", fontsize=10)
    for i in range(4):
        block(ax, 8.0 + 0.14 * i, 1.3 + 0.2 * i, 1.7, R, "$H_i$" if i == 3 else "", CORE)
    ax.text(9.1, 2.85, "the last s cores", ha="center", fontsize=9)
    arrow(ax, (10.4, 1.95), (11.2, 1.95))
    block(ax, 11.4, 1.6, 0.7, 0.7, "$K$", BASIS, ("", "s x s"))
    ax.text(11.75, 2.75, "inner products", ha="center", fontsize=9)
    arrow(ax, (12.2, 1.95), (14.7, 1.95), "$H (\\lambda I + K)^{-1} e$")


@picture("residual", 14.8, 3.7)
def residual(ax: Axes) -> None:
    block(ax, 0.6, 0.9, 2.6, 1.7, "$T = G - P R$", RESIDUAL, ("m", "n"))
    arrow(ax, (3.3, 1.75), (5.4, 1.75), "Newton-Schulz")
    block(ax, 5.5, 0.9, 2.6, 1.7, "$(T T^T)^{-1/2}\\, T$", UPDATE)
    for x, values, title in (
        (9.0, np.exp(-np.arange(12) / 4), "singular values of $T$"),
        (12.0, np.full(12, 0.62), "after"),
    ):
        inset = ax.inset_axes((x, 0.9, 2.3, 1.6), transform=ax.transData)
        inset.bar(range(12), values, color=RESIDUAL if x < 10 else UPDATE, width=0.85)
        inset.set(xticks=[], yticks=[], ylim=(0, 1.05))
        inset.set_title(title, fontsize=9.5)
        inset.spines[["top", "right"]].set_visible(False)
    ax.text(
        7.4,
        3.25,
        "every direction outside the subspace gets a step of one size",
        ha="center",
        fontsize=9.5,
    )


if __name__ == "__main__":
    for write in PICTURES.values():
        write()
