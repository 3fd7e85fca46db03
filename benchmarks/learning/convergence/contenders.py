"""The compared optimizers, each with the lowest of its first learning rates.

Settings after a colon change one option of ours at a time:

    natural_galore:refresh_every=20+transport=keep    arguments of the optimizer
    natural_galore:fisher=window+fisher.window=8      an argument of its Fisher stage
    natural_galore:bits=8                             moments and bases in 8 bits

A contender updates the matrices of the layers; all other weights are under Adam. Rates are in steps
of two, four at first; `search` adds more while the best is at an end. The refresh period is the
same for all methods except `natural_galore`, which keeps its own default.
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
      first: the lowest of the first four rates.
      stacked: whether it accepts stacked layers; otherwise it receives separate layers.
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
        if recipe != "natural_galore":  # its default period is part of the comparison
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
        # b1 and b2 of the paper's experiments.
        lambda rate, rank, every: peers.ldadam(rate, rank, b1=0.908, b2=0.99),
        2.5e-4,
    ),
    "dion": Contender(lambda rate, rank, every: peers.dion(rate, rank), 5e-3),
    "adafactor": Contender(adafactor, 5e-4),
    "lion": Contender(lambda rate, rank, every: optax.lion(rate, weight_decay=0.0), 3.125e-5),
}

STAGES = {"core": natgalore.scale_by_core_fisher, "window": natgalore.scale_by_fisher}


def contender(text: str) -> Contender:
    """The contender of a name, with optional settings.

    Raises:
      ValueError: unknown name or invalid settings.
    """
    name, colon, rest = text.partition(":")
    if name not in CONTENDERS:
        raise ValueError(f"no method {name!r}: choose from {', '.join(CONTENDERS)}")
    if not colon:
        return CONTENDERS[name]
    if name not in ("galore", "natural_galore"):
        raise ValueError(f"{name} takes no settings, got {rest!r}")
    settings: dict[str, Any] = {}
    stage_settings: dict[str, Any] = {}
    for part in rest.split("+"):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"a setting is name=value, got {part!r}")
        target = stage_settings if key.startswith("fisher.") else settings
        target[key.removeprefix("fisher.")] = literal(value)
    if stage_settings:
        settings["fisher"] = STAGES[settings.get("fisher", "core")](**stage_settings)
    try:
        result = CONTENDERS[name]._replace(make=ours(name, **settings))
        result.make(1e-3, 8, 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from error
    return result


def literal(value: str) -> Any:
    """A number, True, False or None, otherwise the string itself."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
