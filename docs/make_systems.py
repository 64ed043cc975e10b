"""Writes docs/systems.md from what tests recorded: `python docs/make_systems.py RESULTS.xml ...`.

The files are pytest's, written by `--junitxml`. Tests record properties: `row`, a key of
`systems_data.ROWS`, together with `error`, the largest difference measured, and `with`, what it was
measured against; `status`, for the systems whose own software does not run here; `trap`, the number
of one; `bad_input`, a name that `systems_data.BAD_INPUTS` knows. Of each thing, the tests are named
that recorded it and passed; a thing that none recorded is `missing`, and the exit status is 1.
"""

import collections
import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from systems_data import BAD_INPUTS, ROWS, TRAPS, Row

ROOT = Path(__file__).parents[1]
MISSING = "**missing**"

HEAD = """\
# Layers of other systems: what was proved, and with what

Written by a script from what tests recorded:

    pytest -n auto --junitxml=systems.xml
    python docs/make_systems.py systems.xml

- *proved*: a test compares this library, or what it writes, with the software that is named: run in
  the test, or by a committed script that stored its numbers. What no other software has is compared
  with NumPy. An error is the largest difference of an output, in most tests relative to the largest
  output.
- *reference only*: no software of that system runs without its hardware; what it documents was
  stated again, or other software computed the same formula. Nothing here ran in TensorRT.
- *GPU*: needs an NVIDIA GPU, and is not part of a CPU's tests. The error is that of a benchmark.
- **missing**: no test has shown it.

A system in parentheses has a thing in part.
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A test that passed: its name without parameters, and what it recorded."""

    name: str
    properties: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """The values recorded under a name."""
        return [value for key, value in self.properties if key == name]

    def one(self, name: str) -> str | None:
        """The value recorded under a name, if there is any; a test records one error, for all."""
        return next(iter(self.all(name)), None)


def read_cases(paths: Iterable[str]) -> list[Case]:
    """The tests that passed.

    Raises:
        SystemExit: a test failed, or the file is not of a whole run in the family `xunit1`.
    """
    cases = []
    for path in paths:
        for test in ElementTree.parse(path).iter("testcase"):
            if not test.get("file"):
                raise SystemExit(f"{path} is not of a whole run with junit_family = xunit1")
            name = f"{test.get('file')}::{'::'.join(_scopes(test))}"
            if any(test.find(outcome) is not None for outcome in ("failure", "error")):
                raise SystemExit(f"{path}: {name} failed; docs/systems.md is as it was")
            if test.find("skipped") is None:
                found = ((p.get("name", ""), p.get("value", "")) for p in test.iter("property"))
                cases.append(Case(name, tuple(found)))
    return cases


def _scopes(test: ElementTree.Element) -> list[str]:
    module = Path(test.get("file", "")).with_suffix("").parts
    classes = test.get("classname", "").split(".")[len(module) :]
    return [*classes, test.get("name", "").split("[")[0]]


def names(cases: Iterable[Case]) -> str:
    """A cell with the names of tests, or `missing`."""
    found = sorted({case.name for case in cases})
    return "<br>".join(f"`{name}`" for name in found) or MISSING


def rows_table(cases: Sequence[Case]) -> list[str]:
    """What each row is, who has it, whether it was shown, and with what."""
    lines = ["| row | what | systems | status | checked with: largest error |"]
    lines.append("|---|---|---|---|---|")
    for row in ROWS:
        found = [case for case in cases if row.key in case.all("row")]
        cells = row.key, row.what, row.systems, status_of(row, found), errors_of(row, found)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def status_of(row: Row, cases: Iterable[Case]) -> str:
    """`proved`, what the row's data says, or `missing`."""
    if row.status:
        return row.status
    shown = [case for case in cases if case.one("with")]
    if not shown:
        return MISSING
    apart = any("TensorRT reference only" in (case.one("status") or "") for case in shown)
    return "proved; in TensorRT reference only" if apart else "proved"


def errors_of(row: Row, cases: Iterable[Case]) -> str:
    """For each thing a row was compared with, the largest error that its tests measured."""
    errors: dict[str, float | None] = {}
    if row.benchmark:
        result = json.loads((ROOT / row.benchmark).read_text())
        errors[f"float64, on {result['device']}, bfloat16"] = max(
            case["error"] for case in result["rows"]
        )
    for case in cases:
        real = (case.one("with") or "").replace("+cpu", "")
        error = case.one("error")
        if real:
            known = errors.get(real)
            errors[real] = known if error is None else max(float(error), known or 0.0)
    texts = (
        real if error is None else f"{real}: {'equal' if error == 0 else f'{error:.1e}'}"
        for real, error in sorted(errors.items())
    )
    return "<br>".join(texts)


def tests_table(cases: Sequence[Case]) -> list[str]:
    """The tests of each row."""
    lines = ["| row | tests |", "|---|---|"]
    for row in ROWS:
        named = [Case(name, ()) for name in row.tests]
        found = [case for case in cases if row.key in case.all("row")]
        lines.append(f"| {row.key} | {names([*named, *found])} |")
    return lines


def traps_table(cases: Sequence[Case]) -> list[str]:
    """The tests of each trap."""
    lines = ["| trap | what | tests |", "|---|---|---|"]
    for key, what in TRAPS.items():
        found = [case for case in cases if key in case.all("trap")]
        lines.append(f"| {key} | {what} | {names(found)} |")
    return lines


def bad_inputs_table(cases: Sequence[Case]) -> list[str]:
    """What becomes of each bad input, and the tests of that."""
    lines = ["| bad input | what happens | tests |", "|---|---|---|"]
    for line in BAD_INPUTS:
        found = [c for c in cases if any(v.startswith(line.recorded) for v in c.all("bad_input"))]
        lines.append(f"| {line.what} | {line.answer} | {names(found)} |")
    return lines


def unknown(cases: Iterable[Case]) -> list[str]:
    """What tests recorded, and the data has no place for."""
    places = {"row": tuple(row.key for row in ROWS), "trap": tuple(TRAPS)}
    prefixes = tuple(prefix for line in BAD_INPUTS for prefix in line.recorded)
    found = collections.Counter()
    for case in cases:
        for name, value in case.properties:
            if name in places and value not in places[name]:
                found[f"{case.name}: {name} {value!r}"] += 1
            if name == "bad_input" and not value.startswith(prefixes):
                found[f"{case.name}: {name} {value!r}"] += 1
    return sorted(found)


def document(cases: Sequence[Case]) -> str:
    """The text of docs/systems.md."""
    parts = (
        HEAD.splitlines(),
        ["## Rows", "", *rows_table(cases)],
        ["## Traps", "", *traps_table(cases)],
        ["## Bad input", "", *bad_inputs_table(cases)],
        ["## Tests of each row", "", *tests_table(cases)],
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main(paths: Sequence[str]) -> None:
    """Writes the document.

    Raises:
        SystemExit: without files, where a test failed, where tests recorded what the data does not
            know, or where something is missing.
    """
    if not paths:
        raise SystemExit(__doc__)
    cases = read_cases(paths)
    if strange := unknown(cases):
        raise SystemExit("not in systems_data.py:\n" + "\n".join(strange))
    text = document(cases)
    (ROOT / "docs" / "systems.md").write_text(text)
    if missing := re.findall(r"^\|.*\*\*missing\*\*.*$", text, re.MULTILINE):
        raise SystemExit("no test shows:\n" + "\n".join(missing))


if __name__ == "__main__":
    main(sys.argv[1:])
