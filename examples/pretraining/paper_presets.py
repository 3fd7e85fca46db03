"""The paper's hyper-parameters of pre-training, by the size of the model (arXiv 2410.16029).

They are GaLore's (arXiv 2403.03507, `scripts/benchmark_c4`), which the paper took over: batches of
512 x 256 tokens, a rate of 0.01 for projected and other weights alike, a tenth of the steps to warm
up, a cosine down to a tenth. GaLore's script for 1b says rank 1024, its table and the paper 512.

Not theirs: how often to validate and save; layers are scanned, to compile sooner; a batch is summed
from micro-batches that are meant for one device of 80 GB. Weights stay float32.
"""

from typing import Any


def numbers(size: str, rank: int, steps: int, micro_batches: int) -> dict[str, Any]:
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

# Of the optimizers that have published ones: the others keep their defaults.
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
