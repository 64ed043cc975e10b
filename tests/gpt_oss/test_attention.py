"""Masks as literal matrices; attention against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_oss import attention
from gpt_oss.attention import EMPTY, attend, attend_causally, visible
from moe_jax import Tagged, tag

causally = jax.jit(attend_causally, static_argnums=4)
"""As one program: to compile it costs less than to compile each operation."""


def positions(rows: list[list[int]], axis: str) -> Tagged:
    return tag(jnp.asarray(rows, jnp.int32), "b", axis)


def mask(q: list[int], k: list[int], window: int | None) -> list[list[int]]:
    return visible(positions([q], "q"), positions([k], "k"), window).array[0].astype(int).tolist()


def test_causal_mask() -> None:
    assert mask([0, 1, 2, 3], [0, 1, 2, 3], None) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_sliding_mask() -> None:
    """A window of 2 is the query's own key and the one before."""
    assert mask([0, 1, 2, 3], [0, 1, 2, 3], 2) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_ring_mask() -> None:
    """A ring of 3 that has seen 4 tokens, then the chunk 4, 5 and an empty slot."""
    assert mask([4, 5], [3, 1, 2, 4, 5, EMPTY], 3) == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0]]


def test_rows_have_their_own_positions() -> None:
    q, k = positions([[0, 1], [2, 3]], "q"), positions([[0, 1, 2, 3]] * 2, "k")
    assert visible(q, k, None).array.astype(int).tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


SHAPE = {"b": 2, "q": 5, "k": 7, "kv": 2, "group": 3, "hd": 4}


def arrays(rng: np.random.Generator, q: int, k: int) -> tuple[np.ndarray, ...]:
    b, kv, group, hd = (SHAPE[n] for n in ("b", "kv", "group", "hd"))
    return (
        rng.standard_normal((b, q, kv * group, hd)),
        rng.standard_normal((b, kv, k, hd)),
        rng.standard_normal((b, kv, k, hd)),
        rng.standard_normal(kv * group),
    )


def tagged(q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: np.ndarray, dtype=jnp.float32):
    return (
        tag(jnp.asarray(q, dtype), "b", "q", "h", "hd"),
        tag(jnp.asarray(k, dtype), "b", "kv", "k", "hd"),
        tag(jnp.asarray(v, dtype), "b", "kv", "k", "hd"),
        tag(jnp.asarray(sinks, dtype), "h"),
    )


