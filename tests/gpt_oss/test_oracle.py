"""The NumPy oracle and the tiny checkpoints against what transformers computed (`make_goldens`)."""

import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import safetensors.numpy
import tiny

TOLERANCE = 2e-5  # on logits of up to 7; transformers' float32 accounts for all of it
ROUTER_TOLERANCE = 5e-6  # on weights between 0 and 1

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))

each_config = pytest.mark.parametrize("name", tiny.CONFIGS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, oracle.Weights]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: oracle.weights(tiny.write(name, folder / name)) for name in tiny.CONFIGS}


def short_prompts(name: str) -> dict[str, list[int]]:
    return {label: ids for label, ids in tiny.prompts(name).items() if len(ids) < 1000}


@each_config
def test_goldens_belong_to_these_weights(name: str) -> None:
    assert str(GOLDENS[f"{name}/sha256"]) == tiny.fingerprint(name)


@each_config
@pytest.mark.parametrize("style", ["released", "transformers5"])
def test_logits(name: str, style: tiny.Style, checkpoints: dict[str, oracle.Weights]) -> None:
    for label, tokens in short_prompts(name).items():
        logits = oracle.logits(checkpoints[name], tiny.config(name, style), tokens, 0, np.float32)
        golden = GOLDENS[f"{name}/{label}/logits"]
        positions = GOLDENS[f"{name}/{label}/positions"]
        np.testing.assert_allclose(logits[positions], golden, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(logits.argmax(-1), GOLDENS[f"{name}/{label}/argmax"])


@each_config
def test_greedy_tokens(name: str, checkpoints: dict[str, oracle.Weights]) -> None:
    """One pass over prompt and answer: each token of the answer is the argmax before it."""
    prompt, answer = tiny.prompts(name)["below_window"], GOLDENS[f"{name}/greedy"].tolist()
    logits = oracle.logits(checkpoints[name], tiny.config(name), prompt + answer)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_greedy(checkpoints: dict[str, oracle.Weights]) -> None:
    name = "rope_truncated"
    prompt = tiny.prompts(name)["below_window"]
    tokens = oracle.greedy(checkpoints[name], tiny.config(name), prompt, 20)
    assert tokens == GOLDENS[f"{name}/greedy"].tolist()[:20]


@each_config
def test_rope(name: str) -> None:
    frequencies, factor = oracle.rope_frequencies(tiny.config(name))
    golden = GOLDENS[f"{name}/rope/frequencies"]
    np.testing.assert_allclose(frequencies, golden, rtol=5e-7)
    positions = GOLDENS["rope_positions"]
    tables = oracle.rope_tables(tiny.config(name), positions)
    # the angle is off by what the frequency is and by its own rounding
    allowed = factor * (1e-7 + positions[:, None] * frequencies * 6e-7)
    for table, part in zip(tables, ("cos", "sin"), strict=True):
        assert np.all(np.abs(table - GOLDENS[f"{name}/rope/{part}"]) <= allowed)


@pytest.fixture
def rounded_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the oracle transformers' float32 frequencies, so that far positions compare tightly."""
    exact = oracle.rope_frequencies
    names = {id(config["rope_scaling"]): name for name, config in tiny.CONFIGS.items()}

    def rounded(config: oracle.Config) -> tuple[np.ndarray, float]:
        name = names[id(config["rope_scaling"])]
        return GOLDENS[f"{name}/rope/frequencies"], exact(config)[1]

    monkeypatch.setattr(oracle, "rope_frequencies", rounded)


@each_config
@pytest.mark.usefixtures("rounded_frequencies")
def test_logits_of_a_shifted_prompt(name: str, checkpoints: dict[str, oracle.Weights]) -> None:
    tokens, shift = tiny.prompts(name)["several_windows"], int(GOLDENS["shift"])
    logits = oracle.logits(checkpoints[name], tiny.config(name), tokens, shift, np.float32)[-1]
    golden = GOLDENS[f"{name}/shifted/logits"]
    np.testing.assert_allclose(logits, golden, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("rounded_frequencies")
def test_logits_past_4096(checkpoints: dict[str, oracle.Weights]) -> None:
    name = "long_context"
    tokens = tiny.prompts(name)["past_4096"]
    logits = oracle.logits(checkpoints[name], tiny.config(name), tokens, 0, np.float32)
    positions = GOLDENS[f"{name}/past_4096/positions"]
    golden = GOLDENS[f"{name}/past_4096/logits"]
    np.testing.assert_allclose(logits[positions], golden, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(logits.argmax(-1), GOLDENS[f"{name}/past_4096/argmax"])


def test_far_positions_differ_by_the_rounding_of_frequencies_only(
    checkpoints: dict[str, oracle.Weights],
) -> None:
    name = "long_context"
    logits = oracle.logits(checkpoints[name], tiny.config(name), tiny.prompts(name)["past_4096"])
    positions = GOLDENS[f"{name}/past_4096/positions"]
    golden = GOLDENS[f"{name}/past_4096/logits"]
    np.testing.assert_allclose(logits[positions], golden, rtol=0, atol=1e-3)
    assert np.mean(logits.argmax(-1) == GOLDENS[f"{name}/past_4096/argmax"]) > 0.995


def test_routing_of_every_layer(checkpoints: dict[str, oracle.Weights]) -> None:
    name = "released_numbers"
    tokens = tiny.prompts(name)["several_windows"]
    result = oracle.forward(checkpoints[name], tiny.config(name), tokens)
    np.testing.assert_array_equal(result.router_ids, GOLDENS[f"{name}/router_ids"])
    golden = GOLDENS[f"{name}/router_weights"]
    np.testing.assert_allclose(result.router_weights, golden, rtol=0, atol=ROUTER_TOLERANCE)


@each_config
def test_router_and_experts_alone(name: str, checkpoints: dict[str, oracle.Weights]) -> None:
    count, w, config = int(GOLDENS["layer_tokens"]), checkpoints[name], tiny.config(name)
    x = tiny.hidden_states(name, count).astype(np.float64)
    ids, weights, _ = oracle.route(w, config, 0, x)
    np.testing.assert_array_equal(ids, GOLDENS[f"{name}/layer_router/ids"])
    golden = GOLDENS[f"{name}/layer_router/weights"]
    np.testing.assert_allclose(weights, golden, rtol=0, atol=ROUTER_TOLERANCE)
    out = oracle.experts(w, config, 0, x, *tiny.routing(name, count))
    golden = GOLDENS[f"{name}/layer_experts"]
    np.testing.assert_allclose(out, golden, rtol=0, atol=1e-6 * np.abs(golden).max())


# What an implementation might get wrong, by the configuration whose goldens must show it.
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("released_numbers", {"sliding_window": 7}),
    ("released_numbers", {"sliding_window": 9}),
    ("released_numbers", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("released_numbers", {"num_experts_per_tok": 4}),
    ("released_numbers", {"swiglu_limit": 100.0}),
    ("released_numbers", {"rope_theta": 10000}),
    ("rope_ramp_from_zero", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("tight_clamp", {"swiglu_limit": 7.0}),
    ("tight_clamp", {"swiglu_alpha": 1.702}),
    ("no_grouped_query", {"rms_norm_eps": 1e-5}),
    ("one_expert_per_token", {"factor": 32.0}),
    ("rope_truncated", {"truncate": False}),
    ("rope_truncated", {"beta_fast": 32.0}),
    ("rope_truncated", {"beta_slow": 1.0}),
    ("rope_truncated", {"original_max_position_embeddings": 4096}),
]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_goldens_show_a_wrong_number(
    name: str, mistake: dict[str, Any], checkpoints: dict[str, oracle.Weights]
) -> None:
    right = tiny.config(name)
    rope = {key: mistake.get(key, value) for key, value in right["rope_scaling"].items()}
    wrong = {**right, **mistake, "rope_scaling": rope}
    assert oracle_error(checkpoints[name], right, name) < TOLERANCE
    assert oracle_error(checkpoints[name], wrong, name) > 20 * TOLERANCE


@each_config
@pytest.mark.parametrize("kind", ["sinks", "o_proj.bias", "router.bias", "up_proj_bias"])
def test_goldens_show_missing_tensors(
    name: str, kind: str, checkpoints: dict[str, oracle.Weights]
) -> None:
    fill = -np.inf if kind == "sinks" else 0.0
    kept = checkpoints[name].items()
    damaged = {key: np.full_like(v, fill) if key.endswith(kind) else v for key, v in kept}
    assert oracle_error(damaged, tiny.config(name), name) > 20 * TOLERANCE


def oracle_error(weights: oracle.Weights, config: oracle.Config, name: str) -> float:
    logits = oracle.logits(weights, config, tiny.prompts(name)["several_windows"], 0, np.float32)
    positions = GOLDENS[f"{name}/several_windows/positions"]
    return float(np.abs(logits[positions] - GOLDENS[f"{name}/several_windows/logits"]).max())


@each_config
def test_decisions_are_not_near_ties(name: str, checkpoints: dict[str, oracle.Weights]) -> None:
    """So that equality of ids and of greedy tokens is a fair demand on float32."""
    prompts = short_prompts(name)
    answer = GOLDENS[f"{name}/greedy"].tolist()
    sequences = [*prompts.values(), prompts["below_window"] + answer]
    chosen = tiny.CONFIGS[name]["num_experts_per_tok"]
    for tokens in sequences:
        result = oracle.forward(checkpoints[name], tiny.config(name), tokens)
        ranked = -np.sort(-result.router_logits, axis=-1)
        assert np.min(ranked[..., :-1] - ranked[..., 1:], axis=(0, 1))[:chosen].min() > 4e-4
        start = len(tokens) - len(answer) - 1 if tokens is sequences[-1] else 0
        ranked = np.sort(result.logits[start : len(tokens) - (start > 0)], axis=-1)
        assert np.min(ranked[:, -1] - ranked[:, -2]) > 2e-3
    assert len(set(answer)) > 30


@each_config
def test_experts_clamp_now_and_then(name: str, checkpoints: dict[str, oracle.Weights]) -> None:
    config, w = tiny.config(name), checkpoints[name]
    x = tiny.hidden_states(name, 50).astype(np.float64)
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    values = np.einsum("th,eih->tei", x, w[stem]) + w[stem + "_bias"]
    assert 1e-3 < np.mean(np.abs(values) > config["swiglu_limit"]) < 0.7


@each_config
def test_sizes_differ(name: str) -> None:
    c = tiny.CONFIGS[name]
    heads, kv, dim = (c[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    sizes = [c["hidden_size"], c["intermediate_size"], 2 * c["intermediate_size"]]
    sizes += [c["vocab_size"], c["num_local_experts"], dim, heads, heads * dim]
    sizes += [kv, kv * dim] if 1 < kv < heads else []
    assert all(a != b for a, b in itertools.combinations(sizes, 2))


def test_mxfp4_decodes_every_code_and_scale() -> None:
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = np.array(magnitudes + [-m for m in magnitudes])
    codes = np.broadcast_to(np.arange(32, dtype=np.uint8) % 16, (256, 32))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    decoded = oracle.decode_mxfp4(tiny.pack_mxfp4(codes), scales)
    assert decoded.shape == (256, 32)
    powers = 2.0 ** (np.arange(255.0) - 127)
    np.testing.assert_array_equal(decoded[:255], powers[:, None] * table[codes[:255]])
    assert np.isnan(decoded[255]).all()


def test_mxfp4_low_half_comes_first() -> None:
    blocks = np.zeros((1, 2, 16), np.uint8)
    blocks[0, 1, 3] = 0x21
    decoded = oracle.decode_mxfp4(blocks, np.array([[127, 128]], np.uint8))
    assert {i: v for i, v in enumerate(decoded[0]) if v} == {38: 1.0, 39: 2.0}


def test_bfloat16_rounds_to_nearest_even(rng: np.random.Generator) -> None:
    values = rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000)
    values = np.append(values, [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]).astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(tiny.bfloat16_bits(values), expected)


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_files_hold_the_tensors(shards: int, tmp_path: Path) -> None:
    """Read back with the safetensors library, and with the oracle's own reader."""
    name = "one_expert_per_token"
    folder = tiny.write(name, tmp_path / "checkpoint", shards)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    raw, shapes = tiny.tensors(name), tiny.shapes(tiny.CONFIGS[name])
    found = {}
    for file in files:
        loaded = safetensors.numpy.load_file(file)
        found.update({key: (file.name, value) for key, value in loaded.items()})
    assert found.keys() == raw.keys() == shapes.keys() == oracle.read_tensors(folder).keys()
    for key, value in oracle.read_tensors(folder).items():
        dtype, shape = shapes[key]
        assert found[key][1].dtype == {"BF16": ml_dtypes.bfloat16, "U8": np.uint8}[dtype]
        assert value.shape == found[key][1].shape == shape
        np.testing.assert_array_equal(value.view(raw[key].dtype), raw[key])
        np.testing.assert_array_equal(found[key][1].view(raw[key].dtype), raw[key])
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (shards > 1)
    if shards > 1:
        assert files[-1].name == f"model-{shards - 1:05d}-of-{shards - 1:05d}.safetensors"
        content = json.loads(index.read_text())
        assert content["weight_map"] == {key: file for key, (file, _) in found.items()}
        assert content["metadata"]["total_size"] == sum(v.nbytes for v in raw.values())


def test_oracle_refuses_another_rope() -> None:
    config = tiny.config("released_numbers", "transformers5")
    config["rope_parameters"] = {**config["rope_parameters"], "rope_type": "linear"}
    with pytest.raises(ValueError, match="expected a yarn rope"):
        oracle.rope_tables(config, [0])
