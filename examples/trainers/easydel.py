"""Natural GaLore in EasyDeL: an optimizer registered with eFormer, chosen by its name.

    TrainingArguments(optimizer="natural_galore", learning_rate=2.5e-3, weight_decay=0.1, ...)

once this module is imported. EasyDeL's own factory puts clipping before it, and decoupled weight
decay and micro-batches behind it, as for its AdamW.
"""

import dataclasses

import optax
from eformer.optimizers import OptimizerBuilder, register_optimizer

import natgalore_jax as natgalore


@dataclasses.dataclass
class NaturalGaLoreConfig:
    """Arguments of `natural_galore`; rank is a number of columns, or a share such as 0.25."""

    rank: int | float = 128
    refresh_every: int = 50


@register_optimizer("natural_galore")
@dataclasses.dataclass
class NaturalGaLoreBuilder(OptimizerBuilder):
    config: NaturalGaLoreConfig

    def build(self, scheduler: optax.Schedule) -> optax.GradientTransformation:
        return natgalore.natural_galore(
            scheduler, self.config.rank, refresh_every=self.config.refresh_every
        )
