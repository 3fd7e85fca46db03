"""Imports point downward: a room may use those before it in this list, and none after it."""

import ast
from pathlib import Path

import pytest

import natgalore_jax


ROOMS = [
    {"checks", "control", "linalg", "programs", "shapes", "spec", "stacks", "tables"},
    {"manual", "parts", "roles", "tagged"},
    {"kinds", "placement", "products", "rules", "spectra"},
    {"codes", "dealing", "layout", "uses"},
    {"coded", "select", "basis", "boxes", "fisher_core", "decay", "lowrank"},
    {"fisher_window", "symmetric"},
    {"ladder", "residual", "signs", "sweep", "transport"},
    {"lift", "refresh"},
    {"lower"},
    {"backward", "engine"},
    {"costs", "project", "turns", "whole"},
    {"gradients", "recipes", "diagnostics", "memory", "offload", "quantize", "rounding"},
    {"counts", "explain", "nnx", "report", "sharding"},
    {"planned"},
    {"plan"},
    {"__main__"},
]
FILES = {
    path.stem: path
    for path in Path(natgalore_jax.__file__).parent.glob("*.py")
    if path.stem != "__init__"
}


def imports(path):
    """The rooms that a file imports, and the names it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [alias.name for alias in node.names]
            yield from [(node.module, names)] if node.module else [(name, []) for name in names]


def test_every_room_has_its_floor():
    assert set().union(*ROOMS) == set(FILES)


@pytest.mark.parametrize("floor", range(len(ROOMS)))
def test_a_room_stands_on_those_below(floor):
    below = set().union(*ROOMS[:floor])
    for room in ROOMS[floor]:
        for module, names in imports(FILES[room]):
            assert module in below, f"{room} imports {module}"
            assert not [name for name in names if name.startswith("_")]
