"""What a plan says: the settings of an optimizer, where bytes go, and what does not fit."""

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
    """What :func:`natgalore.plan` decided and counted; prints as a table and a verdict.

    Attributes:
      settings: of the recipe: `rank`, `stagger`, those that were given, and `refresh_every` where
        gradients are low-rank.
      roles: what :func:`quantized` keeps in 8 bits; () if it is not to be used.
      low_rank_gradients: whether gradients are to come from :func:`value_and_grad`.
      rows: one for each leaf.
      dtypes: bytes by kind, and by dtype: weights, gradients, state and what is reserved; of a
        given step weights, state and temporaries, of which gradients are a part.
      budget: in bytes, or None.
      adamw: bytes of weights, whole gradients and the state of `optax.adamw`.
      savings: where it does not fit, what would help, by bytes.
      recipe: of the optimizer.
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
        """As the recipes take it: a number, or rules."""
        return self.settings["rank"]

    @property
    def fits(self) -> bool:
        return self.budget is None or self.total <= self.budget

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, **settings: Any
    ) -> optax.GradientTransformation:
        """The optimizer that was counted; of a schedule it keeps a count too, 4 bytes."""
        tx = self.recipe(learning_rate, **self.settings, **settings)
        return quantized(tx, self.roles) if self.roles else tx

    def __str__(self) -> str:
        return "\n".join([table(self._cells(), self._numbers), "", *self._lines()])

    def __rich__(self) -> Any:
        """What `rich.print` and its consoles show, where rich is installed."""
        from rich.console import Group

        whole = lambda row: not row[2].isdigit()
        shown = rich_table(self._cells(), self._numbers, wrapped=(0, 2), dim=whole)
        return Group(shown, *self._lines())

    @property
    def _numbers(self) -> int:
        return 3 + any(row.energy is not None for row in self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        """The table's head, its lines and the line of totals."""
        said = lambda row: (str(row.shape), row.why if row.rank is None else str(row.rank))
        sums = lambda rows: [human_bytes(sum(getattr(row, kind) for row in rows)) for kind in KINDS]
        body = [
            (name, *said(rows[0]), _energy(rows), *sums(rows))
            for name, rows in group_similar(self.rows, lambda row: row.path, said)
        ]
        head = ("leaf", "shape", "rank, or why not projected", "energy", *KINDS)
        cells = [head, *body, ("total", "", "", "", *sums(self.rows))]
        return cells if self._numbers == 4 else [(*row[:3], *row[4:]) for row in cells]

    def _lines(self) -> list[str]:
        """What is below the table: bytes by dtype, the optimizer, the verdict."""
        kinds = [
            f"{kind}: {', '.join(f'{human_bytes(n)} {dtype}' for dtype, n in held.items())}"
            for kind, held in self.dtypes.items()
        ]
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        name = getattr(self.recipe, "__name__", "recipe")
        tx = f"{name}(learning_rate{settings})"
        too = self.budget is not None and self.adamw <= self.budget
        return [
            *kinds,
            f"optimizer: {f'quantized({tx}, roles={self.roles})' if self.roles else tx}",
            f"AdamW: {human_bytes(self.adamw)} of weights, gradients and state"
            f"{', which fits too' if too else ''}",
            self._verdict(),
        ]

    def _verdict(self) -> str:
        measured = "temporaries" in self.dtypes
        parts = "activations, decoded state" if self.roles else "activations"
        unknown = "" if measured else f"{parts} and other temporaries, which are not counted"
        total = human_bytes(self.total)
        if self.budget is None:
            return f"{total} in all{unknown and f', without {unknown}'}"
        budget, spare = human_bytes(self.budget), self.budget - self.total
        if spare >= 0:
            left = f"{human_bytes(spare)} left{unknown and f' for {unknown}'}"
            return f"fits in {budget}: {total}, {left}"
        helps = ", ".join(f"{what} ({human_bytes(n)} less)" for what, n in self.savings.items())
        return (
            f"does not fit in {budget}: {total}, {human_bytes(-spare)} too much"
            f"{unknown and f', without {unknown}'}{helps and f'; what helps: {helps}'}"
        )


def _energy(rows: list[Row]) -> str:
    """The least of rows that share a line."""
    known = [row.energy for row in rows if row.energy is not None]
    return f"{min(known):.3f}" if known else ""
