"""The optimizers that are compared, each with the learning rates among which to begin.

Ours can be given settings after a colon, which is how one thing at a time is taken away or added:

    natural_galore:refresh_every=20+transport=keep    arguments of the recipe
    natural_galore:fisher=window+fisher.window=8      one of its Fisher stage
    natural_galore:bits=8                             its moments and bases in 8 bits

A contender sees the matrices of the layers alone; everything else is under Adam, for all alike.
Rates are in steps of two, four to begin with; `search` goes on where the best is at an end. How
long a basis serves is the same for all, but for `natural_galore`, which has a default of its own.
"""

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import natgalore_jax as natgalore
from examples.common import llama

from . import peers


class Contender(NamedTuple):
    """An optimizer of the comparison.

    Attributes:
      make: (learning rate, rank, refresh_every) -> the transformation; the rate may be traced.
      first: the lowest of the four rates to begin with.
      stacked: whether it takes layers that are one stack; else it is given them apart.
    """

    make: Callable[[Any, int, int], optax.GradientTransformation]
    first: float
    stacked: bool = True


def ours(
    recipe: str, bits: int = 32, **settings: Any
) -> Callable[..., optax.GradientTransformation]:
    if bits not in (8, 32):
        raise ValueError(f"bits must be 8 or 32, got {bits}")

    def make(rate: Any, rank: int, every: int) -> optax.GradientTransformation:
        given = {"rank": rank} | settings
        if recipe != "natural_galore":  # whose default is a part of what is compared
            given = {"refresh_every": every} | given
        tx = getattr(natgalore, recipe)(rate, **given)
        return natgalore.quantized(tx, ("linear", "square", "basis")) if bits == 8 else tx

    return make


def contrib_galore(rate: Any, rank: int, every: int) -> optax.GradientTransformation:
    return optax.contrib.galore(
        rate,
        rank=rank,
        update_proj_gap=every,
        weight_dimension_numbers=llama.galore_dimension_numbers,
    )


def adafactor(rate: Any, rank: int, every: int) -> optax.GradientTransformation:
    del rank, every
    return optax.adafactor(rate, multiply_by_parameter_scale=False)


CONTENDERS: dict[str, Contender] = {
    "adamw": Contender(lambda rate, rank, every: optax.adamw(rate, weight_decay=0.0), 2.5e-4),
    "adamw_b2_95": Contender(
        lambda rate, rank, every: optax.adamw(rate, b2=0.95, weight_decay=0.0), 2.5e-4
    ),
    "galore": Contender(ours("galore"), 6.25e-4),
    "natural_galore": Contender(ours("natural_galore"), 1.25e-3),
    "contrib_galore": Contender(contrib_galore, 6.25e-4, stacked=False),
    "muon": Contender(
        lambda rate, rank, every: optax.contrib.muon(rate, weight_decay=0.0), 2.5e-3, stacked=False
    ),
    "soap": Contender(lambda rate, rank, every: peers.soap(rate), 5e-4),
    "fira": Contender(
        lambda rate, rank, every: peers.fira(rate, rank, refresh_every=every), 6.25e-4
    ),
    "apollo": Contender(
        lambda rate, rank, every: peers.apollo(rate, rank, refresh_every=every), 5e-4
    ),
    "apollo_mini": Contender(
        lambda rate, rank, every: peers.apollo_mini(rate, refresh_every=every), 5e-4
    ),
    "ldadam": Contender(
        # The β of its experiments.
        lambda rate, rank, every: peers.ldadam(rate, rank, b1=0.908, b2=0.99),
        2.5e-4,
    ),
    "dion": Contender(lambda rate, rank, every: peers.dion(rate, rank), 5e-3),
    "adafactor": Contender(adafactor, 5e-4),
    "lion": Contender(lambda rate, rank, every: optax.lion(rate, weight_decay=0.0), 3.125e-5),
}

STAGES = {"core": natgalore.scale_by_core_fisher, "window": natgalore.scale_by_fisher}


def contender(text: str) -> Contender:
    """The contender of a name, with its settings if it has any.

    Raises:
      ValueError: there is none of this name, or it does not take these settings.
    """
    name, colon, rest = text.partition(":")
    if name not in CONTENDERS:
        raise ValueError(f"no method {name!r}: choose from {', '.join(CONTENDERS)}")
    if not colon:
        return CONTENDERS[name]
    if name not in ("galore", "natural_galore"):
        raise ValueError(f"{name} takes no settings, got {rest!r}")
    settings: dict[str, Any] = {}
    of_stage: dict[str, Any] = {}
    for part in rest.split("+"):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"a setting is name=value, got {part!r}")
        of = of_stage if key.startswith("fisher.") else settings
        of[key.removeprefix("fisher.")] = literal(value)
    if of_stage:
        settings["fisher"] = STAGES[settings.get("fisher", "core")](**of_stage)
    try:
        made = CONTENDERS[name]._replace(make=ours(name, **settings))
        made.make(1e-3, 8, 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from error
    return made


def literal(value: str) -> Any:
    """A number, True, False or None, or else the word itself."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
