"""The result of `plan`: an optimizer's settings, its bytes, and whether they fit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from ..quantization.quantized import quantized
from ..selection.select import Rank
from ..util.text_tables import group_similar, human_bytes, rich_table, table
from .byte_counts import ByteCount, Row


KINDS = ("weights", "gradients", "state")


@dataclasses.dataclass(frozen=True)
class Plan(ByteCount):
    """Result of :func:`natgalore.plan`; prints as a table and a verdict.

    Attributes:
      settings: arguments of the recipe: `rank`, `stagger`, the given ones, and `refresh_every`
        under low-rank gradients.
      roles: roles that :func:`quantized` keeps in 8 bits; () if it is not used.
      low_rank_gradients: whether gradients are the cores of :func:`value_and_grad`.
      rows: one per leaf.
      dtypes: bytes by kind, then by dtype: weights, gradients, state and reserved bytes; with a
        training step weights, state and temporaries, which include the gradients.
      budget: bytes, or None.
      adamw: bytes of weights, full gradients and the state of `optax.adamw`.
      savings: if it does not fit, changes that help, with the bytes each saves.
      recipe: the function that builds the optimizer.
    """

    settings: dict[str, Any]
    roles: tuple[str, ...]
    low_rank_gradients: bool
    budget: int | None
    adamw: int
    savings: dict[str, int]
    recipe: Callable[..., optax.GradientTransformation]

    @property
    def rank(self) -> Rank:
        """The `rank` argument of the recipe: a number or rules."""
        return self.settings["rank"]

    @property
    def fits(self) -> bool:
        return self.budget is None or self.total <= self.budget

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, **settings: Any
    ) -> optax.GradientTransformation:
        """The optimizer that was counted. A schedule adds a count of 4 bytes to its state."""
        tx = self.recipe(learning_rate, **self.settings, **settings)
        return quantized(tx, self.roles) if self.roles else tx

    def __str__(self) -> str:
        return "\n".join([table(self._cells(), self._numbers), "", *self._lines()])

    def __rich__(self) -> Any:
        """The table and the lines for `rich.print`."""
        from rich.console import Group

        not_projected = lambda row: not row[2].isdigit()
        rendered = rich_table(self._cells(), self._numbers, wrapped=(0, 2), dim=not_projected)
        return Group(rendered, *self._lines())

    @property
    def _numbers(self) -> int:
        """The number of numeric columns."""
        return 3 + any(row.energy is not None for row in self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        """Head, lines and totals of the table."""
        text = lambda row: (str(row.shape), row.why if row.rank is None else str(row.rank))
        sums = lambda rows: [human_bytes(sum(getattr(row, kind) for row in rows)) for kind in KINDS]
        body = [
            (name, *text(rows[0]), _energy(rows), *sums(rows))
            for name, rows in group_similar(self.rows, lambda row: row.path, text)
        ]
        head = ("leaf", "shape", "rank, or why not projected", "energy", *KINDS)
        cells = [head, *body, ("total", "", "", "", *sums(self.rows))]
        return cells if self._numbers == 4 else [(*row[:3], *row[4:]) for row in cells]

    def _lines(self) -> list[str]:
        """The lines below the table: bytes by dtype, the optimizer, the verdict."""
        kinds = [
            f"{kind}: {', '.join(f'{human_bytes(n)} {dtype}' for dtype, n in by_dtype.items())}"
            for kind, by_dtype in self.dtypes.items()
        ]
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        name = getattr(self.recipe, "__name__", "recipe")
        tx = f"{name}(learning_rate{settings})"
        adamw_fits = self.budget is not None and self.adamw <= self.budget
        return [
            *kinds,
            f"optimizer: {f'quantized({tx}, roles={self.roles})' if self.roles else tx}",
            f"AdamW: {human_bytes(self.adamw)} of weights, gradients and state"
            f"{', which fits too' if adamw_fits else ''}",
            self._verdict(),
        ]

    def _verdict(self) -> str:
        uncounted = "activations, decoded state" if self.roles else "activations"
        uncounted += " and other temporaries, which are not counted"
        if "temporaries" in self.dtypes:
            uncounted = ""
        total = human_bytes(self.total)
        if self.budget is None:
            return f"{total} in all{uncounted and f', without {uncounted}'}"
        budget, spare = human_bytes(self.budget), self.budget - self.total
        if spare >= 0:
            remaining = f"{human_bytes(spare)} left{uncounted and f' for {uncounted}'}"
            return f"fits in {budget}: {total}, {remaining}"
        changes = [f"{change} ({human_bytes(n)} less)" for change, n in self.savings.items()]
        helps = ", ".join(changes)
        return (
            f"does not fit in {budget}: {total}, {human_bytes(-spare)} too much"
            f"{uncounted and f', without {uncounted}'}{helps and f'; what helps: {helps}'}"
        )


def _energy(rows: list[Row]) -> str:
    """The smallest energy of rows that share a line."""
    known = [row.energy for row in rows if row.energy is not None]
    return f"{min(known):.3f}" if known else ""
