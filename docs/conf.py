"""The documentation site: Sphinx with MyST pages. `make docs` builds it into docs/_build/html."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx


DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # of the notebook's kernel

import natgalore_jax as natgalore  # noqa: E402
from benchmarks.memory import calculator  # noqa: E402


DOCUMENTED = [f"natgalore_jax.{name}" for name in natgalore.__all__]
DOCUMENTED += re.findall(r"autoclass:: (natgalore_jax\.\S+)", (DOCS / "api.md").read_text())

project = "natgalore_jax"
copyright = "The natgalore_jax authors, Apache-2.0"
version = release = natgalore.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True  # a reference to nothing is a warning, which `make docs` turns into an error
nitpick_ignore_regex = [("py:.*", r"(collections|jax|jaxlib|numpy|optax|typing)\b.*")]
default_role = "code"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_typehints = "none"  # docstrings describe them; the annotations are for type checkers
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

LOGO = "_static/logo.svg"
html_theme = "pydata_sphinx_theme"
html_title = "natgalore_jax"
html_favicon = LOGO
html_sidebars = {"api": []}
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_theme_options = {
    "logo": {
        "text": "natgalore_jax",
        "image_light": "_static/logo.svg",
        "image_dark": "_static/logo.svg",
    },
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
}


def inline_math(self: Any, node: nodes.math) -> None:
    """Writes MathML, which browsers draw without a script."""
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def block_math(self: Any, node: nodes.math_block) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def reference(found: re.Match[str]) -> str:
    """A reference to a name of the API page; code if the page does not have the name."""
    name = found[2].split(".")[-1]
    place = next((x for x in DOCUMENTED if x.split(".")[-1] == name), None)
    return f":{found[1]}:`{name} <{place}>`" if place else f"`{name}`"


def as_rst(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes a docstring reStructuredText, before napoleon reads its sections.

    Links `docs/PAGE.md` to the page, finds names in any module of the package, and escapes the
    norms |G| and the shapes (*batch, r) outside of code and examples.
    """
    example = False
    for i, line in enumerate(lines):
        if line and not line.startswith(" "):
            example = line == "Example:"
        if example or re.match(r"\s+\*+\w+: ", line):
            continue
        line = re.sub(r"(`[^`]*`)|([|*])", lambda x: x[1] or f"\\{x[2]}", line)
        line = re.sub(r":(func|class|data):`([\w.]+)`", reference, line)
        line = re.sub(r"(?<=\w`)(?=[^\W\d_]|[⁰-⁻ᵀ])", r"\\ ", line)  # code ends before a letter
        lines[i] = re.sub(r"`docs/([\w-]+)\.md`", r":doc:`/\1`", line)


def write_numbers(app: Sphinx) -> None:
    """Writes the numbers of the memory calculator beside its script."""
    path = DOCS / "_static/memory-data.js"
    if not path.exists() or path.stat().st_mtime < newest_source():
        path.write_text(calculator.script())


def newest_source() -> float:
    """The time of the last change in the package and the calculator."""
    sources = [Path(calculator.__file__), *(ROOT / "natgalore_jax").rglob("*.py")]
    return max(source.stat().st_mtime for source in sources)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("builder-inited", write_numbers)
