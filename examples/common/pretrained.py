"""Weights between safetensors files and the nested dicts of Flax: by name, or not at all.

    params = load(folder, abstract_params, names)      all there and of the right shape, or an error
    save(folder, params, names)                        what `load` reads again

`names` says what a file calls each parameter, with {} for the number of a layer:

    {"layers/{}/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight", …}

A file's matrices are (out, in), PyTorch's way: they are transposed where Flax has a kernel. Tensors
are checked by the headers of the files alone, before any is read; each is read once, and cast.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


Params = dict[str, Any]


class Part(NamedTuple):
    """Where a tensor goes.

    Attributes:
        path: its keys in the nested dict.
        shape: in the file.
        dtype: in the nested dict.
    """

    path: tuple
    shape: tuple[int, ...]
    dtype: np.dtype


def parts(params: Params, names: Mapping[str, str]) -> dict[str, Part]:
    """The parameters by their names in a file; of all it is enough to know shape and dtype."""

    def part(path: tuple, leaf) -> tuple[str, Part]:
        words = [str(key) for key in path]
        numbers = [word for word in words if word.isdecimal()]
        template = "/".join("{}" if word.isdecimal() else word for word in words)
        shape = leaf.shape[::-1] if words[-1] == "kernel" else leaf.shape
        return names[template].format(*numbers), Part(path, tuple(shape), leaf.dtype)

    return dict(part(*item) for item in traverse_util.flatten_dict(params).items())


def grouped(names: Iterable[str]) -> str:
    """Names in a line, those that differ by their numbers as one.

    Example:
        >>> grouped(["norm.weight", "layers.0.up.weight", "layers.1.up.weight"])
        'norm.weight, layers.*.up.weight (2)'
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return ", ".join(
        found[0] if len(found) == 1 else f"{group} ({len(found)})"
        for group, found in groups.items()
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: `path` itself, or what is in the folder `path`.

    Raises:
        FileNotFoundError: there is none, or one of several is missing.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if lost := [name for name in named if not (path / name).is_file()]:
            raise FileNotFoundError(
                f"{path} lacks {', '.join(lost)}, which {index.name} names: download it again"
            )
        return [path / name for name in named]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    other = " (weights for PyTorch, .bin, are not read)" if any(path.glob("*.bin")) else ""
    raise FileNotFoundError(f"no model.safetensors at {path}{other}")


def opened(file: Path):
    """A file, of which nothing but the header is read.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short or no safetensors file: download it again ({error})"
        ) from error


def load(
    path: Path,
    params: Params,
    names: Mapping[str, str],
    *,
    unused: str = "",
    optional: str = "",
) -> Params:
    """Reads a checkpoint into NumPy arrays in the structure of `params`, of which it needs shapes.

    Args:
        path: a safetensors file, or a folder with one or with an index of several.
        params: with leaves that have shape and dtype.
        names: by which the file calls them.
        unused: pattern of the tensors that may be in the file beyond those.
        optional: pattern of the tensors that need not be there: their leaves are left as they are.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a file is damaged, or tensors are missing, misshapen or unknown: all are named.
    """
    wanted = parts(params, names)
    files = {file: opened(file) for file in weight_files(path)}
    found = {name: file for file, tensors in files.items() for name in tensors.keys()}  # noqa: SIM118

    shape = lambda name: tuple(files[found[name]].get_slice(name).get_shape())
    lost = [n for n in wanted if n not in found and not (optional and re.search(optional, n))]
    unknown = [n for n in found if n not in wanted and not (unused and re.search(unused, n))]
    misshapen = [n for n in wanted if n in found and shape(n) != wanted[n].shape]
    complaints = [f"missing: {grouped(lost)}"] if lost else []
    complaints += [f"unknown: {grouped(unknown)}"] if unknown else []
    complaints += [f"{n} is {shape(n)}, not {wanted[n].shape}" for n in misshapen]
    if complaints:
        raise ValueError(f"{path} holds other weights than the model: {'; '.join(complaints)}")

    leaves = dict(traverse_util.flatten_dict(params))
    for name in wanted.keys() & found.keys():
        tensor = files[found[name]].get_tensor(name)
        leaves[wanted[name].path] = turned(tensor, wanted[name])
    return traverse_util.unflatten_dict(leaves)


def turned(tensor: Shaped[np.ndarray, "..."], part: Part) -> Shaped[np.ndarray, "..."]:
    """A tensor as it is on the other side: transposed, if it is a kernel, in the part's dtype."""
    kernel = part.path[-1] == "kernel"
    return np.ascontiguousarray(tensor.T if kernel else tensor, part.dtype)


def missing(params: Params) -> list[str]:
    """Of what `load` gave back: the leaves that were not in the file."""
    leaves = traverse_util.flatten_dict(params).items()
    return ["/".join(map(str, k)) for k, leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]


def save(folder: Path, params: Params, names: Mapping[str, str], config: Mapping) -> None:
    """Writes `model.safetensors` and `config.json`; what was there stays whole until they are.

    Raises:
        OSError: they cannot be written.
    """
    leaves = traverse_util.flatten_dict(params)
    tensors = {
        name: turned(np.asarray(leaves[part.path]), part)
        for name, part in parts(params, names).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "model.safetensors.new"
    save_file(tensors, new, metadata={"format": "pt"})
    os.replace(new, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """Reads the `config.json` beside a checkpoint of this kind of model.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is of another kind.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {folder}: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != kind:
        raise ValueError(f"{file} is not of a {kind}")
    return config
