"""LoRA (arXiv 2106.09685) for the linear layers of a Flax NNX model."""

from collections.abc import Mapping
from typing import Any

from flax import nnx


def with_adapters(model: nnx.Module, rank: int, rngs: nnx.Rngs) -> nnx.Module:
    """Adds LoRA to each linear of the stack of layers: x W + (x A) B, with B initially zero."""

    @nnx.vmap
    def extended(layer: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
        for _, module in list(nnx.iter_modules(layer)):
            for name, child in list(vars(module).items()):
                if isinstance(child, nnx.Linear):
                    m, n = child.in_features, child.out_features
                    lora = nnx.LoRA(m, rank, n, base_module=child, dtype=child.dtype, rngs=rngs)
                    setattr(module, name, lora)
        return layer

    model.layers = extended(model.layers, rngs.split(model.config.layers))
    return model


def without_adapters(params: Any) -> Any:
    """Merges each kernel W with its adapters: W + A B."""
    if not isinstance(params, Mapping):
        return params
    if "base_module" in params:
        base = dict(params["base_module"])
        return base | {"kernel": base["kernel"] + params["lora_a"] @ params["lora_b"]}
    return {name: without_adapters(part) for name, part in params.items()}
