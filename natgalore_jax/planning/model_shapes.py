"""Shapes of models, to count with: those of the paper's Llamas, and those that a file names."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sizes(NamedTuple):
    """Of a Llama: widths of the residual stream and of the MLP, depth, and number of tokens."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 32_000


# GaLore's, of which Natural GaLore takes the same (arXiv 2403.03507, table 11).
LLAMA = {
    "60m": Sizes(512, 1376, 8),
    "130m": Sizes(768, 2048, 12),
    "350m": Sizes(1024, 2736, 24),
    "1b": Sizes(2048, 5461, 24),
    "7b": Sizes(4096, 11008, 32),
}

# What the header of a .safetensors file calls other than NumPy does.
SAFETENSORS = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
LARGEST_HEADER = 100_000_000  # bytes, of a .safetensors file


def llama(size: str, dtype: Any = "float32") -> dict[str, Any]:
    """The params of a Llama of :data:`LLAMA`, as shapes; its layers are stacked, as if scanned.

    Example:
      >>> llama("60m", "bfloat16")["layers"]["mlp"]["up"]["kernel"]
      ShapeDtypeStruct(shape=(8, 512, 1376), dtype=bfloat16)
    """
    hidden, intermediate, layers, vocabulary = LLAMA[size]
    of = lambda name, *shape: {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}
    kernel = lambda m, n: of("kernel", layers, m, n)
    attention = ("query", "key", "value", "out")
    return {
        "embed": of("embedding", vocabulary, hidden),
        "layers": {
            "attention": {name: kernel(hidden, hidden) for name in attention},
            "attention_norm": of("scale", layers, hidden),
            "mlp": {
                "gate": kernel(hidden, intermediate),
                "up": kernel(hidden, intermediate),
                "down": kernel(intermediate, hidden),
            },
            "mlp_norm": of("scale", layers, hidden),
        },
        "norm": of("scale", hidden),
        "head": of("kernel", hidden, vocabulary),
    }


def read_shapes(paths: Iterable[str | Path], dtype: Any = "float32") -> dict[str, Any]:
    """The params that files name, as shapes.

    Args:
      paths: of files of JSON, `{"layers/up/kernel": [24, 2048, 5461], ...}`, where a shape may come
        with its dtype, `[[24, 2048, 5461], "bfloat16"]`; of .safetensors files, of which the header
        alone is read; or of such headers, which are JSON too.
      dtype: of what comes without.

    Returns:
      A dict of dicts, nested as the names are at "/".

    Raises:
      ValueError: if a file is none of these, or a name is there twice; the message names both.
      OSError: if it cannot be read.
    """
    tree: dict[str, Any] = {}
    for path in map(Path, paths):
        for name, said in _named(path).items():
            try:
                _put(tree, name, _leaf(said, dtype))
            except ValueError as error:
                raise ValueError(f"{path}: {name!r} {error}") from None
    if not tree:
        raise ValueError("no shape is named in the files given.")
    return tree


def _named(path: Path) -> dict[str, Any]:
    """What a file says of each name."""
    try:
        named = json.loads(_header(path) if path.suffix == ".safetensors" else path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is neither JSON nor a .safetensors file: {error}") from None
    if not isinstance(named, dict):
        raise ValueError(f"{path} must hold a JSON object, name -> shape.")
    if "weight_map" in named:
        raise ValueError(
            f"{path} is an index: it says which file holds what, but no shapes. Give the "
            ".safetensors files that it names."
        )
    return {name: said for name, said in named.items() if name != "__metadata__"}


def _header(path: Path) -> bytes:
    """The JSON at the start of a .safetensors file, after its length in 8 bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        return file.read(length)


def _leaf(said: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """A shape and a dtype, as a file says them."""
    shape = said
    if isinstance(said, dict):
        shape, dtype = said.get("shape"), said.get("dtype", dtype)
    elif isinstance(said, list) and len(said) == 2 and isinstance(said[0], list):
        shape, dtype = said
    is_size = lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 0
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise ValueError(f"must have a shape, a list of sizes, got {json.dumps(said)}.")
    try:
        known = jnp.dtype(SAFETENSORS.get(dtype, dtype))
    except TypeError:
        raise ValueError(f"has a dtype that is not known, {dtype!r}.") from None
    return jax.ShapeDtypeStruct(tuple(shape), known)


def _put(tree: dict[str, Any], name: str, leaf: jax.ShapeDtypeStruct) -> None:
    """Puts a leaf into nested dicts, at its name."""
    *within, last = name.split("/")
    for key in within:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError("is within what is a leaf too.")
    if last in tree:
        raise ValueError("is there twice.")
    tree[last] = leaf
