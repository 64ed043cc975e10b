"""The checkpoint that ships: it is whole, small, right, and its chats end."""

import json
from pathlib import Path

import numpy as np
import oracle
import pytest

from gpt_oss.config import GptOssConfig
from gpt_oss.pretrained import Pretrained, load
from gpt_oss.sampling import Greedy
from gpt_oss.session import Options
from gpt_oss.source import CHECKPOINTS

FOLDER = CHECKPOINTS / "gpt-oss-nano"


@pytest.fixture(scope="module")
def nano() -> Pretrained:
    return load(FOLDER, dtype="float32", context=512)


def test_it_is_small_and_in_the_released_layout():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    names = {path.name for path in files}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= names
    tensors = oracle.read_tensors(FOLDER)
    config = GptOssConfig.from_folder(FOLDER)
    for layer in range(config.num_hidden_layers):
        for name in ("gate_up_proj", "down_proj"):
            blocks = tensors[f"model.layers.{layer}.mlp.experts.{name}_blocks"]
            assert blocks.dtype == np.uint8 and blocks.shape[-1] == 16


def test_logits_against_float64(nano):
    ids = nano.tokenizer.encode("My fellow citizens, the whale is not a fish.")
    expected = oracle.logits(FOLDER, oracle.read_config(FOLDER), ids)
    np.testing.assert_allclose(nano.logits(ids), expected, atol=5e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prompt", ["Hello", "Tell me about the sea", "Who are you?"])
def test_a_chat_ends_by_itself(nano, prompt):
    reply = nano.chat().reply(prompt, Options(Greedy(), max_tokens=400))
    assert len(reply.read().split()) >= 5
    assert reply.finish_reason == "stop"


def test_more_tokens_than_positions_are_refused(nano):
    most = nano.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"at most {most} tokens, the model's positions"):
        nano.logits([5] * (most + 1))


def test_ids_that_are_no_ids_are_refused(nano):
    with pytest.raises(TypeError, match="integer"):
        nano.logits([1.5])
    with pytest.raises(ValueError, match="of 0 to 4095"):
        nano.logits([4096])


def test_the_model_card_states_what_training_found():

    found = json.loads((FOLDER / "training.json").read_text())["bits_per_byte"]
    card = Path(FOLDER / "README.md").read_text()
    assert f"{found['mxfp4']:.3f}" in card and f"{found['bfloat16']:.3f}" in card
    assert found["mxfp4"] < 1.85
