"""Tables and pictures of all runs of a setting.

The results file holds one JSON line per run: setting, data, environment, method, rate, seed, bytes
of state, and the records of the run.
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter
from rich.table import Table

from .search import Done, best_rate, near


REFERENCE = "adamw"


class Run(NamedTuple):
    """A finished run."""

    method: str
    rate: float
    seed: int
    state_bytes: int
    matrix_state_bytes: int
    records: list[dict[str, Any]]

    @property
    def loss(self) -> float:
        """The last validation loss, inf if the run diverged."""
        return loss_of(self.records[-1])

    @property
    def done(self) -> Done:
        return Done(self.method, self.rate, self.seed, self.loss)

    @property
    def step_seconds(self) -> float:
        """Median over the intervals between validations."""
        intervals = zip(self.records[1:], self.records[2:], strict=False)
        seconds_per_step = [
            (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in intervals
        ]
        return statistics.median(seconds_per_step) if seconds_per_step else math.nan


class Summary(NamedTuple):
    """A method at its best rate.

    Attributes:
      runs: runs at the best rate, one per seed.
      tried: (rate, loss) with the first seed, by rate.
    """

    method: str
    runs: list[Run]
    tried: list[tuple[float, float]]

    @property
    def rate(self) -> float:
        return self.runs[0].rate

    @property
    def search(self) -> str:
        """Number of rates tried, and whether the best is at an end of them."""
        if len(self.tried) == 1:
            return "only one"
        ends = {"lowest ": self.tried[0], "highest ": self.tried[-1]}
        end = next((name for name, (rate, _) in ends.items() if near(rate, self.rate)), "")
        return f"{end}of {len(self.tried)}"

    @property
    def loss(self) -> float:
        return statistics.mean(run.loss for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(run.loss for run in self.runs) if len(self.runs) > 1 else None

    def curve(self, along: str) -> tuple[list[float], list[float]]:
        """The mean validation loss over seeds, against tokens, steps or seconds."""
        rows = list(zip(*(run.records for run in self.runs), strict=False))
        mean = lambda name, row: statistics.mean(record[name] for record in row)
        losses = [statistics.mean(map(loss_of, row)) for row in rows]
        return [mean(along, row) for row in rows], losses

    def tokens_to(self, loss: float) -> float | None:
        """Tokens after which the mean curve stays at or below a loss, by linear interpolation."""
        tokens, losses = self.curve("tokens")
        if losses[-1] > loss:
            return None
        last = max((i for i, x in enumerate(losses) if x > loss), default=None)
        if last is None:
            return tokens[0]
        part = (losses[last] - loss) / (losses[last] - losses[last + 1])
        return tokens[last] + part * (tokens[last + 1] - tokens[last])


def loss_of(record: dict[str, Any]) -> float:
    loss = record["validation_loss"]
    return math.inf if loss is None else loss


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The results of a file, without incomplete lines."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a result; an incomplete last line stays a separate line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(line) + "\n")


def groups(path: Path) -> list[tuple[dict[str, Any], list[Run]]]:
    """Runs grouped by setting and corpus; only runs of one group are comparable."""
    found: list[tuple[dict[str, Any], list[Run]]] = []
    for line in lines(path):
        about = {name: line[name] for name in ("setting", "data")}
        run = Run(*(line[name] for name in Run._fields))
        for other, runs in found:
            if other == about:
                runs.append(run)
                break
        else:
            found.append((about, [run]))
    return found


def read(path: Path, about: dict[str, Any]) -> list[Run]:
    return next((runs for other, runs in groups(path) if other == about), [])


def summaries(runs: list[Run]) -> list[Summary]:
    """Each method at its best rate, lowest loss first."""
    found = []
    for method in dict.fromkeys(run.method for run in runs):
        of = [run for run in runs if run.method == method]
        rate = best_rate(method, [run.done for run in of], seed=min(run.seed for run in of))
        best = [run for run in of if near(run.rate, rate)]
        tried = sorted((run.rate, run.loss) for run in of if run.seed == 0)
        found.append(Summary(method, best, tried))
    return sorted(found, key=lambda summary: summary.loss)


def rows(runs: list[Run]) -> list[dict[str, Any]]:
    """The figures of the table, one row per method."""
    found = summaries(runs)
    reference = next((s for s in found if s.method == REFERENCE), None)
    table = []
    for s in found:
        row: dict[str, Any] = {
            "method": s.method,
            "rate": s.rate,
            "search": s.search,
            "loss": s.loss,
            "spread": s.spread,
            "seeds": len(s.runs),
            "matrix_state_bytes": s.runs[0].matrix_state_bytes,
            "state_bytes": s.runs[0].state_bytes,
            "step_ms": 1e3 * statistics.median(run.step_seconds for run in s.runs),
        }
        if reference is not None:
            needed, whole = s.tokens_to(reference.loss), reference.runs[0].records[-1]["tokens"]
            other = {run.seed: run.loss for run in reference.runs}
            # By seed: all methods share a seed's initial weights and batches.
            differences = [run.loss - other[run.seed] for run in s.runs if run.seed in other]
            row |= {
                "to_reference": statistics.mean(differences) if differences else None,
                "to_reference_spread": statistics.stdev(differences)
                if len(differences) > 1
                else None,
                "tokens_to_reference": needed and needed / whole,
            }
        table.append(row)
    return table


COLUMNS = ("method", "learning rate", "validation loss", "seeds", f"to {REFERENCE}")
COLUMNS += ("tokens to its loss", "state of matrices, MB", "step, ms")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of :func:`rows` as text, in the order of COLUMNS."""
    text = lambda value, form: "-" if value is None else format(value, form)
    spread = lambda value: "" if value is None else f" ± {value:.3f}"
    return (
        row["method"],
        f"{row['rate']:.3g} ({row['search']})",
        f"{row['loss']:.3f}{spread(row['spread'])}",
        str(row["seeds"]),
        text(row.get("to_reference"), "+.3f") + spread(row.get("to_reference_spread")),
        text(row.get("tokens_to_reference"), ".2f"),
        f"{row['matrix_state_bytes'] / 1e6:.1f}",
        f"{row['step_ms']:.1f}",
    )


