"""The optimizers that the speed and memory benchmarks compare, all at one learning rate."""

from collections.abc import Callable
from typing import Any

import optax

import natgalore_jax as natgalore
from examples.common import llama


RANKS = {"tiny": 32, "60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}  # GaLore, table 2
RATE = 1e-3

# (rank, steps between refreshes, weight decay) -> optimizer.
Make = Callable[[int, int, float], optax.GradientTransformation]


def ours(recipe: str, **settings: Any) -> Make:
    return lambda rank, every, decay: getattr(natgalore, recipe)(
        RATE, rank, refresh_every=every, weight_decay=decay, **settings
    )


def in_8_bits(make: Make) -> Make:
    """With moments and bases in 8 bits."""
    roles = ("linear", "square", "basis")
    return lambda rank, every, decay: natgalore.quantized(make(rank, every, decay), roles)


def contrib_galore(rank: int, every: int, decay: float) -> optax.GradientTransformation:
    return optax.contrib.galore(
        RATE,
        rank=rank,
        update_proj_gap=every,
        weight_decay=decay,
        weight_dimension_numbers=llama.galore_dimension_numbers,
    )


def muon(rank: int, every: int, decay: float) -> optax.GradientTransformation:
    del rank, every
    return optax.contrib.muon(
        RATE,
        weight_decay=decay,
        muon_weight_dimension_numbers=llama.muon_dimension_numbers,
    )


def adafactor(rank: int, every: int, decay: float) -> optax.GradientTransformation:
    del rank, every
    return optax.adafactor(
        RATE, multiply_by_parameter_scale=False, weight_decay_rate=RATE * decay or None
    )


METHODS: dict[str, Make] = {
    "natural_galore": ours("natural_galore"),
    "galore": ours("galore"),
    "galore_every_200": lambda rank, _, decay: ours("galore")(rank, 200, decay),  # its default
    "natural_galore_fisher": ours("natural_galore", fisher="core", residual=None),
    "adamw": lambda rank, every, decay: optax.adamw(RATE, weight_decay=decay),
    "contrib_galore": contrib_galore,
    "natural_galore_fisher_cores": ours(
        "natural_galore", fisher="core", residual=None, stagger=False
    ),
    "galore_cores": ours("galore", stagger=False),
    "galore_8bit_cores": in_8_bits(ours("galore", stagger=False)),
    "galore_8bit": in_8_bits(ours("galore")),
    "natural_galore_8bit": in_8_bits(ours("natural_galore")),
    "adamw_8bit": in_8_bits(lambda rank, every, decay: optax.adamw(RATE, weight_decay=decay)),
    "galore_isotropic": ours("galore", residual="isotropic"),
    "natural_galore_window": ours("natural_galore", fisher="window", residual=None),
    "galore_random": ours("galore", basis="random"),
    "muon": muon,
    "adafactor": adafactor,
    "lion": lambda rank, every, decay: optax.lion(RATE / 10, weight_decay=decay),
}
CORES = "_cores"  # suffix of a name: gradients by natgalore.value_and_grad
UNROLLED_ONLY = ("contrib_galore",)  # refuses stacked layers
REFERENCE = "adamw"  # denominator of all ratios
