"""XLA options of the tests: fast compilation, and the default ones where a test reads a program.

Most of the time would be code generation for programs that run once. `XLA_FLAGS= make test`
compiles everything with the default options.
"""

import jax


# Each option as (value in tests, default). Collectives of a program are the same; fusions and
# temporary memory may differ.
OPTIONS = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    OPTIONS["xla_cpu_use_fusion_emitters"] = (False, True)

QUICKLY = " ".join(f"--{name}={quick}".lower() for name, (quick, _) in OPTIONS.items())
AS_FOR_USERS = {name: users for name, (_, users) in OPTIONS.items()}


def jit_and_count(f):
    """`jax.jit(f)`, and a list with one entry for each time it is traced.

    The size of a jitted function's own cache is 0 in some long sessions, after one call too.
    """
    traces = []

    def counted(*args):
        traces.append(len(traces))
        return f(*args)

    return jax.jit(counted), traces
