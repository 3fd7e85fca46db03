"""The compared optimizers, each with the lowest of its first learning rates.

Settings after a colon are arguments of the optimizer:

    natural_galore:refresh_every=20+transport=keep    of natgalore.natural_galore
    natural_galore:fisher=window+fisher.window=8      of its Fisher stage
    muon:beta=0.9+weight_decay=0.1                    of the other optimizers

and, for all of them,

    natural_galore:bits=8                             moments and bases in 8 bits
    natural_galore:bits=8+momentum_bits=4             momentum in 4 (ours: that of the residual)
    soap:weight_decay=0.1                             decoupled decay
    natural_galore:before=0.95                        Nesterov's momentum of the whole gradient

A contender updates the matrices of the layers; all other weights are under Adam. Rates are in steps
of two, four at first; `search` adds more while the best is at an end. The refresh period is the
same for all methods except `natural_galore`, which keeps its own default.
"""

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import natgalore_jax as natgalore
from examples.common import llama

from . import peers


class Contender(NamedTuple):
    """An optimizer of the comparison.

    Attributes:
      make: (learning rate, rank, refresh_every, exponent=1.0) -> the transformation; the rate may
        be traced. Decays of averages are raised to the exponent.
      first: the lowest of the first four rates.
      stacked: whether it accepts stacked layers; otherwise it receives separate layers.
    """

    make: Callable[..., optax.GradientTransformation]
    first: float
    stacked: bool = True


DECAYS = ("b1", "b2", "beta", "mu", "rho", "shampoo_beta", "residual_momentum")


def make(
    function: Callable[..., optax.GradientTransformation],
    rate: Any,
    rank: int,
    every: int,
    exponent: float = 1.0,
    /,
    *,
    bits: int = 32,
    momentum_bits: int | None = None,
    before: float | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """The transformation of `function(rate, **settings)`.

    Args:
      function: of an optimizer. If it has the arguments rank and refresh_every, those of the
        comparison are the defaults of its settings.
      rate: learning rate.
      rank: of all low-rank methods.
      every: steps between refreshes, except for `natural_galore`.
      exponent: of the decays of averages.
      bits: 32, or 8 for :func:`natgalore_jax.quantized`.
      momentum_bits: of momentum, in place of `bits`; of ours, of the residual's.
      before: decay of a momentum of the whole gradient before the optimizer.
      **settings: of the function; or weight_decay, for a function without it.
    """
    if bits not in (8, 32):
        raise ValueError(f"bits must be 8 or 32, got {bits}")
    accepted = inspect.signature(function).parameters
    given = {"rank": rank}
    if function is not natgalore.natural_galore:  # its default period is part of the comparison
        given["refresh_every"] = every
    given = {name: value for name, value in given.items() if name in accepted} | settings
    for name in DECAYS:
        decay = given.get(name, accepted[name].default if name in accepted else None)
        if decay is not None:
            given[name] = decay**exponent
    decay = given.pop("weight_decay", 0.0)
    if "weight_decay" in accepted:
        tx = function(rate, weight_decay=decay, **given)
    else:
        tx = function(rate, **given)
        if decay:
            tx = optax.chain(tx, optax.add_decayed_weights(-rate * decay))
    if before is not None:
        tx = optax.chain(optax.trace(before**exponent, nesterov=True), tx)
    if bits == 8:
        roles = {"linear": 8, "square": 8, "basis": 8, "full": 8}
        ours = function in (natgalore.natural_galore, natgalore.galore)
        roles["full" if ours else "linear"] = momentum_bits or 8
        tx = natgalore.quantized(tx, roles)
    return tx


def contrib_galore(rate: Any, rank: int, refresh_every: int) -> optax.GradientTransformation:
    return optax.contrib.galore(
        rate,
        rank=rank,
        update_proj_gap=refresh_every,
        weight_dimension_numbers=llama.galore_dimension_numbers,
    )


def adafactor(rate: Any) -> optax.GradientTransformation:
    return optax.adafactor(rate, multiply_by_parameter_scale=False)


# b1 and b2 of the paper's experiments.
ldadam = functools.partial(peers.ldadam, b1=0.908, b2=0.99)
adamw_b2_95 = functools.partial(optax.adamw, b2=0.95)


def matrices_of_stacks(params: Any) -> Any:
    """Each kernel as a stack of matrices, for Muon."""
    return jax.tree.map(
        lambda w: optax.contrib.MuonDimensionNumbers(w.ndim - 2, w.ndim - 1), params
    )


muon = functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=matrices_of_stacks)


FUNCTIONS: dict[str, tuple[Any, float, bool]] = {  # function, first rate, stacked
    "adamw": (optax.adamw, 2.5e-4, True),
    "adamw_b2_95": (adamw_b2_95, 2.5e-4, True),
    "galore": (natgalore.galore, 6.25e-4, True),
    "natural_galore": (natgalore.natural_galore, 1.25e-3, True),
    "contrib_galore": (contrib_galore, 6.25e-4, False),
    "muon": (muon, 2.5e-3, True),
    "soap": (peers.soap, 5e-4, True),
    "cosmos": (peers.cosmos, 1.25e-4, True),
    "fira": (peers.fira, 6.25e-4, True),
    "apollo": (peers.apollo, 5e-4, True),
    "apollo_mini": (peers.apollo_mini, 5e-4, True),
    "ldadam": (ldadam, 2.5e-4, True),
    "dion": (peers.dion, 5e-3, True),
    "adafactor": (adafactor, 5e-4, True),
    "lion": (optax.lion, 3.125e-5, True),
}
CONTENDERS: dict[str, Contender] = {
    name: Contender(functools.partial(make, function), first, stacked)
    for name, (function, first, stacked) in FUNCTIONS.items()
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
        chosen = CONTENDERS[name]
        result = chosen._replace(make=functools.partial(chosen.make, **settings))
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
