"""GptOssConfig: what it reads, and that each bad value is refused by its key."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_configs import config_json

from gpt_oss.config import FULL, REQUIRED_KEYS, SLIDING, GptOssConfig
from gpt_oss.yarn import YarnScaling
from moe_jax.checkpoint import ConfigError

GENERATION = {"eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999}


def released(layers: int = 24, experts: int = 32) -> dict[str, Any]:
    """The config.json of openai/gpt-oss-20b, or with 36 and 128 of -120b."""
    return config_json(
        hidden=2880,
        intermediate=2880,
        heads=(64, 8, 64),
        experts=(experts, 4),
        vocab=201088,
        window=128,
        layers="sf" * (layers // 2),
        eos_token_id=200002,
        pad_token_id=199999,
    )


@pytest.mark.parametrize(("layers", "experts"), [(24, 32), (36, 128)])
def test_released_models(layers: int, experts: int) -> None:
    assert GptOssConfig.from_dict(released(layers, experts), GENERATION) == GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=experts,
        experts_per_token=4,
        layer_types=(SLIDING, FULL) * (layers // 2),
        sliding_window=128,
        max_position_embeddings=131072,
        rope_theta=150000.0,
        rope_scaling=YarnScaling(32.0, 4096, 32.0, 1.0, truncate=False),
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        eos_token_ids=(199999, 200002, 200012),
        pad_token_id=199999,
        initializer_range=0.02,
        router_aux_loss_coef=0.9,
        quant_method="mxfp4",
    )


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_spelling_of_transformers_5(name: str) -> None:
    old = GptOssConfig.from_dict(tiny.config(name, "released"))
    assert GptOssConfig.from_dict(tiny.config(name, "transformers5")) == old


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_round_trip(name: str) -> None:
    config = GptOssConfig.from_dict(tiny.config(name))
    assert GptOssConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_written_as_released() -> None:
    """What is written has the keys and values of the released file, and one key more."""
    source = released()
    written = GptOssConfig.from_dict(source).to_dict()
    for key in ("output_router_logits", "transformers_version", "use_cache"):
        del source[key]
    assert written.pop("swiglu_alpha") == 1.702
    assert written == source


def test_window_of_a_layer() -> None:
    config = GptOssConfig.from_dict(released())
    assert [config.window(layer) for layer in range(4)] == [128, None, 128, None]


def test_plain_rope() -> None:
    for scaling in (None, {"rope_type": "default"}):
        assert GptOssConfig.from_dict(released() | {"rope_scaling": scaling}).rope_scaling is None


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released()))
    assert GptOssConfig.from_folder(tmp_path).eos_token_ids == (200002,)
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    assert GptOssConfig.from_folder(str(tmp_path)).eos_token_ids == (199999, 200002, 200012)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000, '{"vocab_size": 1e999}'])
def test_files_that_are_not_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        GptOssConfig.from_folder(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist: give the folder"):
        GptOssConfig.from_folder(tmp_path)


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_missing_key(key: str) -> None:
    config = released()
    del config[key]
    config.pop({"num_experts_per_tok": "experts_per_token"}.get(key, ""), None)
    with pytest.raises(ConfigError, match=f"{key} is missing: expected"):
        GptOssConfig.from_dict(config)


def test_eos_is_needed() -> None:
    config = released()
    del config["eos_token_id"]
    with pytest.raises(ConfigError, match="eos_token_id is missing"):
        GptOssConfig.from_dict(config)
    with pytest.raises(ConfigError, match="eos_token_id is missing"):
        GptOssConfig.from_dict(config, {"eos_token_id": []})
    assert GptOssConfig.from_dict(config, {"eos_token_id": 7}).eos_token_ids == (7,)


INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "sliding_window",
    "max_position_embeddings",
)
NUMBERS = ("rope_theta", "rms_norm_eps", "swiglu_limit", "swiglu_alpha", "initializer_range")


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [True, 4.0, "4", None, [4], 0, -1, 2**31])
def test_integers(key: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"{key}: expected an integer .*got {re.escape(repr(value))}"
    ):
        GptOssConfig.from_dict(released() | {key: value})


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [True, "4", None, [4], 0, -1.0, float("inf"), float("nan")])
def test_numbers(key: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"{key}: expected a number .*got {re.escape(repr(value))}"
    ):
        GptOssConfig.from_dict(released() | {key: value})


BAD: list[tuple[str, Any, str]] = [
    ("model_type", "llama", "model_type: expected 'gpt_oss', got 'llama'"),
    ("experts_per_token", 3, "experts_per_token: expected 4, as num_experts_per_tok says, got 3"),
    ("num_key_value_heads", 7, "num_attention_heads: expected a multiple of num_key_value_heads=7"),
    ("head_dim", 63, "head_dim: expected an even number"),
    ("hidden_size", 2881, "hidden_size: expected a multiple of the MXFP4 block 32, got 2881"),
    ("intermediate_size", 33, "intermediate_size: expected a multiple of the MXFP4 block 32"),
    ("num_hidden_layers", 23, "layer_types: expected num_hidden_layers=23 entries, got 24"),
    ("layer_types", [FULL] * 23 + ["chunked"], "layer_types: expected a list of .*got 'chunked'"),
    ("layer_types", [FULL] * 23 + [7], "layer_types: expected a list of .*got 7"),
    ("layer_types", FULL, "layer_types: expected a list"),
    ("layer_types", None, "layer_types: expected a list"),
    ("num_local_experts", 3, "num_experts_per_tok: expected at most num_local_experts=3, got 4"),
    ("hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("attention_bias", False, "attention_bias: expected True"),
    ("attention_bias", 1, "attention_bias: expected True"),
    ("attention_dropout", 0.1, "attention_dropout: expected 0.0"),
    ("tie_word_embeddings", True, "tie_word_embeddings: expected False"),
    ("eos_token_id", 201088, "eos_token_id: expected an id below vocab_size=201088, got 201088"),
    ("eos_token_id", -1, "eos_token_id: expected an id below"),
    ("eos_token_id", "2", "eos_token_id: expected a token id"),
    ("eos_token_id", [2, True], "eos_token_id: expected a token id"),
    ("eos_token_id", {"a": 1}, "eos_token_id: expected a token id"),
    ("pad_token_id", 201088, "pad_token_id: expected an id below"),
    ("pad_token_id", -1, "pad_token_id: expected a token id"),
    ("rope_scaling", "yarn", "rope_scaling: expected an object"),
    ("rope_scaling", {}, "rope_type is missing"),
    ("quantization_config", "mxfp4", "quantization_config: expected an object"),
    ("quantization_config", {}, "quantization_config.quant_method: expected 'mxfp4', got None"),
    ("quantization_config", {"quant_method": "gptq"}, "quant_method: expected 'mxfp4', got 'gptq'"),
    ("router_aux_loss_coef", -0.1, "router_aux_loss_coef: expected a number of at least 0"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_unsupported(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GptOssConfig.from_dict(released() | {key: value})


BAD_ROPE: list[tuple[str, Any, str]] = [
    ("rope_type", "linear", "rope_scaling.rope_type: expected 'yarn' or 'default', got 'linear'"),
    ("factor", 0, "factor: expected a number of at least 1"),
    ("factor", "32", "factor: expected a number"),
    ("beta_fast", 0.0, "beta_fast: expected a number above 0"),
    ("beta_slow", None, "beta_slow: expected a number above 0"),
    ("truncate", 0, "truncate: expected true or false"),
    (
        "original_max_position_embeddings",
        0,
        "original_max_position_embeddings: expected an integer",
    ),
    ("attention_factor", -1, "attention_factor: expected a number above 0"),
    ("mscale", 1.0, "mscale: expected no such key"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_ROPE)
def test_unsupported_rope(key: str, value: Any, message: str) -> None:
    config = released()
    config["rope_scaling"][key] = value
    with pytest.raises(ConfigError, match=message):
        GptOssConfig.from_dict(config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_theta": 1.0}, "rope_theta: expected a number above 1, got 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"num_experts": 99}, "num_experts: expected .*, as num_local_experts says, got 99"),
    ],
)
def test_what_would_change_the_model_is_not_ignored(change, message):
    with pytest.raises(ConfigError, match=message):
        GptOssConfig.from_dict({**tiny.config("released_numbers"), **change})


def test_a_ramp_of_yarn_that_runs_backwards():
    config = tiny.config("released_numbers")
    scaling = {**config["rope_scaling"], "beta_fast": 1.0, "beta_slow": 32.0}
    with pytest.raises(ConfigError, match="beta_fast: expected more than beta_slow, 32.0, got 1.0"):
        GptOssConfig.from_dict({**config, "rope_scaling": scaling})


def test_two_spellings_must_agree():
    config = tiny.config("released_numbers", "transformers5")
    inside = dict(config["rope_parameters"])
    theta = inside.pop("rope_theta")
    same = {**config, "rope_theta": theta, "rope_scaling": inside}
    assert GptOssConfig.from_dict(same) == GptOssConfig.from_dict(config)
    for other in ({"rope_theta": 2 * theta}, {"rope_scaling": {**inside, "factor": 3.0}}):
        with pytest.raises(ConfigError, match="as rope_parameters says"):
            GptOssConfig.from_dict({**config, **other})
