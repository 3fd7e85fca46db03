"""Converts weights between safetensors files and the nested dicts of Flax.

    params = load(folder, abstract_params, names)      checks all names and shapes
    save(folder, params, names, config)                writes a folder that `load` can read

`names` maps our parameter names to tensor names in the file; {} stands for the index of a layer:

    {"layers/{}/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight", …}

Matrices in the file are (out, in), as in PyTorch; a kernel of Flax is the transpose. Names and
shapes are checked from the headers of the files before any tensor is read; each tensor is read once
and cast to the dtype of the parameter.
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
    """Target of a tensor.

    Attributes:
        path: keys in the nested dict.
        shape: shape in the file.
        dtype: dtype in the nested dict.
    """

    path: tuple
    shape: tuple[int, ...]
    dtype: np.dtype


def parts(params: Params, names: Mapping[str, str]) -> dict[str, Part]:
    """Parameters by tensor name; leaves need a shape and a dtype only."""

    def part(path: tuple, leaf) -> tuple[str, Part]:
        words = [str(key) for key in path]
        numbers = [word for word in words if word.isdecimal()]
        template = "/".join("{}" if word.isdecimal() else word for word in words)
        shape = leaf.shape[::-1] if words[-1] == "kernel" else leaf.shape
        return names[template].format(*numbers), Part(path, tuple(shape), leaf.dtype)

    return dict(part(*item) for item in traverse_util.flatten_dict(params).items())


def grouped(names: Iterable[str]) -> str:
    """Names in one line; names that differ only in numbers are merged.

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
    """The safetensors files of a checkpoint: the file `path`, or the files in the folder `path`.

    Raises:
        FileNotFoundError: there is no file, or a file of the index is missing.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if lost := [name for name in named if not (path / name).is_file()]:
            raise FileNotFoundError(
                f"{path} lacks {', '.join(lost)}, listed in {index.name}: download it again"
            )
        return [path / name for name in named]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    other = " (PyTorch weights, .bin, are not supported)" if any(path.glob("*.bin")) else ""
    raise FileNotFoundError(f"no model.safetensors at {path}{other}")


def opened(file: Path):
    """Opens a safetensors file; reads its header only.

    Raises:
        ValueError: the file is truncated or not a safetensors file.
    """
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file: download it again ({error})"
        ) from error


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors of a checkpoint, see `weight_files`."""
    return [name for file in weight_files(path) for name in opened(file).keys()]  # noqa: SIM118


def load(
    path: Path,
    params: Params,
    names: Mapping[str, str],
    *,
    unused: str = "",
    optional: str = "",
) -> Params:
    """Reads a checkpoint into NumPy arrays with the structure of `params`.

    Args:
        path: a safetensors file, or a folder with one file or with an index of several.
        params: leaves with shape and dtype.
        names: tensor names by parameter name.
        unused: pattern of additional tensors that are ignored.
        optional: pattern of tensors that may be missing; their leaves stay unchanged.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file is damaged, or tensors are missing, unknown or of the wrong shape; the
            message lists all of them.
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
        raise ValueError(f"the weights in {path} do not fit the model: {'; '.join(complaints)}")

    leaves = dict(traverse_util.flatten_dict(params))
    for name in wanted.keys() & found.keys():
        tensor = files[found[name]].get_tensor(name)
        leaves[wanted[name].path] = converted(tensor, wanted[name])
    return traverse_util.unflatten_dict(leaves)


def converted(tensor: Shaped[np.ndarray, "..."], part: Part) -> Shaped[np.ndarray, "..."]:
    """The tensor in the part's dtype, transposed if it is a kernel (in both directions)."""
    kernel = part.path[-1] == "kernel"
    return np.ascontiguousarray(tensor.T if kernel else tensor, part.dtype)


def missing(params: Params) -> list[str]:
    """Names of the leaves in the result of `load` that were not in the file."""
    leaves = traverse_util.flatten_dict(params).items()
    return ["/".join(map(str, k)) for k, leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]


def save(folder: Path, params: Params, names: Mapping[str, str], config: Mapping) -> None:
    """Writes `model.safetensors` and `config.json`; replaces an earlier file only once complete.

    Raises:
        OSError: a file cannot be written.
    """
    leaves = traverse_util.flatten_dict(params)
    tensors = {
        name: converted(np.asarray(leaves[part.path]), part)
        for name, part in parts(params, names).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "model.safetensors.new"
    save_file(tensors, new, metadata={"format": "pt"})
    os.replace(new, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """Reads the `config.json` of a checkpoint; its `model_type` must be one of `kinds`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not JSON, or of another model type.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {folder}: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") not in kinds:
        raise ValueError(f"{file} does not have model_type {' or '.join(map(repr, kinds))}")
    return config
