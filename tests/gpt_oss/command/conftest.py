"""The command on a tiny checkpoint, with replies given beforehand."""

import types

import numpy as np
import pytest
import tiny_chat

from gpt_oss import speaker
from gpt_oss.generate import main
from gpt_oss.pretrained import Pretrained


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
