"""Natural GaLore for JAX: train all weights of a large model with a fraction of AdamW's state."""

import importlib

from .fisher.core import scale_by_core_fisher
from .fisher.window import scale_by_fisher
from .lowrank_grads.explain import explain
from .lowrank_grads.value_and_grad import value_and_grad
from .optimizers import (
    STATIC_ARGS,
    galore,
    natural_galore,
)
from .planning.plan import plan
from .quantization.quantized import quantized
from .quantization.stochastic_rounding import stochastic_rounding
from .reporting.describe import describe
from .reporting.diagnostics import (
    basis_drift,
    explained_energy,
    fisher_condition,
    skipped_steps,
)
from .reporting.memory_report import memory_report
from .selection.select import MatrixView
from .sharding.offload import offload
from .sharding.state_shardings import sharded, state_shardings
from .subspace.project import chain, project, project_back
from .tree.plain_state import plain_state
from .tree.state_roles import register_state


__version__ = "0.1.0"
__all__ = [
    "STATIC_ARGS",
    "MatrixView",
    "basis_drift",
    "chain",
    "describe",
    "explain",
    "explained_energy",
    "fisher_condition",
    "galore",
    "memory_report",
    "natural_galore",
    "offload",
    "plain_state",
    "plan",
    "project",
    "project_back",
    "quantized",
    "register_state",
    "scale_by_core_fisher",
    "scale_by_fisher",
    "sharded",
    "skipped_steps",
    "state_shardings",
    "stochastic_rounding",
    "value_and_grad",
]


def __getattr__(name: str):
    if name == "nnx":  # for which alone Flax is needed
        return importlib.import_module(".nnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
