"""How XLA compiles what the tests run: quickly, and as for users where they read a program.

Most of their time would be code generation for programs that run once. `XLA_FLAGS= make test`
compiles everything as for users.
"""

import jax


# Each option for the tests, and as it is for users. Collectives of a program are the same; fusions
# and temporary memory need not be.
OPTIONS = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    OPTIONS["xla_cpu_use_fusion_emitters"] = (False, True)

QUICKLY = " ".join(f"--{name}={quick}".lower() for name, (quick, _) in OPTIONS.items())
AS_FOR_USERS = {name: users for name, (_, users) in OPTIONS.items()}
