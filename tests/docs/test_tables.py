"""Tables in README.md and docs/*.md are those that benchmarks/common/doc_tables.py generates."""

import json
import sys

import pytest

from benchmarks.common import doc_tables


@pytest.mark.parametrize("page", doc_tables.pages(), ids=lambda page: page.name)
def test_tables_are_up_to_date(page):
    text = page.read_text()
    assert text == doc_tables.regenerated(text), "run python -m benchmarks.common.doc_tables"


def test_every_table_is_in_a_page():
    pages = "".join(page.read_text() for page in doc_tables.pages())
    marked = [name for _, name, _ in doc_tables.MARKED.findall(pages)]
    assert sorted(marked) == sorted(doc_tables.TABLES)


def test_stale_tables_are_listed_and_rewritten(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- table: pretrain -->\n| old |\n<!-- end -->\n\nText.\n")
    monkeypatch.setattr(doc_tables, "ROOT", tmp_path)
    monkeypatch.setattr(doc_tables, "pages", lambda: [page])
    run = lambda *arguments: monkeypatch.setattr(sys, "argv", ["", *arguments]) or doc_tables.main()
    with pytest.raises(SystemExit, match="True"):
        run("--check")
    assert capsys.readouterr().out == "page.md\n"
    assert "| old |" in page.read_text()
    with pytest.raises(SystemExit, match="False"):
        run()
    table = doc_tables.TABLES["pretrain"]()
    expected = f"# Page\n\n<!-- table: pretrain -->\n\n{table}\n\n<!-- end -->\n\nText.\n"
    assert page.read_text() == expected


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        doc_tables.regenerated("<!-- table: nothing -->\n<!-- end -->")


@pytest.mark.parametrize("path", sorted(doc_tables.RESULTS.glob("*.json*")), ids=lambda x: x.name)
def test_results_hold_their_environment_and_are_used(path):
    for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
        assert {"python", "jax"} <= json.loads(line)["environment"].keys()
    pages = "".join(page.read_text() for page in doc_tables.pages())
    assert path.name in pages or path.name.startswith(("cores-", "train-"))
