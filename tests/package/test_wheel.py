"""The wheel alone, installed into a clean virtual environment, is enough to use the library.

Needs a package index, and the interpreters on PATH: `python3.11`, `python3.12`, `python3.13`.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import natgalore_jax as natgalore


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOWEST = [requirement.replace(">=", "==") for requirement in PROJECT["dependencies"]]


def run(*command, cwd, check=True):
    """Runs a program that sees nothing of this repository or of its environment."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA_", "JAX_"))
    }
    program = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or program.returncode == 0, program.stdout + program.stderr
    return program.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT), cwd=out)
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, out.iterdir()), cwd=out)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "natgalore_jax",
        f"natgalore_jax-{natgalore.__version__}.dist-info",
    }
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("natgalore_jax/**/*.py")}
    assert sources | {"natgalore_jax/py.typed"} <= {*names}
    assert any(name.endswith("LICENSE") for name in names)


@pytest.fixture(scope="module")
def installed(request, wheel, tmp_path_factory):
    """A clean environment with the wheel, as its interpreter."""
    version, requirements = request.param
    base = shutil.which(f"python{version}")
    if base is None or subprocess.run([base, "--version"], capture_output=True).returncode:
        pytest.skip(f"python{version} is not installed")
    folder = tmp_path_factory.mktemp(f"python{version}")
    run(base, "-m", "venv", "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", str(wheel), *requirements, cwd=folder)
    run(python, "-m", "pip", "check", cwd=folder)
    return python


ENVIRONMENTS = [("3.11", LOWEST), ("3.11", []), ("3.12", []), ("3.13", [])]


@pytest.mark.parametrize(
    "installed", ENVIRONMENTS, ids=lambda x: x[0] + " lowest" * bool(x[1]), indirect=True
)
def test_the_quickstart_and_the_command_line_run(installed, tmp_path):
    quickstart = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    (tmp_path / "quickstart.py").write_text(
        f"import natgalore_jax\nassert natgalore_jax.__version__ == {natgalore.__version__!r}\n"
        f"assert {str(installed.parents[1])!r} in natgalore_jax.__file__\n{quickstart}"
    )
    run(installed, "-W", "error", "quickstart.py", cwd=tmp_path)
    table = run(
        *(installed, "-m", "natgalore_jax", "plan", "--model", "60m", "--rank", "128"), cwd=tmp_path
    )
    assert "layers/mlp/up/kernel" in table


@pytest.mark.parametrize("installed", [("3.11", [])], ids=["3.11"], indirect=True)
@pytest.mark.parametrize(
    "checker",
    [
        ("mypy", "--strict", "--ignore-missing-imports", "--python-executable"),
        (
            *("pyrefly", "check", "--preset", "default", "--output-format", "min-text"),
            "--python-interpreter-path",
        ),
    ],
    ids=lambda words: words[0],
)
def test_type_checkers_of_users_find_exactly_the_wrong_lines(installed, checker, tmp_path):
    program = Path(shutil.copy(Path(__file__).with_name("consumer.py"), tmp_path))
    lines = program.read_text().splitlines()
    wrong = [i for i, line in enumerate(lines, 1) if "  # wrong: " in line]
    command = (sys.executable, "-m", *checker, str(installed), "consumer.py")
    report = run(*command, cwd=tmp_path, check=False)
    assert sorted({int(n) for n in re.findall(r"consumer\.py:(\d+)", report)}) == wrong, report
