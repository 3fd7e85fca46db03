"""Resolves an argument given as a value, rules, a tree or a function to one value per leaf."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PyTree

from ..tree.leaf_spec import path_name


class Argument(NamedTuple):
    """An argument with one value per leaf of the params.

    The argument is one value for all leaves; rules, a list of (pattern, value) in which the first
    pattern found in a leaf's name decides; a tree of values or a prefix of one; or a function from
    the params to such a tree.

    Attributes:
      name: name of the argument, for error messages.
      is_value: predicate that tells a value from a tree or a function.
      allowed: description of the allowed values, for error messages.
      default: value of a leaf that matches no rule.
    """

    name: str
    is_value: Callable[[Any], bool]
    allowed: str
    default: Any

    def per_leaf(self, argument: Any, params: PyTree) -> list[Any]:
        """The value for each leaf of `params`.

        Raises:
          ValueError: if a pattern matches no leaf name, a value is not allowed, or a tree does not
            fit the params.
        """
        if callable(argument) and not self.is_value(argument):
            argument = argument(params)
        if _is_rules(argument):
            return self._from_rules(argument, params)
        values: list[Any] = []
        broadcast = lambda value, subtree: values.extend([value] * len(jax.tree.leaves(subtree)))
        try:
            jax.tree.map(broadcast, argument, params, is_leaf=self.is_value)
        except (ValueError, TypeError) as error:
            reason = self._misfit(argument, params) or str(error).splitlines()[0]
            raise ValueError(
                f"`{self.name}` does not fit the tree of params: {reason}. It may be one value, "
                "rules [(pattern, value), ...], or a tree like the params or a prefix of it."
            ) from None
        return [self.checked(value) for value in values]

    def _misfit(self, argument: Any, params: PyTree) -> str | None:
        """The first name that only one of the trees has; None if both have the same names."""
        paths = jax.tree_util.tree_leaves_with_path(argument, is_leaf=self.is_value)
        given = [path_name(path) for path, _ in paths]
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        fits = lambda prefix, name: f"{name}/".startswith(f"{prefix}/")
        for prefix in given:
            if not any(fits(prefix, name) for name in names):
                return f"it has a value at {prefix!r}, where they have no leaf"
        for name in names:
            if not any(fits(prefix, name) for prefix in given):
                return f"it has no value for {name!r}"
        return None

    def checked(self, value: Any) -> Any:
        """Returns `value`; raises ValueError if it is not allowed."""
        if not self.is_value(value):
            raise ValueError(f"`{self.name}` of a leaf is {value!r}; it must be {self.allowed}.")
        return value

    def _from_rules(self, rules: Sequence[tuple[str, Any]], params: PyTree) -> list[Any]:
        # A rule may name a leaf that `optax.masked` withholds.
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
                    f"`{self.name}` has a rule for {pattern!r}, which matches no leaf name. "
                    f"The nearest are {', '.join(map(repr, _nearest(pattern, names)))}."
                )
        return [
            next((value for pattern, value in compiled if pattern.search(name)), self.default)
            for name, (_, leaf) in zip(names, leaves, strict=True)
            if not withheld(leaf)
        ]


def _is_rules(argument: Any) -> bool:
    return (
        isinstance(argument, list | tuple)
        and len(argument) > 0
        and all(isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in argument)
    )


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """The three names most similar to a pattern; names that differ only by numbers count once.

    The similarity of a name is that of its most similar run of keys, as a pattern may address a
    part of a name.
    """
    plain = re.sub(r"\\[dwsb]|[\\^$().*+?|]|\[.*?\]|\{.*?\}", "", pattern)

    def similarity(name: str) -> float:
        keys = name.split("/")
        width = plain.count("/") + 1
        parts = ["/".join(keys[i : i + width]) for i in range(max(1, len(keys) - width + 1))]
        return max(difflib.SequenceMatcher(None, plain, part).ratio() for part in parts)

    unique = {re.sub(r"\d+", "", name): name for name in reversed(names)}
    return sorted(unique.values(), key=similarity, reverse=True)[:3]
