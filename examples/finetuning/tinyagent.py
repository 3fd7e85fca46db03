"""Plans of function calls: how TinyAgent writes, stores and judges them (arXiv 2409.00608).

    1. get_email_address("Sid")
    2. compose_new_email(["$1"], "Lunch", "At noon?", [])
    3. join()<END_OF_PLAN>

A call may use what an earlier one gave, $1 here: calls are the nodes of a graph without cycles and
such uses its edges. Two plans are equal if their graphs are, whatever the order and the numbers of
the calls. TinyAgent's own measure compares names and edges; ours can compare the arguments too.
"""

import ast
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.finetuning.records import Records


CALL = re.compile(r"^\s*(\d+)\.\s*(\w+)\((.*)\)\s*(?:<END_OF_PLAN>)?\s*$")
REFERENCE = re.compile(r"\$\{?(\d+)\}?")


class Call(NamedTuple):
    """One call: its number in the plan, the function, and the arguments, strings as written."""

    number: int
    name: str
    arguments: Any


def arguments(text: str) -> Any:
    """A list of Python literals, or the text itself where it is none."""
    try:
        return ast.literal_eval(f"[{text}]")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def references(call: Call) -> set[int]:
    """Numbers of the calls that it uses."""
    return {int(number) for number in REFERENCE.findall(repr(call.arguments))}


def parse(text: str) -> list[Call]:
    """The calls of a plan, up to its `join()`, which uses them all and is left out.

    Raises:
        ValueError: a line is no call, or uses one that does not come before it.
    """
    calls: list[Call] = []
    for line in filter(str.strip, text.splitlines()):
        match = CALL.match(line)
        if match is None:
            raise ValueError(f"{line!r} is no call")
        call = Call(int(match[1]), match[2], arguments(match[3]))
        if call.name == "join":
            return calls
        if missing := references(call) - {before.number for before in calls}:
            raise ValueError(f"{line!r} uses ${min(missing)}, which is not before it")
        calls.append(call)
    raise ValueError("it does not end with join()")


def renamed(value: Any, numbers: dict[int, int]) -> Any:
    """Arguments with the numbers of calls replaced, however deep they are."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda m: f"${numbers[int(m[1])]}", value)
    if isinstance(value, (list, tuple)):
        return [renamed(part, numbers) for part in value]
    if isinstance(value, dict):
        return {key: renamed(part, numbers) for key, part in value.items()}
    return value


def same_graph(plan: Sequence[Call], other: Sequence[Call], *, with_arguments: bool) -> bool:
    """Whether one plan's graph is the other's.

    Each call of the plan is matched, in its order, to one of the other that has its name and, with
    the numbers of the calls matched before, its arguments; a choice that fails later is taken back.
    """
    identity = {call.number: call.number for call in other}

    def agree(call: Call, theirs: Call, numbers: dict[int, int]) -> bool:
        if call.name != theirs.name:
            return False
        if not with_arguments:
            return {numbers[number] for number in references(call)} == references(theirs)
        return renamed(call.arguments, numbers) == renamed(theirs.arguments, identity)

    def match(i: int, numbers: dict[int, int]) -> bool:
        return i == len(plan) or any(
            agree(plan[i], theirs, numbers)
            and match(i + 1, {**numbers, plan[i].number: theirs.number})
            for theirs in other
            if theirs.number not in numbers.values()
        )

    return len(plan) == len(other) and match(0, {})


def judge(written: str, wanted: str) -> dict[str, float]:
    """Success of what a model wrote: the whole graph, and without its arguments (TinyAgent's)."""
    expected = parse(wanted)
    try:
        calls = parse(written)
    except ValueError:
        return {"success": 0.0, "success without arguments": 0.0}
    return {
        "success": float(same_graph(calls, expected, with_arguments=True)),
        "success without arguments": float(same_graph(calls, expected, with_arguments=False)),
    }


class Example(NamedTuple):
    """What a model is told, as (role, content), and the plan that it is to write."""

    messages: tuple[tuple[str, str], ...]
    plan: str


def example(record: Any) -> Example:
    """The example in one of TinyAgent's records.

    Raises:
        ValueError: there is none in it.
    """
    try:
        output = next(part for part in record["output"] if part["type"] == "plan")
        messages = tuple((str(m["role"]), str(m["content"])) for m in output["raw_input"])
        plan = str(output["raw_output"])
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"no plan in it ({type(error).__name__} {error})") from error
    parse(plan)
    return Example(messages, plan)


def read(file: Path, *, skip: bool = False) -> Records[Example]:
    """Reads TinyAgent's file: one JSON object of records by their keys.

    Raises:
        FileNotFoundError: it is not there; says how to get it.
        ValueError: it is no such file, or a record has no plan and is not to be skipped.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file.name} in {file.parent}; to get it: hf download --repo-type dataset "
            f"squeeze-ai-lab/TinyAgent-dataset --local-dir {file.parent}"
        )
    content = file.read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is cut short or no JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{file} holds no records by their keys")
    examples, skipped = [], []
    for key, record in found.items():
        try:
            examples.append(example(record))
        except ValueError as error:
            skipped.append(f"{file}, record {key}: {error}")
            if not skip:
                raise ValueError(f"{skipped[0]} (--skip-malformed leaves such out)") from error
    if not examples:
        raise ValueError(f"{file} has no record: {skipped[0]}")
    return Records(examples, skipped, hashlib.sha256(content).hexdigest())
