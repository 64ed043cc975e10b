"""The command line: what goes to which stream, and how every ending looks."""

import ast
import io
import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_chat

import gpt_oss.generate
from gpt_oss import source, speaker
from gpt_oss.generate import main
from gpt_oss.pretrained import Pretrained
from gpt_oss.reader import Piece
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
    shown = Terminal.replace(monkeypatch, "stderr")
    assert command("-p", "Hi", "--no-progress", replies=[REPLY + "Yes.<|return|>"]) == 0
    assert "\n\033[2mHm.\033[22m\nload " in shown.getvalue()


def test_reasoning_is_not_dimmed_where_colors_are_off(command, monkeypatch):
    shown = Terminal.replace(monkeypatch, "stderr")
    monkeypatch.setenv("NO_COLOR", "1")
    assert command("-p", "Hi", "--no-progress", replies=[REPLY + "Yes.<|return|>"]) == 0
    assert "\nHm.\nload " in shown.getvalue()


def test_control_characters_do_not_reach_a_terminal(command, monkeypatch, capsys):
    reply = "<|channel|>final<|message|>a\x1b[2J\tb\x07\r\x9b1m\x7f<|return|>"
    assert command("-p", "Hi", replies=[reply]) == 0
    assert capsys.readouterr().out == "a\x1b[2J\tb\x07\r\x9b1m\x7f\n"
    shown = Terminal.replace(monkeypatch, "stdout")
    assert command("-p", "Hi", replies=[reply]) == 0
    replaced = "a\ufffd[2J\tb\ufffd\ufffd\ufffd1m\ufffd\n"
    assert shown.getvalue() == replaced
    shown = Terminal.replace(monkeypatch, "stderr")
    thought = reply.replace("final", "analysis")
    assert command("-p", "Hi", "--no-progress", replies=[thought]) == 0
    assert replaced.replace("\n", "\033[22m\n") in shown.getvalue()


def test_lines_of_json_have_no_control_characters_and_lose_none(command, capsys):
    reply = "<|channel|>final<|message|>a\x1b[2J\x9b\x7f<|return|>"
    assert command("-p", "Hi", "--json", replies=[reply]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert "".join(json.loads(line).get("text", "") for line in lines) == "a\x1b[2J\x9b\x7f"


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
        "sharding": None,
    }
    assert "Reasoning: high" in scripted.prompts[0]
    assert "# Instructions\n\nRhyme." in scripted.prompts[0]


