"""The README's commands are two, and its examples run."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_block_is_two_commands():
    language, text = BLOCKS[0]
    lines = text.strip().splitlines()
    assert language == "bash" and len(lines) == 2
    assert "generate.py --model gpt-oss" in lines[0] and "pytest" in lines[1]


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_an_example_runs(code):
    exec(compile(code, str(README), "exec"), {})
