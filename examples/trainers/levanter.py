"""Natural GaLore in Levanter: a registered OptimizerConfig; no change of the trainer.

    optimizer:          # in the trainer's YAML, once this module is imported
      type: natural_galore
      learning_rate: 2.5e-3
      rank: 128

Levanter's own AdamConfig is the same class with `optax.scale_by_adam` and its neighbours in place
of `natural_galore`. `inject_hyperparams` is Levanter's way to log the learning rate.
"""

import dataclasses

import optax
from levanter.optim.config import OptimizerConfig

import natgalore_jax as natgalore


@OptimizerConfig.register_subclass("natural_galore")
@dataclasses.dataclass(frozen=True)
class NaturalGaLoreConfig(OptimizerConfig):
    """Arguments of `natural_galore`; the learning rate's schedule is Levanter's.

    Attributes:
      rank: columns of each basis, or a share of a matrix's short side, such as 0.25.
      refresh_every: steps between refreshes of a basis.
      max_grad_norm: of the whole gradient, clipped before it is projected; None clips nothing.
    """

    rank: int | float = 128
    refresh_every: int = 50
    max_grad_norm: float | None = 1.0

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        def optimizer(learning_rate):
            tx = natgalore.natural_galore(
                learning_rate,
                self.rank,
                refresh_every=self.refresh_every,
                weight_decay=self.weight_decay,
                mask=self.build_weight_decay_mask(),
            )
            if self.max_grad_norm is None:
                return tx
            return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)

        return optax.inject_hyperparams(optimizer)(learning_rate=self.lr_scheduler(num_train_steps))