def test_a_prompt_may_come_from_stdin(command, scripted, monkeypatch):
    for flags in ([], ["--prompt", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\nHi\n".encode())))
        assert command("--raw", *flags, replies=["x"]) == 0
    assert scripted.prompts == ["Grüße\nHi"] * 2


def test_white_space_is_text_to_continue(command, scripted):
    assert command("--raw", "-p", " \n", replies=["x"]) == 0
    assert scripted.prompts == [" \n"]


@pytest.fixture
def typed(monkeypatch):
    """What is typed on the terminal, line by line; an exception stands for its key."""
    lines = []

    def ask(*prompt):
        line = lines.pop(0) if lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    return lines


def test_a_chat_on_a_terminal_remembers_until_it_is_cleared(command, scripted, typed, capsys):
    typed += ["One", "", "Two", "/clear", "Three"]
    assert command(replies=[f"{REPLY}{n}.<|return|>" for n in (1, 2, 3)]) == 0
    assert capsys.readouterr().out == "1.\n2.\n3.\n"
    assert ["One" in p for p in scripted.prompts] == [True, True, False]


def test_ctrl_c_during_an_answer_of_a_chat_ends_the_answer_only(command, scripted, typed, capsys):
    typed += ["One", "Two"]
    assert command("--stop", "never", replies=[REPLY + "So ne^C", REPLY + "Yes.<|return|>"]) == 0
    out, err = capsys.readouterr()
    assert out == "So ne\nYes.\n"
    assert re.findall(r"ended by (\w+)", err) == ["interrupted", "stop"]


def test_ctrl_c_where_nothing_is_typed_ends_a_chat(command, scripted, typed, capsys):
    typed += [KeyboardInterrupt(), "One"]
    assert command() == 130
    assert (scripted.prompts, typed) == ([], ["One"])


def test_exit_ends_a_chat(command, scripted, typed):
    typed += [" /exit ", "One"]
    assert command() == 0
    assert (scripted.prompts, typed) == ([], ["One"])


@pytest.mark.parametrize("line", ["/help", "/nothing", "/clear all", " /exit now"])
def test_commands_of_a_chat_are_listed_without_asking_the_model(
    command, scripted, typed, capsys, line
):
    typed += [line]
    assert command() == 0
    assert scripted.prompts == []
    (listed,) = re.findall("commands: .*", capsys.readouterr().err)
    assert all(name in listed for name in ("/clear", "/help", "/exit"))


@pytest.mark.parametrize("line", ["/usr/bin is what?", "1/2", "/ is what?"])
def test_a_slash_alone_makes_no_command(command, scripted, typed, line):
    typed += [line]
    assert command(replies=[REPLY + "Yes.<|return|>"]) == 0
    assert line in scripted.prompts[0]


@pytest.mark.parametrize(
    ("seed", "seeds"), [(7, [7, 8, 9]), (2**63 - 2, [2**63 - 2, 2**63 - 1, 0])]
)
def test_the_seed_counts_up_in_a_chat(command, scripted, typed, capsys, seed, seeds):
    typed += ["One", "x" * 3000, "Two", "Three"]  # the second does not fit
    assert command("--seed", str(seed), replies=[REPLY + "Yes.<|return|>"] * 3) == 0
    assert [seed for *_, seed in scripted.options] == seeds
    err = capsys.readouterr().err
    assert [int(n) for n in re.findall(r"seed (\d+)", err)] == seeds
    assert len(re.findall(r"^load ", err, re.MULTILINE)) == 1


def test_without_a_seed_each_answer_draws_one(command, scripted, typed, monkeypatch, capsys):
    drawn = iter([5, 3, 8])
    monkeypatch.setattr("secrets.randbelow", lambda most: next(drawn))
    typed += ["One", "Two", "Three"]
    assert command(replies=[REPLY + "Yes.<|return|>"] * 3) == 0
    assert [seed for *_, seed in scripted.options] == [5, 3, 8]
    assert re.findall(r"seed (\d+)", capsys.readouterr().err) == ["5", "3", "8"]


def test_loading_does_not_count_the_wait_for_the_prompt_and_for_downloads(
    command, scripted, monkeypatch, capsys
):
    seconds = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: seconds[0])
    resolve = source.resolve

    def download(*args, **options):
        seconds[0] += 1000
        return resolve(*args, **options)

    class Typing(io.StringIO):
        def read(self, *args):
            seconds[0] += 500
            return super().read(*args)

    load = speaker.load

    def slow(*args, **options):
        seconds[0] += 7
        return load(*args, **options)

    monkeypatch.setattr("gpt_oss.command.resolve", download)
    monkeypatch.setattr(speaker, "load", slow)
    monkeypatch.setattr(sys, "stdin", Typing("Hi"))
    assert command(replies=[REPLY + "Yes.<|return|>"]) == 0
    assert "load 7.0 s" in capsys.readouterr().err


def test_a_tool_call_ends_the_turn_with_a_line_on_stderr(command, capsys):
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert command("-p", "Hi", replies=[call]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "the model calls functions.f with {}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "reply", "more"),
    [
        (["--max-tokens", "12"], REPLY + "Yes.<|return|>", ": allow more tokens with --max-tokens"),
        ([], "<|channel|>analysis<|message|>Hm.<|end|><|return|>", ""),
        ([], REPLY + "<|return|>", ""),
        (["--raw"], "<|return|>", ""),
    ],
)
def test_a_reply_without_an_answer_says_so(command, capsys, flags, reply, more):
    assert command("-p", "Hi", *flags, replies=[reply]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("the model gave no answer" + more)
    assert ("allow more" in err) == bool(more)


@pytest.mark.parametrize(("limit", "noted"), [(2046, False), (2047, True)])
def test_more_tokens_than_the_context_has_room_for_are_noted(command, capsys, limit, noted):
    assert command("--raw", "-p", "Hi", "--max-tokens", str(limit), replies=["x"]) == 0
    expected = f"--max-tokens {limit}: the context has room for 2046"
    assert (expected in capsys.readouterr().err) == noted


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
