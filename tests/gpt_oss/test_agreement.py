"""What several processes compare, and what the first decides, without starting any."""

import datetime

import jax
import numpy as np
import pytest
import tiny_chat

from gpt_oss import agreement, speaker
from gpt_oss.errors import UserError
from gpt_oss.flags import parse
from gpt_oss.source import Source


@pytest.fixture
def second(monkeypatch):
    """Makes this process the second of two; the first has the texts that are given."""

    def become(texts):
        def gather(hashes):
            return np.stack([[agreement._hash(text) for text in texts.values()], hashes])

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        monkeypatch.setattr(agreement.multihost_utils, "process_allgather", gather)

    return become


def test_what_differs_is_named(second):
    second({"--prompt": "Sea", "the model": "a", "--top-k": "5"})
    with pytest.raises(UserError) as caught:
        agreement.check_same({"--prompt": "Sun" * 40, "the model": "a", "--top-k": "6"})
    message = str(caught.value)
    assert "process 1 has --prompt 'SunSun" in message and "--top-k '6'" in message
    assert "the model" not in message and "\n" not in message and len(message) < 250


def test_the_same_is_no_error(second):
    texts = {"--prompt": "a lone surrogate \ud800", "the model": "a"}
    second(texts)
    agreement.check_same(texts)


FLAGS = ["--coordinator", "a:1", "--num-processes", "2", "--process-id"]


class TestCommon:
    @pytest.fixture
    def source(self, tmp_path):
        return Source("tiny", tiny_chat.write(tmp_path))

    def test_who_a_process_is_may_differ(self, source):
        first = parse([*FLAGS, "0", "-p", "Sea", "--model", "here"])
        other = parse([*FLAGS, "1", "-p", "Sea", "--model", "there", "--no-progress", "--json"])
        assert agreement.common(first, source) == agreement.common(other, source)

    @pytest.mark.parametrize(
        "flags",
        [
            *(["--seed", "1"], ["--raw"], ["--developer", "x"], ["--reasoning", "low"]),
            *(["--mesh", "model=2"], ["--dtype", "bfloat16"], ["--max-tokens", "3"]),
            *(["--stop", "x"], ["--context", "64"], ["--temperature", "0"]),
        ],
        ids=" ".join,
    )
    def test_flags_that_matter(self, source, flags):
        first = agreement.common(parse([*FLAGS, "0", "-p", "Sea"]), source)
        other = agreement.common(parse([*FLAGS, "0", "-p", "Sea", *flags]), source)
        assert {name for name in first if first[name] != other[name]} == {flags[0]}

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_files_of_the_model(self, source, name):
        arguments = parse([*FLAGS, "0", "-p", "Sea"])
        first = agreement.common(arguments, source)
        with (source.folder / name).open("ab") as file:
            file.write(b" ")
        other = agreement.common(arguments, source)
        differing = {key for key in first if first[key] != other[key]}
        assert differing == {"the weights" if name == "model.safetensors" else name}


def test_the_date_is_that_of_the_first_process(monkeypatch):
    day = datetime.date(2025, 8, 5)
    monkeypatch.setattr(speaker, "agreed", lambda number: day.toordinal())
    seen = []

    class Model:
        def chat(self, system, developer):
            seen.append(system.current_date)

    speaker._new_chat(Model(), parse(["-p", "Sea"]))
    assert seen == ["2025-08-05"]
