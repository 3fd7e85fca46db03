"""The paper's pre-training hyper-parameters by model size (arXiv 2410.16029, --preset).

The paper uses GaLore's settings (arXiv 2403.03507, `scripts/benchmark_c4`): batches of 512 x 256
tokens, learning rate 0.01 for all weights, warm-up over a tenth of the steps, cosine decay to a
tenth of the rate. For 1b, GaLore's script has rank 1024; its table and the paper have 512.

Our additions: intervals of validation and checkpoints; scanned layers, to compile faster;
micro-batches sized for one device with 80 GB. Weights are float32.
"""

from typing import Any


def numbers(size: str, rank: int, steps: int, micro_batches: int) -> dict[str, Any]:
    """Settings of one size."""
    return {
        "size": size,
        "rank": rank,
        "steps": steps,
        "micro_batches": micro_batches,
        "refresh_every": 200,
        "batch_size": 512,
        "seq_len": 256,
        "weight_decay": 0.0,
        "dtype": "bfloat16",
        "scan": True,
        "validate_every": 1000,
        "save_every": 1000,
    }


PRESETS = {
    "60m": numbers("60m", rank=128, steps=10_000, micro_batches=8),
    "130m": numbers("130m", rank=256, steps=20_000, micro_batches=8),
    "350m": numbers("350m", rank=256, steps=60_000, micro_batches=16),
    "1b": numbers("1b", rank=512, steps=100_000, micro_batches=32),
}

# Settings of the optimizers in the paper; other optimizers keep their defaults.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "natural_galore": {
        "lr": 0.01,
        "scale": 0.25,
        "fisher": "window",
        "residual": "none",
        "b2": 0.999,
    },
    "galore": {"lr": 0.01, "scale": 0.25, "residual": "none", "b2": 0.999},
}
