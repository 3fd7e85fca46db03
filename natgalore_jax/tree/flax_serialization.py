"""Flax's serialization (`to_bytes`, `to_state_dict`, msgpack) of this library's pytree nodes.

Flax knows containers, NamedTuples and its own classes; other nodes must be registered with it. The
library does not import Flax: a transformation's `init` registers its nodes once Flax is there.
"""

import sys
from typing import Any

import jax


NODES: set[type] = set()


def serializable(node_type: type) -> type:
    """Marks a pytree node type for :func:`register_with_flax`; a class decorator."""
    NODES.add(node_type)
    return node_type


def register_with_flax() -> None:
    """Registers the marked types with `flax.serialization` if it has been imported."""
    flax = sys.modules.get("flax.serialization")
    if flax is None:
        return

    def to_state_dict(node: Any) -> dict[str, Any]:
        return {name: flax.to_state_dict(child) for name, child in _children(node)}

    def from_state_dict(node: Any, state: dict[str, Any]) -> Any:
        new = [flax.from_state_dict(child, state[name], name) for name, child in _children(node)]
        return jax.tree.structure(node, is_leaf=lambda x: x is not node).unflatten(new)

    for node_type in NODES:
        flax.register_serialization_state(node_type, to_state_dict, from_state_dict, override=True)


def _children(node: Any) -> list[tuple[str, Any]]:
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return [(jax.tree_util.keystr(path, simple=True), child) for path, child in children]
