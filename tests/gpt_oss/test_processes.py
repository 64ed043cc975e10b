"""Several processes on one machine that run one model together."""

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
import tiny_chat
from command_line import INTERRUPTIBLE, SCRIPT

from gpt_oss import processes
from gpt_oss.errors import UserError
from gpt_oss.flags import parse
from gpt_oss.generate import main

SAMPLED = ["--max-tokens", "24", "--raw", "-p", "Sea"]
GREEDY = ["--temperature", "0", *SAMPLED]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = dataclasses.replace(tiny_chat.CONFIG, vocab_size=272, num_experts=8)
    return tiny_chat.write(tmp_path_factory.mktemp("processes"), config)


def start(checkpoint, index, port, *flags, devices=2, count=2):
    """The command as process `index`."""
    together = ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
    together += ["--process-id", str(index)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [*INTERRUPTIBLE, str(SCRIPT), "--model", str(checkpoint), *flags, *together],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ends(*several):
    """(exit code, stdout, stderr) of each process, which ends within five minutes."""
    try:
        texts = [process.communicate(timeout=300) for process in several]
    finally:
        _release(*several)
    return [(p.returncode, *text) for p, text in zip(several, texts, strict=True)]


@contextlib.contextmanager
def generating(checkpoint):
    """Two processes, of which the first has begun to write; both are ended behind it."""
    port = free_port()
    flags = ["--temperature", "0", "--raw", "--ignore-eos", "--max-tokens", "480", "-p", "Sea"]
    several = [start(checkpoint, i, port, *flags, devices=1) for i in range(2)]
    try:
        several[0].stdout.read(1)
        yield several
    finally:
        _release(*several)


def _release(*several):
    for process in several:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.slow
def test_two_processes_answer_as_one(checkpoint, capsys):
    """Four devices, two a process; only the first prints."""
    port = free_port()
    first, second = ends(*(start(checkpoint, i, port, *GREEDY) for i in range(2)))
    assert first[0] == 0, first[2]
    assert second[0] == 0, second[2]
    assert "x 4 (data=1,expert=2,model=2)" in first[2]
    assert second[1] == "" and "data=" not in second[2]
    assert main(["--model", str(checkpoint), *GREEDY]) == 0
    assert first[1] == capsys.readouterr().out and len(first[1]) > 10


@pytest.mark.slow
def test_a_seed_that_is_drawn_is_the_same_for_all(checkpoint):
    """Otherwise they would choose different tokens; a batch is not split over data either."""
    port = free_port()
    flags = ["--mesh", "data=2,model=2", "--ignore-eos", *SAMPLED]
    first, second = ends(*(start(checkpoint, i, port, *flags) for i in range(2)))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].strip() and "ended by length" in first[2]


@pytest.mark.slow
def test_a_lost_process_ends_the_others(checkpoint):
    with generating(checkpoint) as several:
        several[1].send_signal(signal.SIGKILL)
        lost = time.monotonic()
        _, errors = several[0].communicate(timeout=90)
        seconds = time.monotonic() - lost
    assert several[0].returncode not in (0, None)
    assert seconds < 60
    assert "process" in errors and ("lost" in errors or "died" in errors), errors


@pytest.mark.slow
def test_a_fault_of_one_is_told_by_it(checkpoint):
    """The second asks for another model; both end."""
    port, flags = free_port(), ["--max-tokens", "4", "--raw", "-p", "Sea"]
    several = [start(checkpoint, 0, port, *flags), start("/nowhere/at/all", 1, port, *flags)]
    first, second = ends(*several)
    assert second[0] == 1 and "/nowhere/at/all" in second[2] and "Traceback" not in second[2]
    assert first[0] != 0


@pytest.mark.slow
def test_other_prompts_are_told_apart(checkpoint):
    """Before the model is loaded, by each process."""
    port = free_port()
    common = ["--temperature", "0", "--raw", "-p"]
    first, second = ends(
        *(start(checkpoint, i, port, *common, text, devices=1) for i, text in enumerate(("A", "B")))
    )
    assert first[0] == second[0] == 1
    assert "process 0 has --prompt 'A': run the same command" in first[2]
    assert "process 1 has --prompt 'B': run the same command" in second[2]
    assert first[1] == second[1] == ""


@pytest.mark.slow
def test_an_interrupted_process_ends_the_others(checkpoint):
    """Ctrl-C in one of them only; it does not wait for the other."""
    with generating(checkpoint) as several:
        several[0].send_signal(signal.SIGINT)
        pressed = time.monotonic()
        several[0].communicate(timeout=90)
        _, errors = several[1].communicate(timeout=90)
        seconds = time.monotonic() - pressed
    assert several[0].returncode == 130
    assert several[1].returncode not in (0, None), errors
    assert seconds < 60


class TestEnds:
    """What a process that failed ends with; it must not wait for others at exit."""

    @pytest.fixture
    def fail(self, monkeypatch):
        """Fails inside `joined`; gives the exit code that is left for the end."""
        codes = []
        monkeypatch.setattr(processes, "_join", lambda arguments: None)
        monkeypatch.setattr(processes, "_keep_stdout", lambda: None)
        monkeypatch.setattr(processes.atexit, "register", lambda leave, code: codes.append(code))

        def run(error):
            with processes.joined(argparse.Namespace(coordinator="a:1")):
                raise error

        run.codes = codes
        return run

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (KeyboardInterrupt(), 130),
            (BrokenPipeError(), 0),
            (UserError("no"), 1),
            (ZeroDivisionError(), 1),
            (SystemExit(3), 3),
            (SystemExit(None), 0),
            (SystemExit("text"), 1),
            (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes of our own"), 1),
            (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1),
        ],
        ids=repr,
    )
    def test_error_and_code_are_kept(self, fail, error, code):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert caught.value is error and fail.codes == [code]

    @pytest.mark.parametrize(
        "text",
        [
            "UNAVAILABLE: failed to connect to all addresses",
            "DEADLINE_EXCEEDED: Barrier timed out",
            "FAILED_PRECONDITION: Gloo AllReduce failed: Connection closed by peer",
            "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited",
        ],
    )
    def test_a_lost_process_is_told(self, fail, text):
        with pytest.raises(UserError, match="this or another process was lost: " + text[:8]):
            fail(jax.errors.JaxRuntimeError(text))
        assert fail.codes == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "here"], "expected HOST:PORT or auto"),
        (["--coordinator", "a:1", "-p", "x"], "needs --num-processes and --process-id"),
        (["--coordinator", "auto"], "needs --prompt"),
        (["--coordinator", "auto", "-p", "-"], "needs --prompt"),
        (["--coordinator", "auto", "-p", "x", "--process-id", "0"], "need --coordinator HOST:PORT"),
        (["--num-processes", "2", "-p", "x"], "need --coordinator HOST:PORT"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2", "-p", "x"],
            "must be below",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_do_not_belong_together(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err
