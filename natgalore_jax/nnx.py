"""`value_and_grad` for Flax NNX."""

from .lowrank_grads.nnx import value_and_grad as value_and_grad
