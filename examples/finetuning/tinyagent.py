"""TinyAgent's plans of function calls (arXiv 2409.00608): parser, comparison, records.

    1. get_email_address("Sid")
    2. compose_new_email(["$1"], "Lunch", "At noon?", [])
    3. join()<END_OF_PLAN>

A call may use the result of an earlier call, here $1. The calls are the nodes and the uses are the
edges of an acyclic graph. Two plans are equal if their graphs are isomorphic, whatever the order
and the numbers of the calls. TinyAgent's own metric compares names and edges; `same_graph` can also
compare the arguments.
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
    """One call: its number in the plan, the name of the function, and its arguments."""

    number: int
    name: str
    arguments: Any


def arguments(text: str) -> Any:
    """The arguments as a list of Python literals; the text itself if it cannot be parsed."""
    try:
        return ast.literal_eval(f"[{text}]")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def references(call: Call) -> set[int]:
    """Numbers of the calls whose results the call uses."""
    return {int(number) for number in REFERENCE.findall(repr(call.arguments))}


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
        call = Call(int(match[1]), match[2], arguments(match[3]))
        if call.name == "join":
            return calls
        if missing := references(call) - {before.number for before in calls}:
            raise ValueError(f"{line!r} uses ${min(missing)}, which is not an earlier call")
        calls.append(call)
    raise ValueError("the plan does not end with join()")


def renamed(value: Any, numbers: dict[int, int]) -> Any:
    """Arguments with the numbers of calls replaced, at any depth."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda m: f"${numbers[int(m[1])]}", value)
    if isinstance(value, (list, tuple)):
        return [renamed(part, numbers) for part in value]
    if isinstance(value, dict):
        return {key: renamed(part, numbers) for key, part in value.items()}
    return value


def same_graph(plan: Sequence[Call], other: Sequence[Call], *, with_arguments: bool) -> bool:
    """Whether the graphs of two plans are isomorphic.

    Backtracking search: each call of the plan, in order, is matched to an unmatched call of the
    other plan with the same name and, under the numbering so far, the same edges or arguments.
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
    """Success of a generated plan, with and without arguments (TinyAgent's metric): 0 or 1."""
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
    """The prompt as (role, content) messages, and the plan to be generated."""

    messages: tuple[tuple[str, str], ...]
    plan: str


def example(record: Any) -> Example:
    """The example in one of TinyAgent's records.

    Raises:
        ValueError: the record has no plan.
    """
    try:
        output = next(part for part in record["output"] if part["type"] == "plan")
        messages = tuple((str(m["role"]), str(m["content"])) for m in output["raw_input"])
        plan = str(output["raw_output"])
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"no plan in the record ({type(error).__name__} {error})") from error
    parse(plan)
    return Example(messages, plan)


def read(file: Path, *, skip: bool = False) -> Records[Example]:
    """Reads a file of TinyAgent: a JSON object of records by key.

    Raises:
        FileNotFoundError: the file is missing; the message has the command that downloads it.
        ValueError: the file is malformed, or a record has no plan and `skip` is false.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file.name} in {file.parent}; to download it: hf download --repo-type dataset "
            f"squeeze-ai-lab/TinyAgent-dataset --local-dir {file.parent}"
        )
    content = file.read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is truncated or not JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{file} is not a JSON object of records by key")
    examples, skipped = [], []
    for key, record in found.items():
        try:
            examples.append(example(record))
        except ValueError as error:
            skipped.append(f"{file}, record {key}: {error}")
            if not skip:
                raise ValueError(f"{skipped[0]} (--skip-malformed skips such records)") from error
    if not examples:
        raise ValueError(f"{file} has no valid record: {skipped[0]}")
    return Records(examples, skipped, hashlib.sha256(content).hexdigest())
