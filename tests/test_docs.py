"""The examples of the documentation run, and its tables are what their script prints."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    (path.name, code)
    for path in sorted((ROOT / "docs").glob("*.md"))
    for code in re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_runs(name, code):
    exec(compile(code, name, "exec"), {})


def test_tables_of_larger_meshes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert len(rows) == 16 and all(row in text for row in rows)
