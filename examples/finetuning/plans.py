"""Plans of function calls: parser, comparison, success.

    1. get_email_address("Sid")
    2. compose_new_email(["$1"], "Lunch", "At noon?", attachments=[])
    3. join()<END_OF_PLAN>

The format is that of TinyAgent (arXiv 2409.00608), with keyword arguments. A call may use the
result of an earlier call, here $1. The calls are the nodes and the uses are the edges of an acyclic
graph. Two plans are equal if their graphs are isomorphic, whatever the order and the numbers of the
calls. TinyAgent's own metric compares names and edges; `same_graph` can also compare the arguments,
or accept several values of each, as the Berkeley Function-Calling Leaderboard does:

    {"city": ["Berkeley", "Berkeley, CA"], "unit": ["", "celsius"]}      "": may be left out
"""

import ast
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


END = "join()<END_OF_PLAN>"
CALL = re.compile(r"^\s*(\d+)\.\s*([\w.]+)\((.*)\)\s*(?:<END_OF_PLAN>)?\s*$")
REFERENCE = re.compile(r"\$\{?(\d+)\}?")
Accepted = Mapping[str, Sequence[Any]]  # values by argument


class Call(NamedTuple):
    """One call.

    Attributes:
        number: its number in the plan.
        name: name of the function.
        arguments: positional arguments; the text between the parentheses if it is not Python.
        keywords: keyword arguments.
        accepted: for an expected call, the accepted values of each argument; None: only its own.
    """

    number: int
    name: str
    arguments: Any
    keywords: Mapping[str, Any]
    accepted: Accepted | None = None


def arguments(text: str) -> tuple[Any, dict[str, Any]]:
    """Positional and keyword arguments as Python literals; the text itself if it is not Python.

    Example:
        >>> arguments("[1, 2], unit='m'")
        ([[1, 2]], {'unit': 'm'})
        >>> arguments("today")
        ('today', {})
    """
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):  # e.g. "1)(2"
            return text, {}
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
        if len(keywords) < len(call.keywords):  # one is repeated, or **
            return text, {}
        return [ast.literal_eval(value) for value in call.args], keywords
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text, {}


def references(call: Call) -> set[int]:
    """Numbers of the calls whose results the call uses."""
    used = REFERENCE.findall(repr((call.arguments, call.keywords)))
    return {int(number) for number in used}


def parse(text: str) -> list[Call]:
    """The calls of a plan, up to and without its final `join()`.

    Raises:
        ValueError: a line is not a call, uses the result of a later call, or `join()` is missing.
    """
    calls: list[Call] = []
    for line in filter(str.strip, text.splitlines()):
        match = CALL.match(line)
        if match is None:
            raise ValueError(f"{line!r} is not a call")
        call = Call(int(match[1]), match[2], *arguments(match[3]))
        if call.name == "join":
            return calls
        if missing := references(call) - {before.number for before in calls}:
            raise ValueError(f"{line!r} uses ${min(missing)}, which is not an earlier call")
        calls.append(call)
    raise ValueError("the plan does not end with join()")


