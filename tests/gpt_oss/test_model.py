"""The model against NumPy float64 and transformers; with a cache against without."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
import tiny_model
from flax import nnx

from gpt_oss.initialization import random_parameters
from gpt_oss.model import GptOss, RMSNorm
from moe_jax import Tagged, tag

pytestmark = pytest.mark.usefixtures("little_compiling")

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))
TOLERANCE = 5e-5
"""Largest difference of logits (of up to 7) in float32."""

each_config = pytest.mark.parametrize("name", tiny.CONFIGS)


@jax.jit
def logits(model: GptOss, tokens: Tagged) -> jax.Array:
    return model(tokens).untag("b", "s", "voc")


@jax.jit
def step(model: GptOss, tokens: Tagged, cache, count: Tagged):
    out, cache = model.step(tokens, cache, count=count)
    return out.untag("b", "voc"), cache


def rows(name: str) -> dict[str, list[int]]:
    """Prompts below, at, above and far above the window; and one with 64 greedy tokens after it."""
    prompts = {label: ids for label, ids in tiny.prompts(name).items() if len(ids) < 1000}
    return prompts | {"greedy": prompts["below_window"] + GOLDENS[f"{name}/greedy"].tolist()}


@each_config
def test_logits(name: str) -> None:
    """All prompts in one batch: float64 NumPy, transformers, and 64 greedy tokens."""
    prompts = rows(name)
    found = np.asarray(logits(tiny_model.build(name), tiny_model.tokens(list(prompts.values()))))
    config, weights = tiny.config(name), tiny_model.weights(name)
    for row, (label, ids) in zip(found, prompts.items(), strict=True):
        expected = oracle.logits(weights, config, ids)
        np.testing.assert_allclose(row[: len(ids)], expected, rtol=0, atol=TOLERANCE)
        if label == "greedy":
            continue
        golden, at = (GOLDENS[f"{name}/{label}/{part}"] for part in ("logits", "positions"))
        np.testing.assert_allclose(row[at], golden, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(row[: len(ids)].argmax(-1), GOLDENS[f"{name}/{label}/argmax"])
    begin = len(prompts["below_window"]) - 1
    answer = found[-1][begin : begin + tiny.GREEDY_TOKENS].argmax(-1)
    assert answer.tolist() == GOLDENS[f"{name}/greedy"].tolist()


def test_packed_experts_compute_the_same() -> None:
    name = "tight_clamp"
    ids = tiny.prompts(name)["several_windows"]
    found = logits(tiny_model.build(name, packed=True), tiny_model.tokens([ids]))[0]
    expected = oracle.logits(tiny_model.weights(name), tiny.config(name), ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "chunks", [[35], [9, 26], [10, 9, 16], [11, 11, 11, 1, 1], [1] * 3 + [16, 16]]
)
def test_chunks_with_a_cache_equal_one_pass(chunks: list[int]) -> None:
    """Two rows of different length, padded on the right, in chunks that end at odd places."""
    name = "rope_truncated"
    model, ids = tiny_model.build(name), tiny.prompts(name)["several_windows"]
    prompts = [ids, ids[4:17]]
    cache, start, found = model.empty_cache(2, 40), 0, {}
    for size in chunks:
        pieces = [prompt[start : start + size] for prompt in prompts]
        tokens = tiny_model.tokens([piece + [0] * (size - len(piece)) for piece in pieces])
        count = tag(jnp.asarray([len(piece) for piece in pieces], jnp.int32), "b")
        out, cache = step(model, tokens, cache, count)
        found |= {row: out[row] for row, piece in enumerate(pieces) if piece}
        start += size
    assert cache.lengths.array.tolist() == [35, 13]
    for row, prompt in enumerate(prompts):
        expected = oracle.logits(tiny_model.weights(name), tiny.config(name), prompt)[-1]
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=TOLERANCE)


def test_positions_past_4096() -> None:
    """4,200 tokens at once, and as chunks with a cache."""
    name = "long_context"
    model, ids = tiny_model.build(name), tiny.prompts(name)["past_4096"]
    expected = oracle.logits(tiny_model.weights(name), tiny.config(name), ids)
    found = logits(model, tiny_model.tokens([ids]))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    cache, size = model.empty_cache(1, 4224), 600
    for start in range(0, len(ids), size):
        count = tag(jnp.asarray([size], jnp.int32), "b")
        out, cache = step(model, tiny_model.tokens([ids[start : start + size]]), cache, count)
        np.testing.assert_allclose(out[0], expected[start + size - 1], rtol=0, atol=TOLERANCE)


def test_reach_changes_nothing() -> None:
    name = "rope_truncated"
    model, ids = tiny_model.build(name), tiny.prompts(name)["several_windows"]
    tokens = tiny_model.tokens([ids])
    whole, _ = jax.jit(GptOss.step)(model, tokens, model.empty_cache(1, 64))
    near, _ = jax.jit(GptOss.step, static_argnames="reach")(
        model, tokens, model.empty_cache(1, 64), reach=40
    )
    np.testing.assert_allclose(near.array, whole.array, rtol=0, atol=1e-5)


def test_algorithms_agree() -> None:
    name = "one_expert_per_token"
    tokens = tiny_model.tokens([tiny.prompts(name)["several_windows"]])
    found = [
        logits(tiny_model.build(name, algorithm=algorithm), tokens)
        for algorithm in ("per_token", "dense", "grouped")
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found[2], found[0], rtol=0, atol=TOLERANCE)


def test_bfloat16_is_near() -> None:
    """Mean error, not the largest: rounding sends some tokens to other experts."""
    name = "all_experts_per_token"
    ids = tiny.prompts(name)["several_windows"]
    found = logits(tiny_model.build(name, dtype=jnp.bfloat16), tiny_model.tokens([ids]))[0]
    assert found.dtype == jnp.float32
    expected = oracle.logits(tiny_model.weights(name), tiny.config(name), ids)
    error = np.abs(found - expected)
    assert 1e-3 < error.mean() < 0.04
    assert (error**2).mean() / (expected**2).mean() < 2e-3


def test_statistics_and_gradients() -> None:
    """Every float parameter gets a gradient, and losses come with the same logits."""
    config = tiny_model.config("all_experts_per_token")
    model = GptOss(config, random_parameters(config, 0), dtype=jnp.float32)
    tokens = tiny_model.tokens([list(range(1, 24)), list(range(50, 73))])
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(parameters, rest):
        out, statistics = nnx.merge(graph, parameters, rest).with_statistics(tokens)
        balance = sum(s.load_balance for s in statistics)
        return (out.array**2).mean() + balance, (out.array, balance)

    gradients, (out, balance) = jax.jit(jax.grad(loss, has_aux=True))(parameters, rest)
    np.testing.assert_allclose(out, logits(model, tokens), rtol=0, atol=1e-5)
    assert balance > 0
    flat = jax.tree_util.tree_leaves_with_path(gradients)
    still = [jax.tree_util.keystr(path) for path, leaf in flat if not jnp.abs(leaf).max() > 0]
    assert still == []
    assert all(jnp.isfinite(leaf).all() for _, leaf in flat)


def test_norm() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    weight = np.arange(1.0, 6.0, dtype=np.float32)
    norm = RMSNorm(tag(jnp.asarray(weight), "d"), 1e-3)
    found = norm(tag(jnp.asarray(x), "s", "d"))
    np.testing.assert_allclose(found.array, oracle.rms_norm(x, weight, 1e-3), rtol=1e-6)
    assert norm(tag(jnp.asarray(x, jnp.bfloat16), "s", "d")).dtype == jnp.bfloat16


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got .*float16"):
        tiny_model.build("released_numbers", dtype=jnp.float16)


def test_swapped_axes_are_refused() -> None:
    config = tiny_model.config("released_numbers")
    parameters = random_parameters(config, 0)

    def swapped(name: str) -> Tagged:
        value = parameters(name)
        return Tagged(value.array.T, value.axes) if name.endswith("q_proj.weight") else value

    with pytest.raises(ValueError, match=r"layers\.0\..*q_proj\.weight: expected .* 'd': 64}, got"):
        GptOss(config, swapped)
