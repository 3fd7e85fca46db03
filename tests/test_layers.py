"""Imports point one way: a folder may use those before it in this list, and none after it."""

import ast
from pathlib import Path

import pytest

import natgalore_jax


FOLDERS = [
    "util",
    "tree",
    "selection",
    "sharding",
    "fisher",
    "quantization",
    "subspace",
    "lowrank_grads",
    "reporting",
    "optimizers",
    "planning",
]
TOP = {"__init__", "__main__", "nnx"}  # re-exports
ROOT = Path(natgalore_jax.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def folder_of(parts):
    return parts[0].removesuffix(".py")


def imports(path):
    """(parts of the imported module, names taken from it) of each import within the package."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = path.parts[: len(path.parts) - node.level]
            names = [alias.name for alias in node.names]
            if node.module:
                yield (*above, *node.module.split(".")), names
            else:
                yield from [((*above, name), []) for name in names]


def test_every_file_has_its_place():
    assert {folder_of(path.parts) for path in FILES} == {*FOLDERS, *TOP}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_its_own_folder_and_those_before_it(path):
    folder = folder_of(path.parts)
    allowed = {*FOLDERS} if folder in TOP else {*FOLDERS[: FOLDERS.index(folder) + 1]}
    for module, names in imports(path):
        assert module[0] in allowed, f"{path} imports {'.'.join(module)}"
        assert not [name for name in names if name.startswith("_")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_module_is_hidden_by_a_public_name(path):
    is_top = len(path.parts) == 1 or path.name == "__init__.py"
    name = path.parts[0].removesuffix(".py")
    assert not is_top or name in TOP or not callable(getattr(natgalore_jax, name, None))
