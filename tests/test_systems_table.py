"""docs/systems.md names everything it must, and only tests that there are."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "systems.md").read_text()
CELLS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ")
]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


data = script("systems_data")
make_systems = script("make_systems")


def cited_tests(cells):
    return re.findall(r"`(tests/[\w/]+\.py(?:::\w+)*)`", cells[-1])


def line_of(first, width):
    (found,) = (cells for cells in CELLS if cells[0] == first and len(cells) == width)
    return found


@pytest.mark.parametrize("row", data.ROWS, ids=lambda row: row.key)
def test_every_row_has_its_status_and_tests(row):
    _, what, systems, status, errors = line_of(row.key, 5)
    assert (what, systems) == (row.what, row.systems)
    assert status == row.status if row.status else status.startswith("proved")
    assert row.status == "reference only" or errors
    tests = cited_tests(line_of(row.key, 2))
    assert tests and set(row.tests) <= set(tests)


@pytest.mark.parametrize("trap", data.TRAPS)
def test_every_trap_has_tests(trap):
    cells = line_of(trap, 3)
    assert cells[1] == data.TRAPS[trap] and cited_tests(cells)


@pytest.mark.parametrize("line", data.BAD_INPUTS, ids=lambda line: line.what)
def test_every_bad_input_has_tests(line):
    cells = line_of(line.what, 3)
    assert cells[1] == line.answer and cited_tests(cells)


def test_the_data_is_complete():
    letters = {"R": 7, "E": 7, "Q": 4, "A": 6, "L": 1, "X": 5, "N": 1}
    assert {row.key for row in data.ROWS} == {
        f"{letter}{n + 1}" for letter, count in letters.items() for n in range(count)
    }
    assert list(data.TRAPS) == [str(n) for n in range(1, 10)]
    assert {row.key for row in data.ROWS if row.status} == {"A6", "X5"}


def defined_tests(node, prefix=""):
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from defined_tests(child, f"{prefix}{child.name}::")


def test_every_test_that_is_named_exists():
    named = {test for cells in CELLS for test in cited_tests(cells)}
    assert len(named) > 100
    for file in {test.partition("::")[0] for test in named}:
        there = {f"{file}::{name}" for name in defined_tests(ast.parse((ROOT / file).read_text()))}
        assert {test for test in named if test.startswith(f"{file}::")} <= there


RESULTS = """<testsuites><testsuite>
<testcase file="tests/test_a.py" classname="tests.test_a" name="test_one[2-x]">
<properties><property name="row" value="R1"/><property name="error" value="2e-7"/>
<property name="with" value="onnxruntime 9"/>
<property name="trap" value="1"/></properties></testcase>
<testcase file="tests/test_a.py" classname="tests.test_a.TestB" name="test_two">
<properties><property name="row" value="R1"/><property name="error" value="3e-7"/>
<property name="with" value="onnxruntime 9"/></properties>{outcome}</testcase>
</testsuite></testsuites>"""


def cases_of(tmp_path, outcome=""):
    path = tmp_path / "results.xml"
    path.write_text(RESULTS.replace("{outcome}", outcome))
    return make_systems.read_cases([str(path)])


def test_the_script_takes_the_largest_error_and_names_tests_once(tmp_path):
    cases = cases_of(tmp_path)
    text = make_systems.document([*cases, *cases])
    assert "| proved | onnxruntime 9: 3.0e-07 |" in text
    assert "| R1 | `tests/test_a.py::TestB::test_two`<br>`tests/test_a.py::test_one` |" in text
    assert text.count("| **missing** |") > 40 and not make_systems.unknown(cases)
    skipped = make_systems.document(cases_of(tmp_path, "<skipped/>"))
    assert "| proved | onnxruntime 9: 2.0e-07 |" in skipped and "TestB" not in skipped


def test_the_script_refuses_failures_and_names_that_mean_nothing(tmp_path):
    with pytest.raises(SystemExit, match="TestB::test_two failed"):
        cases_of(tmp_path, "<failure/>")
    wrong = make_systems.Case("tests/test_a.py::test_one", (("row", "R8"), ("bad_input", "?")))
    assert len(make_systems.unknown([wrong])) == 2
    with pytest.raises(SystemExit, match="RESULTS.xml"):
        make_systems.main([])
