"""A chat on a terminal: what it remembers, its commands, its seeds, and Ctrl-C."""

import re
import sys

import pytest
from command_line import REPLY, Terminal


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
