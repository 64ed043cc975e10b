"""Training: the loss is right and falls, runs resume exactly, checkpoints hold what was trained."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from gpt_oss import train
from gpt_oss.config import GptOssConfig
from gpt_oss.evaluate import _windows, evaluate
from gpt_oss.initialization import random_parameters
from gpt_oss.layout import parameter_specs
from gpt_oss.loader import load_model
from gpt_oss.model import GptOss
from gpt_oss.training import (
    TrainingConfig,
    TrainingData,
    build,
    initial_state,
    load_data,
    loss,
    sample_batch,
    train_steps,
)
from moe_jax import BlockScaled, Tagged, tag

pytestmark = pytest.mark.usefixtures("little_compiling")

LENGTH = 24
NAME = "one_expert_per_token"
MODEL = GptOssConfig.from_dict(tiny.config(NAME))
CONFIG = TrainingConfig(
    steps=40, text_rows=3, chat_rows=2, length=LENGTH, learning_rate=1e-2, warmup=5, dropout=0.0
)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


jitted_loss = jax.jit(loss, static_argnums=(4, 5, 6))


@jax.jit
def report_of(model: GptOss, tokens: Tagged, token_mask: Tagged | None = None) -> Any:
    """The first layer's report."""
    return model.with_statistics(tokens, token_mask=token_mask)[1][0].report


def make_data() -> TrainingData:
    """A text that repeats itself, so that it can be learned."""
    text = np.tile(np.arange(7, 27, dtype=np.int32), 30)
    chats = np.tile(np.arange(40, 40 + LENGTH, dtype=np.int32), (4, 1))
    return TrainingData(jnp.asarray(text), jnp.asarray(chats), jnp.ones((4, LENGTH), bool))


def parameters(seed: int = 0):
    get = random_parameters(MODEL, seed, jnp.float32)
    return {name: get(name) for name in parameter_specs(MODEL)}


def steps(state, count: int, config: TrainingConfig = CONFIG, quantize: bool = False):
    return train_steps(
        state, make_data(), model_config=MODEL, config=config, count=count, quantize=quantize
    )


@pytest.fixture(scope="module")
def trained():
    """The state and the losses of a whole run."""
    with jax.numpy_dtype_promotion("standard"):
        return steps(initial_state(parameters(), CONFIG), CONFIG.steps)


def test_the_loss_falls(trained):
    _, losses = trained
    values = losses["loss"]
    assert abs(float(values[0]) - np.log(MODEL.vocab_size)) < 0.5
    assert float(values[-5:].mean()) < 0.5 * float(values[0])


