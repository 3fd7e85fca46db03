"""Natural GaLore for JAX: train all weights of a large model with a fraction of AdamW's state."""

import importlib

from .tree.state_roles import register_state as register_state


from .selection.select import MatrixView as MatrixView  # isort: skip
from .subspace.project import chain as chain, project as project, project_back as project_back  # isort: skip
from .fisher.core import scale_by_core_fisher as scale_by_core_fisher  # isort: skip
from .fisher.window import scale_by_fisher as scale_by_fisher  # isort: skip
from .optimizers import (  # isort: skip
    STATIC_ARGS as STATIC_ARGS,
    galore as galore,
    natural_galore as natural_galore,
)
from .lowrank_grads.value_and_grad import value_and_grad as value_and_grad  # isort: skip
from .reporting.diagnostics import (  # isort: skip
    basis_drift as basis_drift,
    explained_energy as explained_energy,
    fisher_condition as fisher_condition,
    skipped_steps as skipped_steps,
)
from .reporting.memory_report import memory_report as memory_report  # isort: skip
from .sharding.state_shardings import sharded as sharded, state_shardings as state_shardings  # isort: skip
from .sharding.offload import offload as offload  # isort: skip
from .quantization.quantized import quantized as quantized  # isort: skip
from .quantization.stochastic_rounding import stochastic_rounding as stochastic_rounding  # isort: skip
from .reporting.describe import describe as describe  # isort: skip
from .lowrank_grads.explain import explain as explain  # isort: skip
from .planning.plan import plan as plan  # isort: skip
from .tree.plain_state import plain_state as plain_state  # isort: skip


def __getattr__(name: str):
    if name == "nnx":  # for which alone Flax is needed
        return importlib.import_module(".nnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
