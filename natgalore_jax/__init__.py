"""Natural GaLore for JAX: train all weights of a large model with a fraction of AdamW's state."""

from .spec import register_state as register_state


from .project import chain as chain, project as project, project_back as project_back  # isort: skip
from .fisher import (  # isort: skip
    scale_by_core_fisher as scale_by_core_fisher,
    scale_by_fisher as scale_by_fisher,
)
from .recipes import galore as galore, natural_galore as natural_galore  # isort: skip
from .report import describe as describe, memory_report as memory_report  # isort: skip