def by_loops(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sinks: np.ndarray,
    q_at: np.ndarray,
    k_at: np.ndarray,
    window: int | None,
) -> np.ndarray:
    """One query, one head, one key at a time."""
    out, group = np.zeros_like(q), q.shape[2] // k.shape[1]
    for b, i, h in np.ndindex(q.shape[:3]):
        weights, total = {}, np.exp(sinks[h])
        for j, at in enumerate(k_at[b]):
            near = window is None or at > q_at[b, i] - window
            if at != EMPTY and at <= q_at[b, i] and near:
                weights[j] = np.exp(q[b, i, h] @ k[b, h // group, j] / np.sqrt(q.shape[-1]))
                total += weights[j]
        for j, weight in weights.items():
            out[b, i, h] += weight / total * v[b, h // group, j]
    return out


K_AT = np.asarray([[6, 0, 1, EMPTY, 3, 4, 5], [EMPTY, EMPTY, 2, 3, 5, 4, 1]])
Q_AT = np.asarray([[2, 3, 4, 5, 6], [0, 1, 2, 3, 9]])


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_attend(window: int | None, rng: np.random.Generator) -> None:
    parts = arrays(rng, SHAPE["q"], SHAPE["k"])
    expected = by_loops(*parts, Q_AT, K_AT, window)
    at = positions(Q_AT.tolist(), "q"), positions(K_AT.tolist(), "k")
    out = attend(*tagged(*parts), *at, window)
    assert out.axes == ("b", "q", "h", "hd")
    np.testing.assert_allclose(out.array, expected, rtol=0, atol=2e-6)
    assert (expected[1, 0] == 0).all(), "a query that sees no key"


@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_of_queries_change_nothing(
    block: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tagged(*arrays(rng, SHAPE["q"], SHAPE["k"]))
    at = positions(Q_AT.tolist(), "q"), positions(K_AT.tolist(), "k")
    expected = attend(*parts, *at, 4)
    heads = SHAPE["kv"] * SHAPE["group"]
    monkeypatch.setattr(attention, "SCORE_BUDGET", block * SHAPE["b"] * heads * SHAPE["k"])
    np.testing.assert_allclose(attend(*parts, *at, 4).array, expected.array, rtol=0, atol=1e-6)


def test_scores_of_long_prompts_are_not_held_at_once() -> None:
    """The memory of attention over 8,192 tokens is far below that of all its scores."""
    length, heads, hd = 8192, 4, 8
    q = tag(jax.ShapeDtypeStruct((1, length, heads, hd), jnp.float32), "b", "q", "h", "hd")
    k = tag(jax.ShapeDtypeStruct((1, 2, length, hd), jnp.float32), "b", "kv", "k", "hd")
    sinks = tag(jax.ShapeDtypeStruct((heads,), jnp.float32), "h")

    def temporary(window: int | None) -> int:
        def function(q: Tagged, k: Tagged, v: Tagged, sinks: Tagged) -> Tagged:
            return attend_causally(q, k, v, sinks, window)

        analysis = jax.jit(function).lower(q, k, k, sinks).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    scores = 4 * heads * length**2
    assert temporary(128) < scores / 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORE_BUDGET", 2**22)
        assert temporary(None) < scores / 8


@pytest.mark.parametrize("window", [None, 1, 3, 4])
@pytest.mark.parametrize("length", [1, 5, 6, 8, 9, 13])
def test_attend_causally(window: int | None, length: int, rng: np.random.Generator) -> None:
    parts = arrays(rng, length, length)
    at = np.tile(np.arange(length), (SHAPE["b"], 1))
    out = causally(*tagged(*parts), window)
    expected = by_loops(*parts, at, at, window)
    np.testing.assert_allclose(out.array, expected, rtol=0, atol=2e-6)


def test_a_large_sink_takes_all_attention_and_a_small_one_none(rng: np.random.Generator) -> None:
    q, k, v, sinks = arrays(rng, 3, 3)
    most = causally(*tagged(q, k, v, np.full_like(sinks, 1e4)), None)
    np.testing.assert_array_equal(most.array, np.zeros_like(q))
    least = causally(*tagged(q, k, v, np.full_like(sinks, -1e4)), None)
    group = SHAPE["group"]
    np.testing.assert_allclose(
        least.array[:, 0], np.repeat(v[:, :, 0], group, axis=1), rtol=0, atol=1e-6
    )


def test_large_scores_stay_finite(rng: np.random.Generator) -> None:
    q, k, v, sinks = arrays(rng, 3, 3)
    out = causally(*tagged(1e4 * q, 1e4 * k, v, sinks), None)
    assert np.isfinite(out.array).all()


def test_bfloat16_in_bfloat16_out(rng: np.random.Generator) -> None:
    parts = arrays(rng, 6, 6)
    out = causally(*tagged(*parts, dtype=jnp.bfloat16), 2)
    assert out.dtype == jnp.bfloat16
    at = np.tile(np.arange(6), (2, 1))
    expected = by_loops(*parts, at, at, 2)
    np.testing.assert_allclose(out.array.astype(jnp.float32), expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("window", [None, 2])
def test_gradients(window: int | None, rng: np.random.Generator) -> None:
    """Directional derivatives against central differences in float64."""
    parts, moves = arrays(rng, 6, 6), arrays(rng, 6, 6)
    at = np.tile(np.arange(6), (2, 1))

    def value(step: float) -> float:
        moved = [part + step * move for part, move in zip(parts, moves, strict=True)]
        return float((by_loops(*moved, at, at, window) ** 2).sum())

    def total(*args: Tagged) -> jax.Array:
        return (causally(*args, window).array ** 2).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(*tagged(*parts))
    found = sum(float((g.array * m).sum()) for g, m in zip(gradients, moves, strict=True))
    assert found == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-4)
