"""A sequence over itself, and heads and rows on several devices, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case, sequence
from tiny_mesh import sharding

from gpt_oss.attention import attend, attend_causally
from moe_jax import Tagged, tag
from moe_jax.kernels.attention import reference

causally = jax.jit(attend_causally, static_argnums=4)
"""As one program: to compile it costs less than to compile each operation."""


SHAPE = {"b": 2, "kv": 2, "group": 3, "hd": 4}


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


def expected(parts: tuple[np.ndarray, ...], window: int | None) -> np.ndarray:
    at = np.tile(np.arange(parts[0].shape[1]), (SHAPE["b"], 1))
    return Case(*parts, at, at, window).expected()


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
        patch.setattr(reference, "SCORE_BUDGET", 2**22)
        assert temporary(None) < scores / 8


@pytest.mark.parametrize("window", [None, 1, 3, 4])
@pytest.mark.parametrize("length", [1, 5, 6, 8, 9, 13])
def test_attend_causally(window: int | None, length: int, rng: np.random.Generator) -> None:
    parts = arrays(rng, length, length)
    out = causally(*tagged(*parts), window)
    np.testing.assert_allclose(out.array, expected(parts, window), rtol=0, atol=2e-6)


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
    wide = out.array.astype(jnp.float32)
    np.testing.assert_allclose(wide, expected(parts, 2), rtol=0, atol=0.06)


@pytest.mark.parametrize("window", [None, 2])
def test_gradients(window: int | None, rng: np.random.Generator) -> None:
    """Directional derivatives against central differences in float64."""
    parts, moves = arrays(rng, 6, 6), arrays(rng, 6, 6)

    def value(step: float) -> float:
        moved = [part + step * move for part, move in zip(parts, moves, strict=True)]
        return float((expected(tuple(moved), window) ** 2).sum())

    def total(*args: Tagged) -> jax.Array:
        return (causally(*args, window).array ** 2).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(*tagged(*parts))
    found = sum(float((g.array * m).sum()) for g, m in zip(gradients, moves, strict=True))
    assert found == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 2), (1, 1, 2), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_heads_and_rows_on_several_devices(
    sizes: tuple[int, int, int], window: int | None, rng: np.random.Generator
) -> None:
    """Four rows and two key/value heads, which nothing is sent for."""
    q_at, k_at = (np.repeat(at, 4, axis=0) for at in sequence(4, 2, 7))
    case = Case.random(rng, q_at, k_at, kv=2, group=3, head_dim=4, window=window)
    where = sharding(sizes)
    call = jax.jit(lambda *operands: attend(*operands, window, where).array)
    np.testing.assert_allclose(call(*case.tagged()), case.expected(), rtol=0, atol=2e-6)
    operands = [where.constrain(x) for x in case.tagged()]
    assert "all-" not in call.lower(*operands).compile().as_text()