@pytest.mark.slow
def test_the_state_alone_decides_what_follows(trained):
    whole, _ = trained
    half, _ = steps(initial_state(parameters(), CONFIG), CONFIG.steps // 2)
    rest, _ = steps(half, CONFIG.steps // 2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("quantize", [False, True])
def test_the_loss_is_the_float64_cross_entropy_of_scored_tokens(quantize):
    values = parameters()
    rows, scored = sample_batch(make_data(), CONFIG, jax.random.key(3))
    scored = scored.at[:, ::3].set(False)
    _, parts = jitted_loss(values, rows, scored, jax.random.key(0), MODEL, CONFIG, quantize)
    tensors = {n: np.asarray(v.array, np.float64) for n, v in decoded(values, quantize).items()}
    terms = []
    for row, mask in zip(np.asarray(rows), np.asarray(scored), strict=True):
        logits = oracle.logits(tensors, tiny.config(NAME), row[:-1])
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(LENGTH - 1), row[1:]]
        terms.append(losses[mask[1:]])
    np.testing.assert_allclose(parts["loss"], np.concatenate(terms).mean(), rtol=1e-5)


def decoded(values, quantize: bool):
    """The parameters, the experts' weights rounded to MXFP4 and decoded again."""
    packed = train.pack(values) if quantize else {}
    return {
        name: packed[name].dequantize(jnp.float32)
        if isinstance(packed.get(name), BlockScaled)
        else value
        for name, value in values.items()
    }


def test_dropout_differs_by_key_and_keeps_the_mean():
    values = parameters()
    rows, scored = sample_batch(make_data(), CONFIG, jax.random.key(3))
    config = TrainingConfig(**{**CONFIG.__dict__, "dropout": 0.3})

    def loss_of(key: int, config: TrainingConfig) -> float:
        return float(
            jitted_loss(values, rows, scored, jax.random.key(key), MODEL, config, False)[1]["loss"]
        )

    found = [loss_of(key, config) for key in (0, 1)]
    plain = loss_of(0, CONFIG)
    assert found[0] != found[1]
    np.testing.assert_allclose(found, plain, rtol=0.1)


def test_bits_per_byte_against_float64():
    values = parameters()
    model = build(values, MODEL, "dense", quantize=False)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, 50).astype(np.int32)
    found = evaluate(model, tokens, 123, length=16, stride=10, batch=3)
    assert found.rerouted == found.dropped == 0
    tensors = {n: np.asarray(v.array, np.float64) for n, v in values.items()}
    total = 0.0
    for target in range(1, 50):
        # the first window that scores it
        start = 0 if target < 16 else 10 * -(-(target - 15) // 10)
        window = tokens[start : target + 1]
        last = oracle.logits(tensors, tiny.config(NAME), window[:-1])[-1]
        total += np.log(np.exp(last).sum()) - last[window[-1]]
    np.testing.assert_allclose(found.bits_per_byte, total / np.log(2) / 123, rtol=1e-6)


def test_padding_takes_no_room_in_a_fixed_budget():
    """One window alone, and the same window in a batch that is filled up with padding."""
    model = GptOss(
        MODEL, parameters().__getitem__, dtype=jnp.float32, algorithm="fixed_budget",
        tokens_per_expert_ratio=0.5, overflow="drop",
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, 64).astype(np.int32)
    windows, real, scored = _windows(tokens, [0], 64, 32, 1)
    wide = [np.concatenate([array, np.zeros_like(array)]) for array in (windows, real, scored)]
    report = report_of(model, tag(jnp.asarray(windows), "b", "s"))
    assert int(report.dropped) > 0
    mask = tag(jnp.asarray(wide[1]), "b", "s")
    padded = report_of(model, tag(jnp.asarray(wide[0]), "b", "s"), mask)
    # twice the rows are twice the budget, and padding uses none of it
    assert int(padded.assigned) + int(padded.dropped) == int(report.assigned) + int(report.dropped)
    assert int(padded.dropped) <= int(report.dropped)


@pytest.mark.parametrize("length, stride", [(16, 0), (16, 16), (50, 10)])
def test_bits_per_byte_refuses_windows_that_do_not_fit(length, stride):
    model = build(parameters(), MODEL, "dense", quantize=False)
    with pytest.raises(ValueError, match="expected 0 < stride < length < number of tokens"):
        evaluate(model, np.zeros(50, np.int32), 1, length=length, stride=stride)


@pytest.fixture
def folder(tmp_path):
    """Prepared data for the tiny model."""
    data = make_data()
    np.save(tmp_path / "train.npy", np.asarray(data.text, np.uint16))
    np.save(tmp_path / "heldout.npy", np.asarray(data.text[:60], np.uint16))
    rows = np.asarray(data.chats, np.uint16)
    np.savez(tmp_path / "chats.npz", ids=rows, mask=np.ones(rows.shape, np.uint8))
    meta = {"control_tokens": {"<|startoftext|>": 1}, "heldout": {"bytes": 100}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    for name in train.TOKENIZER_FILES:
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.slow
def test_the_script_trains_resumes_and_writes(folder, monkeypatch, capsys):
    monkeypatch.setattr(train, "nano_config", lambda control_tokens: MODEL)
    flags = ["--data", str(folder), "--text-rows", "3", "--chat-rows", "2", "--warmup", "5"]
    flags += ["--length", str(LENGTH), "--log-every", "3", "--save-every", "3", "--steps", "6"]
    train.main([*flags, "--out", str(folder / "whole")])
    log = capsys.readouterr().out
    assert "held-out bits per byte" in log and "step      6" in log
    report = json.loads((folder / "whole" / "training.json").read_text())
    assert 0 < report["bits_per_byte"]["mxfp4"] < 20
    assert report["training"]["steps"] == 6
    model = load_model(folder / "whole", dtype=jnp.float32, progress=False)
    assert np.isfinite(model(tag(jnp.ones((1, 20), jnp.int32), "b", "s")).array).all()

    monkeypatch.setattr(train, "train_steps", interrupted(train.train_steps, after=1))
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--out", str(folder / "parts")])
    monkeypatch.undo()
    monkeypatch.setattr(train, "nano_config", lambda control_tokens: MODEL)
    train.main([*flags, "--out", str(folder / "parts")])
    assert "resumed at step" in capsys.readouterr().out
    whole, parts = (folder / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def interrupted(function, after: int):
    """`function`, with Ctrl-C at a later call."""
    calls = itertools.count()

    def call(*args, **options):
        if next(calls) == after:
            raise KeyboardInterrupt
        return function(*args, **options)

    return call


def test_a_state_of_another_model_is_refused(folder):
    state = initial_state(parameters(), CONFIG)
    path = folder / "state.msgpack"
    train._save(state, path)
    restored = train._restore(state, path.read_bytes())
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    other = GptOssConfig.from_dict(tiny.config("tight_clamp"))
    get = random_parameters(other, 0, jnp.float32)
    like = initial_state({name: get(name) for name in parameter_specs(other)}, CONFIG)
    with pytest.raises(ValueError, match="of another model; choose another --out"):
        train._restore(like, path.read_bytes())


def test_chats_of_another_length_are_refused(folder):
    with pytest.raises(ValueError, match=f"expected chats of 99 tokens a row, got {LENGTH}"):
        load_data(folder, 99)
