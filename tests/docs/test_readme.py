"""The Python snippets of README and pages run, and print what the pages show."""

import ast
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgalore_jax as natgalore
from examples.common import llama
from natgalore_jax.reporting.memory_report import nbytes


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = (
    "README.md",
    *(f"docs/{x}.md" for x in ("index", "get-started", "frameworks", "debugging")),
    pytest.param("docs/resume.md", marks=pytest.mark.slow),
)


def read_page(page):
    return (ROOT / page).read_text()


def snippets(page):
    return re.findall(r"```python\n(.*?)```", read_page(page), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run_in_order(page, capsys):
    scope: dict = {}
    assert snippets(page)
    for snippet in snippets(page):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if page == "docs/resume.md":  # Orbax, about its own use of asyncio and of folders
                warnings.simplefilter("ignore")
            exec(compile(snippet, page, "exec"), scope)
    shown = re.findall(r"```text\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert not shown or capsys.readouterr().out == "".join(shown)


def test_the_readme_fits_one_page():
    assert len(README.split()) <= 900
    lines = [line for line in snippets("README.md")[0].splitlines() if line.strip()]
    assert len(lines) <= 12


def test_three_spellings_are_one_thing():
    (snippet,) = (x for x in snippets("docs/get-started.md") if x.count("tx = ") == 3)
    params = {"kernel": jax.random.normal(jax.random.key(0), (130, 140))}

    @jax.jit(static_argnums=0)
    def trained(update, state):
        def step(carry, key):
            params, state = carry
            updates, state = update({"kernel": jax.random.normal(key, (130, 140))}, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), 52)  # new bases at 0 and 50
        return jax.lax.scan(step, (params, state), keys)[0][0]["kernel"]

    scope = {"natgalore": natgalore, "optax": optax}
    results = []
    for line in ast.parse(snippet).body:
        exec(ast.unparse(line), scope)
        results.append(trained(scope["tx"].update, scope["tx"].init(params)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])  # it is one program


def test_snippets_of_choosing_have_the_state_of_its_tables():
    start, long_runs = snippets("docs/choosing.md")
    scope: dict = {}
    exec(start, scope)
    basis = scope["tx"].init({"kernel": jnp.zeros((512, 1024))})[0].basis["kernel"].value
    assert basis.shape == (512, scope["width"] // 4)
    # The model of the runs, four times as wide: by default a matrix of 192 x 192 is not projected.
    scope["width"] = 768
    exec(long_runs, scope)
    config = llama.LlamaConfig(768, 2048, heads=12, layers=1)
    model = lambda: nnx.state(llama.Llama(config, nnx.Rngs(0)), nnx.Param)
    (layer,) = nnx.to_pure_dict(nnx.eval_shape(model))["layers"].values()
    matrices = {name: layer[name] for name in ("attention", "mlp")}
    weights = sum(x.size for x in jax.tree.leaves(matrices))
    rows = re.findall(r"\| ([\d.]+) \| `(tiny|muon|momentum)`", read_page("docs/choosing.md"))
    for shown, name in rows:
        state = jax.tree.leaves(jax.eval_shape(scope[name].init, matrices))
        found = sum(map(nbytes, state)) / weights
        # At rank 16 a scale of a basis is for 16 numbers, here for 64.
        assert found == pytest.approx(float(shown), rel=0.06), name
    assert len(rows) == 3


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda x: x.name)
def test_inline_code_names_what_exists(page):
    names = re.findall(r"natgalore\.(\w+)[^/]", README + page.read_text())
    assert [name for name in names if not hasattr(natgalore, name)] == []


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)$", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(natgalore.__all__)
    assert all(getattr(natgalore, name).__doc__ for name in natgalore.__all__)


def test_the_citation_has_the_version_of_the_package():
    assert f"\nversion: {natgalore.__version__}\n" in (ROOT / "CITATION.cff").read_text()
