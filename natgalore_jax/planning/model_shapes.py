"""Parameter shapes of models to plan for: the paper's Llamas, and those listed in a file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sizes(NamedTuple):
    """Sizes of a Llama: widths of the residual stream and of the MLP, layers, vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 32_000


# The models of GaLore (arXiv 2403.03507, table 11), which Natural GaLore uses too.
LLAMA = {
    "60m": Sizes(512, 1376, 8),
    "130m": Sizes(768, 2048, 12),
    "350m": Sizes(1024, 2736, 24),
    "1b": Sizes(2048, 5461, 24),
    "7b": Sizes(4096, 11008, 32),
}

# NumPy's names of the dtypes in the header of a .safetensors file.
SAFETENSORS = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
LARGEST_HEADER = 100_000_000  # bytes


def llama(size: str, dtype: Any = "float32") -> dict[str, Any]:
    """The params of a Llama of :data:`LLAMA` as shapes, with stacked layers as under `scan`.

    Example:
      >>> llama("60m", "bfloat16")["layers"]["mlp"]["up"]["kernel"]
      ShapeDtypeStruct(shape=(8, 512, 1376), dtype=bfloat16)
    """
    hidden, intermediate, layers, vocabulary = LLAMA[size]
    param = lambda name, *shape: {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}
    kernel = lambda m, n: param("kernel", layers, m, n)
    attention = ("query", "key", "value", "out")
    return {
        "embed": param("embedding", vocabulary, hidden),
        "layers": {
            "attention": {name: kernel(hidden, hidden) for name in attention},
            "attention_norm": param("scale", layers, hidden),
            "mlp": {
                "gate": kernel(hidden, intermediate),
                "up": kernel(hidden, intermediate),
                "down": kernel(intermediate, hidden),
            },
            "mlp_norm": param("scale", layers, hidden),
        },
        "norm": param("scale", hidden),
        "head": param("kernel", hidden, vocabulary),
    }


def read_shapes(paths: Iterable[str | Path], dtype: Any = "float32") -> dict[str, Any]:
    """The params listed in files, as shapes.

    Args:
      paths: JSON files, `{"layers/up/kernel": [24, 2048, 5461], ...}`, where a shape may have a
        dtype, `[[24, 2048, 5461], "bfloat16"]`; .safetensors files, of which only the header is
        read; or such headers as JSON files.
      dtype: the dtype of shapes without one.

    Returns:
      Nested dicts, split at "/" in the names.

    Raises:
      ValueError: if a file has another format or a name occurs twice; the message names both.
      OSError: if a file cannot be read.
    """
    tree: dict[str, Any] = {}
    for path in map(Path, paths):
        for name, entry in _entries(path).items():
            try:
                _insert(tree, name, _leaf(entry, dtype))
            except ValueError as error:
                raise ValueError(f"{path}: {name!r} {error}") from None
    if not tree:
        raise ValueError("the files list no shapes.")
    return tree


def _entries(path: Path) -> dict[str, Any]:
    """The entries of a file by name, as parsed from JSON."""
    try:
        entries = json.loads(_header(path) if path.suffix == ".safetensors" else path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is neither JSON nor a .safetensors file: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a JSON object, name -> shape.")
    if "weight_map" in entries:
        raise ValueError(
            f"{path} is an index of .safetensors files and contains no shapes: pass the files that "
            "it lists."
        )
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def _header(path: Path) -> bytes:
    """The JSON header of a .safetensors file, which follows its length in 8 bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        return file.read(length)


def _leaf(entry: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one entry."""
    shape = entry
    if isinstance(entry, dict):
        shape, dtype = entry.get("shape"), entry.get("dtype", dtype)
    elif isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list):
        shape, dtype = entry
    is_size = lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 0
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise ValueError(f"must have a shape, a list of sizes, got {json.dumps(entry)}.")
    try:
        known = jnp.dtype(SAFETENSORS.get(dtype, dtype))
    except TypeError:
        raise ValueError(f"has an unknown dtype, {dtype!r}.") from None
    return jax.ShapeDtypeStruct(tuple(shape), known)


def _insert(tree: dict[str, Any], name: str, leaf: jax.ShapeDtypeStruct) -> None:
    """Inserts a leaf into nested dicts at its name."""
    *parents, last = name.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError("is below another leaf.")
    if last in tree:
        raise ValueError("occurs twice.")
    tree[last] = leaf