def text_of(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The plan with these calls, given by name and keyword arguments.

    Example:
        >>> print(text_of([("math.hypot", {"x": 3, "y": 4})]))
        1. math.hypot(x=3, y=4)
        2. join()<END_OF_PLAN>
    """
    written = [
        f"{name}({', '.join(f'{k}={v!r}' for k, v in keywords.items())})"
        for name, keywords in calls
    ]
    return "\n".join(f"{i}. {call}" for i, call in enumerate([*written, END], start=1))


def renamed(value: Any, numbers: dict[int, int]) -> Any:
    """Arguments with the numbers of calls replaced, at any depth."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda m: f"${numbers[int(m[1])]}", value)
    if isinstance(value, (list, tuple)):
        return [renamed(part, numbers) for part in value]
    if isinstance(value, Mapping):
        return {key: renamed(part, numbers) for key, part in value.items()}
    return value


def plain(text: str) -> str:
    """The text as the leaderboard compares it.

    Example:
        >>> plain("April 1, 2024") == plain("april 1 2024")
        True
    """
    return re.sub(r"[ ,./_*^-]", "", text).lower().replace("'", '"')


def matches(value: Any, accepted: Any) -> bool:
    """Whether a value equals an accepted one, as the leaderboard compares them.

    Strings are equal up to case, spaces and punctuation, numbers by value; True is not 1. A list
    equals a tuple. An accepted dict has the accepted values of each key.
    """
    if isinstance(accepted, Mapping):
        return isinstance(value, dict) and accepts(accepted, value)
    if isinstance(accepted, (list, tuple)):
        same_length = isinstance(value, (list, tuple)) and len(value) == len(accepted)
        return same_length and all(map(matches, value, accepted))
    if isinstance(accepted, str):
        return isinstance(value, str) and plain(value) == plain(accepted)
    return isinstance(value, bool) == isinstance(accepted, bool) and value == accepted


def accepts(accepted: Accepted, keywords: Mapping[str, Any]) -> bool:
    """Whether each keyword argument has an accepted value, and only optional ones are left out.

    Example:
        >>> accepted = {"city": ["Berkeley", "Berkeley, CA"], "unit": ["", "celsius"]}
        >>> accepts(accepted, {"city": "berkeley CA"})
        True
        >>> accepts(accepted, {"unit": "celsius"})
        False
    """

    def fits(name: str, values: Sequence[Any]) -> bool:
        if name not in keywords:
            return "" in values
        return any(matches(keywords[name], value) for value in values)

    return keywords.keys() <= accepted.keys() and all(map(fits, accepted.keys(), accepted.values()))


def same_graph(plan: Sequence[Call], other: Sequence[Call], *, with_arguments: bool) -> bool:
    """Whether the graphs of two plans are isomorphic.

    Backtracking search: each call of the plan, in order, is matched to an unmatched call of the
    other plan with the same name and, under the numbering so far, the same edges or arguments. Only
    calls of the other plan may have accepted values.
    """
    identity = {call.number: call.number for call in other}

    def agree(call: Call, theirs: Call, numbers: dict[int, int]) -> bool:
        if call.name != theirs.name:
            return False
        if not with_arguments:
            return {numbers[number] for number in references(call)} == references(theirs)
        if theirs.accepted is not None:
            keywords = renamed(call.keywords, numbers)
            return not call.arguments and accepts(theirs.accepted, keywords)
        ours = (call.arguments, call.keywords)
        return renamed(ours, numbers) == renamed((theirs.arguments, theirs.keywords), identity)

    def match(i: int, numbers: dict[int, int]) -> bool:
        return i == len(plan) or any(
            agree(plan[i], theirs, numbers)
            and match(i + 1, {**numbers, plan[i].number: theirs.number})
            for theirs in other
            if theirs.number not in numbers.values()
        )

    return len(plan) == len(other) and match(0, {})


class Example(NamedTuple):
    """A record.

    Attributes:
        messages: the prompt as (role, content).
        plan: the plan to be generated.
        accepted: the accepted arguments of each of its calls; None: only those of the plan.
    """

    messages: tuple[tuple[str, str], ...]
    plan: str
    accepted: tuple[Accepted, ...] | None = None


def expected(example: Example) -> list[Call]:
    """The calls of the example's plan, with their accepted arguments.

    Raises:
        ValueError: the plan is malformed, or `accepted` does not fit it.
    """
    calls = parse(example.plan)
    if example.accepted is None:
        return calls
    if len(example.accepted) != len(calls):
        raise ValueError(f"accepted arguments of {len(example.accepted)} calls, not {len(calls)}")
    calls = [c._replace(accepted=a) for c, a in zip(calls, example.accepted, strict=True)]
    for call in calls:
        if call.arguments or not accepts(call.accepted or {}, call.keywords):
            raise ValueError(f"call {call.number} of the plan is not among the accepted ones")
    return calls


def example(record: Mapping[str, Any]) -> Example:
    """The example in a line of a .jsonl file.

    Args:
        record: `messages`, a list of {"role": ..., "content": ...}; `plan`; and optionally
            `accepted`, a list with the accepted values by argument of each call.

    Raises:
        KeyError: the record has no messages or no plan.
        ValueError: a part is malformed.
    """
    try:
        messages = tuple((str(m["role"]), str(m["content"])) for m in record["messages"])
        accepted = record.get("accepted")
        accepted = None if accepted is None else tuple(map(dict, accepted))
        found = Example(messages, str(record["plan"]), accepted)
        expected(found)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"malformed record: {error}") from error
    return found


def judge(written: str, example: Example) -> dict[str, float]:
    """Success of a generated plan, with and without arguments (TinyAgent's metric): 0 or 1."""
    wanted = expected(example)
    try:
        calls = parse(written)
    except ValueError:
        return {"success": 0.0, "success without arguments": 0.0}
    return {
        "success": float(same_graph(calls, wanted, with_arguments=True)),
        "success without arguments": float(same_graph(calls, wanted, with_arguments=False)),
    }


def split(
    examples: Sequence[Example], share: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Two parts in random order, of which no function is called by plans of both.

    A function that one part calls may be offered, and not called, in the other.

    Args:
        examples: with valid plans.
        share: size of the second part, relative to all examples.
        seed: seed of the random order.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    names = [[call.name for call in parse(example.plan)] or [""] for example in examples]
    for first, *others in names:
        for name in others:
            parents[root(name)] = root(first)
    groups: dict[str, list[Example]] = {}
    for example, (first, *_) in zip(examples, names, strict=True):
        groups.setdefault(root(first), []).append(example)
    order = list(groups.values())
    generator = random.Random(seed)
    generator.shuffle(order)
    rest: list[Example] = []
    held_out: list[Example] = []
    for group in order:
        (held_out if len(held_out) < share * len(examples) else rest).extend(group)
    for part in (rest, held_out):
        generator.shuffle(part)
    return rest, held_out
