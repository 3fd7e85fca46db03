"""Relative links in README.md and docs/*.md lead to files and headings that exist."""

import re

import pytest

from benchmarks.common.doc_tables import pages


def anchors(text):
    """GitHub's anchors of the headings of a page."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_index_lists_every_page():
    index, *others = sorted((x for x in pages() if x.parent.name == "docs"), key=by_index)
    assert [page.name for page in others if f"({page.name})" not in index.read_text()] == []


def by_index(page):
    return page.name != "index.md"
