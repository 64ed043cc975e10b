"""The examples of the documentation run, and its tables are what their script prints."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("little_compiling")

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    for path in sorted((ROOT / "docs").glob("*.md"))
}


@pytest.mark.parametrize("page", [page for page, examples in PAGES.items() if examples])
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """One after the other, in a folder of their own; later ones use the names of those before."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in PAGES[page]:
        exec(compile(code, page, "exec"), names)


def test_tables_of_larger_meshes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert len(rows) == 16 and all(row in text for row in rows)
