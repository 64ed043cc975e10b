"""What tests of the command line share: the script, how replies begin, and a terminal."""

import io
import sys
from pathlib import Path

import gpt_oss.generate

SCRIPT = Path(gpt_oss.generate.__file__)
ROOT = SCRIPT.parents[2]
INTERRUPTIBLE = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
]
"""Python that Ctrl-C reaches; started in the background, a process and its children ignore it."""
REPLY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"


class Terminal(io.StringIO):
    """A stream that says it is a terminal; `replace` puts it in the place of one of `sys`."""

    @classmethod
    def replace(cls, monkeypatch, name):
        terminal = cls()
        monkeypatch.setattr(sys, name, terminal)
        return terminal

    def isatty(self):
        return True


def only_line(text):
    """The text's one line."""
    assert text.count("\n") == 1 and text.endswith("\n")
    return text.strip()
