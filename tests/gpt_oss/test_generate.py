"""The command line: what goes to which stream, and how every ending looks."""

import ast
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_chat

import gpt_oss.generate
from gpt_oss import source, speaker
from gpt_oss.generate import main
from gpt_oss.pretrained import Pretrained
from gpt_oss.sampling import Sampler

SCRIPT = Path(gpt_oss.generate.__file__)
ROOT = SCRIPT.parents[2]
REPLY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def scripted(checkpoint, small_tokenizer, monkeypatch):
    """Replaces the model that the command loads; loaded with `scripted.load_options`."""
    engine = tiny_chat.ScriptedEngine(small_tokenizer)
    engine.load_options = {}

    def load(found, **options):
        engine.load_options = {"folder": found.folder, **options}
        network = types.SimpleNamespace(dtype=np.dtype("float32"))
        return Pretrained(found.name, tiny_chat.CONFIG, network, small_tokenizer, engine)

    monkeypatch.setattr(speaker, "load", load)
    return engine


@pytest.fixture
def command(checkpoint, scripted):
    """Runs the command on the tiny checkpoint with replies given beforehand."""

    def run(*flags, replies=()):
        scripted.script = list(replies)
        return main(["--model", str(checkpoint), *flags])

    return run


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def only_line(text):
    """The text's one line."""
    assert text.count("\n") == 1 and text.endswith("\n")
    return text.strip()


def test_stdout_has_the_answer_only_and_stderr_the_rest(command, capsys):
    assert command("-p", "Hi", "--seed", "7", replies=[REPLY + "Grüße 🌍<|return|>"]) == 0
    out, err = capsys.readouterr()
    assert out == "Grüße 🌍\n"
    model, reasoning, statistics = err.splitlines()
    assert model.endswith("in float32 on cpu")
    assert reasoning == "Hm."
    for part in ("load ", "compile ", "first token 0.25 s", "decode ", "peak memory ", "seed 7"):
        assert part in statistics
    assert statistics.endswith("ended by stop")


def test_reasoning_can_be_hidden(command, capsys):
    assert command("-p", "Hi", "--hide-reasoning", replies=[REPLY + "Yes.<|return|>"]) == 0
    out, err = capsys.readouterr()
    assert (out, "Hm." in err) == ("Yes.\n", False)


