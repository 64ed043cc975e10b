"""The command in a process of its own: as a script, interrupted, and with its output cut off."""

import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from command_line import INTERRUPTIBLE, ROOT, SCRIPT


def start(checkpoint, folder, script, *flags, **options):
    """Starts the command in a process of its own, which a Ctrl-C reaches."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [*INTERRUPTIBLE, script, "--model", str(checkpoint), "--raw", *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="strict",
        **options,
    )


def test_it_runs_as_a_script_from_the_root(checkpoint):
    flags = ["--raw", "-p", "Hi", "--max-tokens", "4", "--json", "--offline", "--no-progress"]
    script = ["examples/gpt_oss/generate.py", "--model", str(checkpoint)]
    done = subprocess.run(
        [sys.executable, *script, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    *tokens, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(tokens) == last["statistics"]["generated_tokens"] <= 4
    assert len(done.stderr.splitlines()) == 1


def test_from_its_own_folder_ctrl_c_ends_it_cleanly(checkpoint):
    flags = ["--ignore-eos", "-p", "Hi", "--context", "2048", "--seed", "1"]
    with start(checkpoint, SCRIPT.parent, SCRIPT.name, *flags) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate()
    assert process.returncode == 130
    assert (first + rest).endswith("\n")
    assert err.splitlines()[-1].endswith("ended by interrupted")
    assert "Traceback" not in err


class Typist:
    """Runs the command on a terminal of its own, as its session's leader."""

    def __init__(self, *flags):
        pty = pytest.importorskip("pty")
        self._screen, terminal = pty.openpty()
        setup = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", setup, str(SCRIPT), *flags],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)

    def type(self, text):
        os.write(self._screen, text.encode())

    def press_ctrl_c(self):
        # Python's input() misses one between what it has shown and its wait for a key; and a line
        # that was typed must have been taken.
        time.sleep(0.5)
        self.type("\x03")

    def wait_for(self, text):
        """Reads the screen up to `text`."""
        shown = b""
        while text.encode() not in shown:
            ready, _, _ = select.select([self._screen], [], [], 30)
            assert ready, f"expected {text!r}, got {shown!r}"
            shown += os.read(self._screen, 1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


def test_ctrl_c_on_a_terminal_ends_the_answer_then_the_line_then_the_chat(checkpoint):
    pytest.importorskip("readline")
    with Typist("--model", str(checkpoint), "--seed", "1", "--developer", "x" * 1000) as typist:
        typist.wait_for("> ")
        typist.type("Hi\n")
        typist.wait_for("Hi\r\n")
        typist.press_ctrl_c()
        typist.wait_for("interrupted")
        typist.wait_for("> ")
        typist.type("half a line")
        typist.wait_for("half a line")
        typist.press_ctrl_c()
        typist.wait_for("> ")
        typist.press_ctrl_c()
        assert typist.process.wait(timeout=60) == 130


def test_a_closed_pipe_ends_it_quietly(checkpoint):
    flags = ["--ignore-eos", "-p", "Hi", "--max-tokens", "400"]
    with start(checkpoint, ROOT, str(SCRIPT), *flags) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(checkpoint):
    flags = ["--raw", "-p", "Hi", "--ignore-eos", "--max-tokens", "40", "--seed", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--model", str(checkpoint), *flags],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert last == "generate.py: input or output: No space left on device"
