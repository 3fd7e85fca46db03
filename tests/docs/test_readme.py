"""The Python snippets of the README run and print what the README shows."""

import ast
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgalore_jax as natgalore


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


def test_snippets_run_in_order(capsys):
    scope: dict = {}
    for snippet in SNIPPETS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["loss"] > 0
    # Condition numbers are left out: their last digits depend on the machine.
    printed = re.sub(r"\de\+\d\d", "*", capsys.readouterr().out)
    (block,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert printed == re.sub(r"\de\+\d\d", "*", block)


def test_the_snippet_is_short_and_shows_the_line_it_replaces():
    lines = [line for line in SNIPPETS[0].splitlines() if line.strip()]
    assert len(lines) <= 16
    assert any(line.startswith("# tx = optax.adamw(schedule") for line in lines)


def test_three_spellings_are_one_thing():
    (snippet,) = (x for x in SNIPPETS if x.count("tx = ") == 3 and "project_back" in x)
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


def test_snippet_of_choosing_runs():
    page = (ROOT / "docs/choosing.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    scope: dict = {}
    exec(snippet, scope)
    basis = scope["tx"].init({"kernel": jnp.zeros((512, 1024))})[0].basis["kernel"].value
    assert basis.shape == (512, scope["width"] // 4)


def test_inline_code_names_what_exists():
    for name in re.findall(r"natgalore\.(\w+)", README):
        assert hasattr(natgalore, name), name
