"""Reads TinyAgent's records of plans (arXiv 2409.00608)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from examples.finetuning import plans
from examples.finetuning.records import Records


def example(record: Any) -> plans.Example:
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
    plans.parse(plan)
    return plans.Example(messages, plan)


def read(file: Path, *, skip: bool = False) -> Records[plans.Example]:
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
