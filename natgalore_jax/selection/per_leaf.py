"""What is said of each leaf of a tree: by one value, by rules, by a tree, or by a function."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PyTree

from ..tree.leaf_spec import path_name


class Argument(NamedTuple):
    """An argument that says something of each leaf of the params.

    It may be one value for all leaves; rules, a list of (pattern, value) of which the first whose
    pattern is found in a leaf's name counts; a tree of values, or a prefix of one; or a function
    from the params to such a tree.

    Attributes:
      name: of the argument.
      is_value: whether an object is a value, and not a tree or a function.
      allowed: what values may be, in words.
      default: what holds of a leaf that no rule fits.
    """

    name: str
    is_value: Callable[[Any], bool]
    allowed: str
    default: Any

    def per_leaf(self, said: Any, params: PyTree) -> list[Any]:
        """The value for each leaf of `params`.

        Raises:
          ValueError: if a pattern is found in no name, something is said that is no value, or a
            tree does not fit the params.
        """
        if callable(said) and not self.is_value(said):
            said = said(params)
        if _is_rules(said):
            return self._by_rules(said, params)
        values: list[Any] = []
        broadcast = lambda value, below: values.extend([value] * len(jax.tree.leaves(below)))
        try:
            jax.tree.map(broadcast, said, params, is_leaf=self.is_value)
        except (ValueError, TypeError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"`{self.name}` does not fit the tree of params: {why}") from None
        return [self.checked(value) for value in values]

    def checked(self, value: Any) -> Any:
        if not self.is_value(value):
            raise ValueError(f"`{self.name}` says {value!r} of a leaf; it must be {self.allowed}.")
        return value

    def _by_rules(self, rules: Sequence[tuple[str, Any]], params: PyTree) -> list[Any]:
        # A leaf that `optax.masked` withholds is there to be named all the same.
        withheld = lambda x: isinstance(x, optax.MaskedNode)
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=withheld)
        names = [path_name(path) for path, _ in leaves]
        compiled = []
        for pattern, value in rules:
            try:
                compiled.append((re.compile(pattern), self.checked(value)))
            except re.error as error:
                raise ValueError(f"`{self.name}` has a bad pattern {pattern!r}: {error}.") from None
            if names and not any(compiled[-1][0].search(name) for name in names):
                raise ValueError(
                    f"`{self.name}` has a rule for {pattern!r}, which is found in no leaf's name. "
                    f"The nearest are {', '.join(map(repr, _nearest(pattern, names)))}."
                )
        return [
            next((value for pattern, value in compiled if pattern.search(name)), self.default)
            for name, (_, leaf) in zip(names, leaves, strict=True)
            if not withheld(leaf)
        ]


def _is_rules(said: Any) -> bool:
    return (
        isinstance(said, list | tuple)
        and len(said) > 0
        and all(isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in said)
    )


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """The three names that look most like what a pattern spells, one of each that differ by number.

    A pattern may be meant for a part of a name: its best part counts.
    """
    plain = re.sub(r"\\[dwsb]|[\\^$().*+?|]|\[.*?\]|\{.*?\}", "", pattern)

    def likeness(name: str) -> float:
        keys = name.split("/")
        width = plain.count("/") + 1
        parts = ["/".join(keys[i : i + width]) for i in range(max(1, len(keys) - width + 1))]
        return max(difflib.SequenceMatcher(None, plain, part).ratio() for part in parts)

    alike = {re.sub(r"\d+", "", name): name for name in reversed(names)}
    return sorted(alike.values(), key=likeness, reverse=True)[:3]
