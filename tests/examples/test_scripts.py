"""The scripts: how they are started, their --help, the commands in their docstrings."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import examples


ROOT = Path(examples.__file__).parents[1]
SCRIPTS = [
    "pretraining.pretrain",
    "pretraining.sharded",
    "pretraining.seven_billion",
    "pretraining.generate",
    "finetuning.fetch_text",
    "finetuning.fetch_calls",
    "finetuning.finetune_text",
    "finetuning.finetune_glue",
    "finetuning.finetune_function_calling",
    "finetuning.tiny_assets",
]
OF_TRAINERS = {"examples.trainers.easydel": "eformer", "examples.trainers.levanter": "levanter"}
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "examples").rglob("*.py")
    if file.name != "__init__.py"
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_description_and_defaults(name, monkeypatch, capsys):
    script = importlib.import_module(f"examples.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert script.__doc__.splitlines()[0] in printed
    assert f"python examples/{name.replace('.', '/')}.py" in printed
    assert "(default: None)" not in printed
    assert "{None}" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("as_module", [False, True], ids=["file", "module"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_starts_from_any_folder(name, as_module, tmp_path):
    """Also as a file: an editable install has the root of the checkout on its path."""
    file = ROOT / "examples" / f"{name.replace('.', '/')}.py"
    start = ["-m", f"examples.{name}"] if as_module else [str(file)]
    subprocess.run(
        [sys.executable, *start, "--help"], cwd=tmp_path, check=True, capture_output=True
    )


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_name_existing_files_and_doctests_pass(name):
    if name in OF_TRAINERS:
        pytest.importorskip(OF_TRAINERS[name], reason="the trainer is not installed")
    module = importlib.import_module(name)
    for path in re.findall(r"\bexamples/[\w/]+\.\w+", module.__doc__):
        assert (ROOT / path).is_file(), path
    assert doctest.testmod(module).failed == 0
