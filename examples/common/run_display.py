"""Terminal output of a run: live progress; and the table and figure of one or more logs."""

import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from examples.common.run_log import Run


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def megabytes(size: int) -> str:
    """Bytes in MB (1e6 bytes)."""
    return f"{size / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    """Seconds as m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


def say(text: str) -> None:
    """Prints a line, wrapped at words in a narrow terminal."""
    console = Console()
    console.print(text, soft_wrap=not console.is_terminal, markup=False, highlight=False)


class Display:
    """Live progress: a bar and a status line in a terminal, otherwise one line per record.

    Args:
        first: steps already taken.
        steps: total number of steps.
        state_bytes: bytes of the optimizer state.
    """

    def __init__(self, first: int, steps: int, state_bytes: int):
        self.first = first
        self.steps = steps
        self.state_bytes = state_bytes
        self.started = time.perf_counter()
        self.validation: list[str] = []
        self.console = Console()
        self.bar = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), expand=True
        )
        self.task = self.bar.add_task("", total=steps, completed=first)
        self.live = Live(self.bar, console=self.console)

    def __enter__(self):
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(self, *exception: object):
        self.live.stop()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """Shows one record of the log."""
        if "validation_loss" in record:
            self.validation = [
                f"validation {record['validation_loss']:.3f}",
                *(f"{name} {value:.3f}" for name, value in record.get("metrics", {}).items()),
            ]
        # In a terminal the last validation stays in the status; a line has only its own.
        keeps = self.console.is_interactive or "validation_loss" in record
        validation = self.validation if keeps else []
        step, status = record["step"], validation
        if "train_loss" in record:
            taken = step - self.first
            per_step = (time.perf_counter() - self.started) / taken
            status = [
                f"loss {record['train_loss']:.3f}",
                *validation,
                f"{record['tokens_per_second']:,.0f} tokens/s",
                f"optimizer state {megabytes(self.state_bytes)}",
            ]
            if "peak_bytes_in_use" in record:
                status.append(f"peak {megabytes(record['peak_bytes_in_use'])}")
            if taken > 1:  # the first step is slower
                status.append(f"{duration(per_step * (self.steps - step))} left")
        else:  # the record before the first step: restart the clock after compilation
            self.started = time.perf_counter()
        if self.console.is_interactive:
            text = Text(fill(status, self.console.width), style="dim")
            self.live.update(Group(self.bar, text))
        else:
            line = f"step {step:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(status)
            self.console.print(line, soft_wrap=True, highlight=False)


def fill(parts: Sequence[str], width: int) -> str:
    """The parts joined to lines of at most `width` characters, broken only between parts.

    Example:
        >>> print(fill(["loss 2.5", "3 tokens/s", "0:01 left"], 20))
        loss 2.5  3 tokens/s
        0:01 left
    """
    joined = "  ".join(part.replace(" ", "\xa0") for part in parts)  # textwrap does not break these
    return textwrap.fill(joined, width).replace("\xa0", " ")


def show_table(runs: Sequence[Run]) -> None:
    """Prints the results, one column per run; several tables in a narrow terminal."""
    rows = {
        "training loss": lambda run: f"{run.losses('train_loss')[1][-1]:.3f}",
        "validation loss": lambda run: f"{run.losses('validation_loss')[1][-1]:.3f}",
        **{name: lambda run, name=name: f"{run.metrics()[name]:.3f}" for name in runs[0].metrics()},
        "tokens/s": lambda run: f"{run.tokens_per_second():,.0f}",
        "optimizer state": lambda run: megabytes(run.header["state_bytes"]),
        "AdamW's state": lambda run: megabytes(run.header["adamw_state_bytes"]),
        "wall time": lambda run: duration(run.records[-1]["seconds"]),
    }
    table = Table("optimizer")
    for run in runs:
        table.add_column(run.name, justify="right")
    for name, cell in rows.items():
        table.add_row(name, *map(cell, runs))
    console = Console()
    unlimited = console.options.update(max_width=1000)
    half = len(runs) // 2
    if half and console.measure(table, options=unlimited).maximum > console.width:
        show_table(runs[:half])
        show_table(runs[half:])
    else:
        console.print(table)


def plot(runs: Sequence[Run], title: str = "") -> "Figure":
    """Draws training loss (thin) and validation loss (dots) of each run against tokens.

    The loss axis is logarithmic, since final losses differ by a few tenths.

    Args:
        runs: logs.
        title: by default the size of the Llama.
    """
    # Here, so that a benchmark of a training step needs no matplotlib.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FixedLocator

    header = runs[0].header
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        axes.plot(*run.losses("train_loss"), color=f"C{i}", linewidth=1, alpha=0.4)
        tokens, losses = run.losses("validation_loss")
        label = f"{run.name}: {losses[-1]:.3f}, state {megabytes(run.header['state_bytes'])}"
        axes.plot(tokens, losses, color=f"C{i}", marker="o", markersize=4, label=label)
    title = title or f"Llama {header['config']['size']}"
    axes.set_title(f"{title} ({header['parameters'] / 1e6:,.2f} M parameters)", loc="left")
    pretraining = "size" in header["config"]
    in_bytes = pretraining and header["config"].get("dataset", "text") == "text"
    axes.set_xlabel("tokens (bytes of text)" if in_bytes else "tokens")
    axes.xaxis.set_major_formatter(EngFormatter())
    unit = f"nats per {'byte' if in_bytes else 'token'}" if pretraining else "nats"
    axes.set_ylabel(f"loss ({unit})")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        FixedLocator(
            [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 2, 2.5, 3, 4, 5, 6, 8, 10]
        )
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="validation (dots), training (thin)", alignment="left")
    return figure