def test_reasoning_is_dimmed_on_a_terminal_only(command, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert command("-p", "Hi", "--no-progress", replies=[REPLY + "Yes.<|return|>"]) == 0
    assert "\033[2mH\033[22m" in sys.stderr.getvalue()


def test_lines_of_json_have_every_token_and_then_the_statistics(
    command, scripted, capsys, small_tokenizer
):
    text = REPLY + "Grüße<|return|>"
    assert command("-p", "Hi", "--json", "--seed", "7", replies=[text]) == 0
    *tokens, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [t["token_id"] for t in tokens] == tiny_chat.control_ids(text, small_tokenizer)
    for channel, expected in (("analysis", "Hm."), ("final", "Grüße"), (None, "")):
        assert "".join(t["text"] for t in tokens if t["channel"] == channel) == expected
    assert last.keys() == {"statistics"}
    assert last["statistics"]["generated_tokens"] == len(tokens)
    assert (last["statistics"]["seed"], last["statistics"]["finish_reason"]) == (7, "stop")


def test_flags_reach_the_model_and_the_engine(command, scripted, checkpoint):
    sampling = "--temperature 0.5 --top-p 0.9 --top-k 8 --min-p 0.1 --seed 3 --max-tokens 70"
    model = "--context 500 --dtype bfloat16 --algorithm fixed_budget --tokens-per-expert-ratio 2"
    flags = [*sampling.split(), *model.split(), "--reasoning", "high", "--developer", "Rhyme."]
    assert command("-p", "Hi", *flags, replies=[REPLY + ".<|return|>"]) == 0
    assert scripted.options == [(Sampler(0.5, 8, 0.9, 0.1), 70, 3)]
    assert scripted.load_options == {
        "folder": checkpoint,
        "dtype": "bfloat16",
        "context": 500,
        "progress": False,
        "algorithm": "fixed_budget",
        "tokens_per_expert_ratio": 2.0,
    }
    assert "Reasoning: high" in scripted.prompts[0]
    assert "# Instructions\n\nRhyme." in scripted.prompts[0]


def test_a_prompt_may_come_from_stdin(command, scripted, monkeypatch):
    for flags in ([], ["--prompt", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\nHi\n".encode())))
        assert command("--raw", *flags, replies=["x"]) == 0
    assert scripted.prompts == ["Grüße\nHi"] * 2


def test_a_chat_on_a_terminal_remembers_until_it_is_cleared(command, scripted, monkeypatch, capsys):
    lines = ["One", "", "Two", "/clear", "Three"]

    def ask(*prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    assert command(replies=[f"{REPLY}{n}.<|return|>" for n in (1, 2, 3)]) == 0
    assert capsys.readouterr().out == "1.\n2.\n3.\n"
    assert ["One" in p for p in scripted.prompts] == [True, True, False]


def test_a_tool_call_ends_the_turn_with_a_line_on_stderr(command, capsys):
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert command("-p", "Hi", replies=[call]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "the model calls functions.f with {}" in err.splitlines()[-1]


def test_a_reply_without_an_answer_says_so(command, capsys):
    assert command("-p", "Hi", "--max-tokens", "12", replies=[REPLY + "Yes.<|return|>"]) == 0
    out, err = capsys.readouterr()
    assert (out, "no answer yet" in err) == ("", True)


def test_stop_strings_end_the_answer(command, capsys):
    flags = ["--stop", "two", "--stop", "three"]
    assert command("-p", "Hi", *flags, replies=[REPLY + "one two three<|return|>"]) == 0
    assert capsys.readouterr().out == "one \n"


def test_an_interrupt_ends_the_line_and_gives_the_statistics(command, capsys):
    assert command("-p", "Hi", "--stop", "never", replies=[REPLY + "So ne^C"]) == 130
    out, err = capsys.readouterr()
    assert out == "So ne\n"
    assert err.endswith("ended by interrupted\n")


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


def test_memory_that_is_not_there_is_one_line(command, capsys, monkeypatch):
    def load(*args, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(speaker, "load", load)
    assert command("-p", "Hi") == 1
    assert "choose a smaller --context" in only_line(capsys.readouterr().err)


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


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    version = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "version" in line
    )
    assert capsys.readouterr().out == f"generate.py {version.split('"')[1]}\n"


def test_an_old_python_is_told_which_one_is_needed(monkeypatch):
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "needs Python 3.12 or newer, this is 3.11.7; " in str(stopped.value.code)


def test_the_default_model_is_named_on_stderr(scripted, checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "CHECKPOINTS", tmp_path)
    (tmp_path / "gpt-oss-nano").symlink_to(checkpoint)
    scripted.script = [REPLY + "Yes.<|return|>"]
    assert main(["-p", "Hi"]) == 0
    assert capsys.readouterr().err.startswith("gpt-oss is gpt-oss-nano here: openai/gpt-oss-20b")


def start(checkpoint, folder, script, *flags, **options):
    """Starts the command in a process of its own, which a Ctrl-C reaches."""
    # A process started in the background would ignore interrupts, and its children too.
    code = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = sys.argv[1:]; sys.path[0] = __import__('os').path.dirname(sys.argv[0]); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-c", code, script, "--model", str(checkpoint), "--raw", *flags],
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


def test_a_closed_pipe_ends_it_quietly(checkpoint):
    flags = ["--ignore-eos", "-p", "Hi", "--max-tokens", "400"]
    with start(checkpoint, ROOT, str(SCRIPT), *flags) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0
    assert len(err.splitlines()) == 1
