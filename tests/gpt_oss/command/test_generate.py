"""The command line: what goes to which stream, and what flags do."""

import io
import json
import sys

import pytest
import tiny_chat
from command_line import REPLY, ROOT, Terminal

from gpt_oss import source, speaker
from gpt_oss.generate import main
from gpt_oss.sampling import Sampler


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


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    version = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "version" in line
    )
    assert capsys.readouterr().out == f"generate.py {version.split('"')[1]}\n"


def test_the_default_model_is_named_on_stderr(scripted, checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "CHECKPOINTS", tmp_path)
    (tmp_path / "gpt-oss-nano").symlink_to(checkpoint)
    scripted.script = [REPLY + "Yes.<|return|>"]
    assert main(["-p", "Hi"]) == 0
    assert capsys.readouterr().err.startswith("gpt-oss is gpt-oss-nano here: openai/gpt-oss-20b")