def table(about: dict[str, Any], runs: list[Run]) -> Table:
    """The table of a setting for a terminal."""
    setting, data = about["setting"], about["data"]
    tokens = setting["steps"] * setting["batch"] * setting["length"]
    view = Table(
        *COLUMNS,
        title=f"{setting['size']}, rank {setting['rank']}, {tokens / 1e6:.1f}M tokens of "
        f"{data['dataset']} {data['sha256'][:8]}, rest at {setting['rest_rate']:g}",
    )
    for row in rows(runs):
        view.add_row(*cells(row))
    return view


def markdown(runs: list[Run]) -> str:
    """The table of a setting in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [(f"`{name}`", *rest) for name, *rest in map(cells, rows(runs))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(runs: list[Run]) -> Figure:
    """Loss against tokens, time, bytes of state, and learning rate."""
    found = summaries(runs)
    figure = Figure(figsize=(12, 10), layout="constrained")
    against_tokens, against_time, against_bytes, against_rate = figure.subplots(2, 2).flat
    last = [s.loss for s in found if math.isfinite(s.loss)]
    top = min(last) + 4 * max(0.05, statistics.median(last) - min(last)) if last else 1.0
    for i, s in enumerate(found):
        style: dict[str, Any] = {"label": s.method, "color": f"C{i % 10}"}
        style["linestyle"], marker = ("-", "o") if i < 10 else ("--", "s")  # ten colors
        against_tokens.plot(*s.curve("tokens"), marker=marker, markersize=2, **style)
        against_time.plot(*s.curve("seconds"), **style)
        against_rate.plot(*zip(*s.tried, strict=True), marker=marker, **style)
        megabytes = s.runs[0].matrix_state_bytes / 1e6
        against_bytes.errorbar(
            megabytes, s.loss, yerr=s.spread, fmt=marker, capsize=3, color=style["color"]
        )
    against_tokens.set(xlabel="tokens", xscale="linear")
    against_tokens.xaxis.set_major_formatter(EngFormatter())
    against_time.set(xlabel="seconds of training")
    against_bytes.set(xlabel="optimizer state of the layers' matrices, MB")
    against_bytes.set_xscale("symlog", base=2, linthresh=1.0)
    against_bytes.xaxis.set_major_formatter(ScalarFormatter())
    against_rate.set(xlabel="learning rate", xscale="log")
    for axes in (against_tokens, against_time, against_rate):
        limit_losses(axes, min(last, default=0.0), top)
    for axes in figure.axes:
        axes.set_ylabel("validation loss, nats per token")
        axes.grid(alpha=0.3)
    figure.legend(*against_tokens.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def limit_losses(axes: Axes, best: float, top: float) -> None:
    """Limits the loss axis to the range of final losses."""
    axes.set_ylim(best - 0.05 * (top - best), top)
