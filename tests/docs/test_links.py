"""Relative links lead to files and headings that exist, so that they also work outside the site.

The build of the site checks its own links, references and table of contents.
"""

import re

import pytest

from benchmarks.common.doc_tables import ROOT, pages


def anchors(text):
    """GitHub's anchors of the headings of a page."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize(
    "page", [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "examples/tpu.md"], ids=lambda x: x.name
)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
