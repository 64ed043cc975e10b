"""What goes wrong is one line on stderr and an exit code; faults of the program are not hidden."""

import ast
import io
import json
import re
import runpy
import sys

import pytest
import tiny_chat
from command_line import REPLY, SCRIPT, Terminal, only_line

from gpt_oss import speaker
from gpt_oss.generate import main
from gpt_oss.reader import Piece


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", " \n"], "the prompt is empty"),
        (["--raw", "-p", ""], "the prompt is empty"),
        (["-p", "x" * 3000], "the prompt has .* the context holds 2048"),
        (["-p", "a\udcff"], "cannot be encoded: .*surrogate"),
        (["-p", "Hi", "--compile-cache", "/dev/null/x"], "--compile-cache /dev/null/x: Not a dir"),
        (["-p", "Hi", "--revision", "main"], "has no revisions"),
        (["-p", "Hi", "--model", "nothing"], "no model 'nothing': there is no folder /"),
        (["-p", "Hi", "--model", "gpt-oss-20b", "--offline"], "openai/gpt-oss-20b.*--offline"),
    ],
)
def test_what_cannot_be_done_is_one_line(command, capsys, monkeypatch, tmp_path, flags, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert command(*flags) == 1
    out, err = capsys.readouterr()
    *_, last = err.splitlines()
    assert out == ""
    assert last.startswith("generate.py: ")
    assert re.search(expected, last)


def damaged(folder, source_folder, name, change):
    """A copy of a checkpoint with one file changed, or without it."""
    for path in source_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).unlink() if change is None else (folder / name).write_bytes(change)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("config.json", None, "config.json does not exist"),
        ("config.json", b"{}", "model_type"),
        ("tokenizer.json", None, "expected a readable tokenizer.json"),
        ("tokenizer.json", b"{}", "expected a tokenizer.json"),
        ("model.safetensors", None, "neither model.safetensors nor"),
        ("model.safetensors", b"", "model.safetensors"),
        (
            "config.json",
            json.dumps({**tiny_chat.CONFIG.to_dict(), "num_local_experts": 4}).encode(),
            r"does not hold the model.*expected .* got .*\(and \d+ more\)",
        ),
        (
            "config.json",
            json.dumps({**tiny_chat.CONFIG.to_dict(), "vocab_size": 200}).encode(),
            "belong to different models",
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path, capsys, name, change, expected):
    damaged(tmp_path, checkpoint, name, change)
    assert main(["--model", str(tmp_path), "-p", "Hi"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(expected, only_line(err))


def test_a_context_beyond_the_models_is_one_line(checkpoint, capsys):
    assert main(["--model", str(checkpoint), "-p", "Hi", "--context", "4096"]) == 1
    assert "context must be between 2 and 2048" in only_line(capsys.readouterr().err)


def test_a_missing_package_is_one_line(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["--model", str(checkpoint), "-p", "Hi"]) == 1
    assert "needs the tokenizers package: pip install" in only_line(capsys.readouterr().err)


def test_stdin_that_is_not_utf8_is_one_line(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert command() == 1
    assert "stdin is not UTF-8 text" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "choose a smaller --context"),
        (MemoryError(), "choose a smaller --context"),
        (PermissionError(13, "Permission denied", "model.safetensors"), "model.safetensors: Perm"),
        (OSError("cannot map\nthe file"), "input or output: cannot map the file"),
    ],
)
def test_what_the_machine_refuses_is_one_line(command, capsys, monkeypatch, error, expected):
    def load(*args, **options):
        raise error

    monkeypatch.setattr(speaker, "load", load)
    assert command("-p", "Hi") == 1
    assert expected in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize 'cuda'")])
def test_a_device_that_is_not_there_is_one_line(command, capsys, monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert command("-p", "Hi") == 1
    line = only_line(capsys.readouterr().err)
    assert re.search(f"no device to run on: .*{error}.*JAX_PLATFORMS is 'cuda'", line)


def test_an_error_during_an_answer_leaves_the_terminal_plain(command, monkeypatch):
    shown = Terminal.replace(monkeypatch, "stderr")
    monkeypatch.setattr("gpt_oss.session.Reply.__iter__", broken_reply)
    assert command("-p", "Hi", "--no-progress", replies=[REPLY]) == 1
    assert "\033[2mHm\033[22m\ngenerate.py: out of memory" in shown.getvalue()


def broken_reply(reply):
    """Two tokens of reasoning, then no memory is left."""
    yield Piece(1, "H", "analysis", False)
    yield Piece(2, "m", "analysis", False)
    raise MemoryError


def test_a_package_of_the_program_that_is_missing_is_one_line(command, capsys, monkeypatch):
    def run(*args):
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    monkeypatch.setattr("gpt_oss.command.run", run)
    assert command("-p", "Hi") == 1
    line = only_line(capsys.readouterr().err)
    assert "package tqdm is missing" in line
    assert ".uv/bin/uv run --extra gpt-oss examples/gpt_oss/generate.py" in line
    assert "pip install -e '.[gpt-oss]'" in line


def test_a_fault_of_the_program_keeps_its_traceback(command, monkeypatch):
    def load(*args, **options):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(speaker, "load", load)
    with pytest.raises(ValueError, match="shapes do not fit"):
        command("-p", "Hi")


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--top-p", "x"],
        ["--top-k", "0"],
        ["--min-p", "1"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--max-tokens", "0"],
        ["--max-tokens", "1.5"],
        ["--context", "1"],
        ["--stop", ""],
        ["--reasoning", "hard"],
        ["--dtype", "float16"],
        ["--algorithm", "fastest"],
        ["--algorithm", "fixed_budget"],
        ["--tokens-per-expert-ratio", "inf"],
        ["--algorithm", "dense", "--tokens-per-expert-ratio", "2"],
        ["--raw", "--developer", "x"],
        ["--raw", "--reasoning", "low"],
        ["--ignore-eos"],
        ["--show-reasoning", "--hide-reasoning"],
        ["--nothing"],
    ],
)
def test_wrong_flags_end_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["-p", "Hi", *flags])
    assert stopped.value.code == 2
    assert "generate.py: error: " in capsys.readouterr().err.splitlines()[-1]


def test_an_old_python_is_told_which_one_is_needed(monkeypatch):
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "needs Python 3.12 or newer, this is 3.11.7; " in str(stopped.value.code)
