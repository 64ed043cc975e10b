"""Attention: the definition and the kernel, interpreted, against float64; what it refuses; what the
kernel compiles to."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import EMPTY, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_tools import CAPABILITIES, MISSING, compiled, run_interpreted

from moe_jax import Tagged, tag
from moe_jax.kernels.attention import attend, launch, reference, visible
from moe_jax.kernels.attention.blocks import block_ranges, choose_blocks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=MISSING)


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


Q_AT = np.asarray([[2, 3, 4, 5, 6], [0, 1, 2, 3, 9]])
K_AT = np.asarray([[6, 0, 1, EMPTY, 3, 4, 5], [EMPTY, EMPTY, 2, 3, 5, 4, 1]])


def any_order(rng: np.random.Generator, window: int | None) -> Case:
    return Case.random(rng, Q_AT, K_AT, kv=2, group=3, head_dim=4, window=window)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_values(window: int | None, rng: np.random.Generator) -> None:
    case = any_order(rng, window)
    out = attend(*case.tagged(), window=window)
    assert out.axes == ("b", "q", "h", "hd")
    np.testing.assert_allclose(out.array, case.expected(), rtol=0, atol=2e-6)
    assert (case.expected()[1, 0] == 0).all(), "a query that sees no key"


@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_of_queries_change_nothing(
    block: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = any_order(rng, 4)
    monkeypatch.setattr(reference, "SCORE_BUDGET", block * Q_AT.shape[0] * 6 * K_AT.shape[1])
    out = attend(*case.tagged(), window=4)
    np.testing.assert_allclose(out.array, case.expected(), rtol=0, atol=2e-6)


def test_axes_in_another_order(rng: np.random.Generator) -> None:
    q, k, *rest = any_order(rng, 3).tagged()
    out = attend(q.order("h", "q", "b", "hd"), k.order("k", "hd", "b", "kv"), *rest, window=3)
    assert out.axes == ("h", "q", "b", "hd")
    expected = any_order(np.random.default_rng(0), 3).expected()
    assert out.order("b", "q", "h", "hd").array.shape == expected.shape
    np.testing.assert_array_equal(
        out.order("b", "q", "h", "hd").array, attend(q, k, *rest, window=3).array
    )


@pytest.mark.parametrize("window", [None, 2])
def test_gradients(window: int | None, rng: np.random.Generator) -> None:
    """Directional derivatives against central differences in float64."""
    case, move = any_order(rng, window), any_order(rng, window)

    def value(step: float) -> float:
        moved = [
            x + step * y if x.dtype.kind == "f" else x
            for x, y in zip(
                (a.astype(np.float64) if a.dtype.kind == "f" else a for a in case.arrays),
                move.arrays,
                strict=True,
            )
        ]
        return float((Case(*moved, window).expected() ** 2).sum())

    def total(*floats: Tagged) -> jax.Array:
        return (attend(*floats, *case.tagged()[4:], window=window).array ** 2).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*case.tagged()[:4])
    found = sum(float((g.array * m).sum()) for g, m in zip(gradients, move.arrays[:4], strict=True))
    assert found == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-4)


def changed(**operands) -> dict:
    names = "queries", "keys", "values", "sinks", "q_positions", "k_positions"
    case = any_order(np.random.default_rng(0), None)
    return {**dict(zip(names, case.tagged(), strict=True)), **operands}


REFUSED = [
    ({"queries": tag(jnp.zeros((2, 5, 6)), "b", "q", "h")}, ValueError, "queries must have the"),
    ({"sinks": tag(jnp.zeros(5), "h")}, ValueError, "'h' has different sizes in queries, 6, and"),
    ({"keys": tag(jnp.zeros((2, 2, 8, 4)), "b", "kv", "k", "hd")}, ValueError, "'k' has different"),
    ({"k_positions": tag(jnp.zeros((2, 7)), "b", "k")}, TypeError, "must be integer, got float32"),
    ({"sinks": tag(jnp.zeros(6, jnp.int32), "h")}, TypeError, "sinks must be floating, got int32"),
    (
        {"values": tag(jnp.zeros((2, 2, 7, 4), jnp.bfloat16), "b", "kv", "k", "hd")},
        TypeError,
        "must have one dtype",
    ),
    ({"window": 0}, ValueError, "window must be at least 1, or None, got 0"),
    ({"implementation": "cudnn"}, ValueError, "implementation must be"),
    ({"implementation": "triton"}, TypeError, "takes bfloat16 and float16, got float32"),
]


@pytest.mark.parametrize(("operands", "error", "message"), REFUSED)
def test_refusals(operands: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(**changed(**operands))


def test_heads_that_do_not_divide() -> None:
    odd = {
        "queries": tag(jnp.zeros((2, 5, 5, 4)), "b", "q", "h", "hd"),
        "sinks": tag(jnp.zeros(5), "h"),
    }
    with pytest.raises(ValueError, match="must be a multiple of the key heads, got 5, 2"):
        attend(**changed(**odd))


def test_heads_too_large_for_the_kernel() -> None:
    wide = {
        "queries": tag(jnp.zeros((2, 5, 6, 136), jnp.bfloat16), "b", "q", "h", "hd"),
        "keys": tag(jnp.zeros((2, 2, 7, 136), jnp.bfloat16), "b", "kv", "k", "hd"),
        "values": tag(jnp.zeros((2, 2, 7, 136), jnp.bfloat16), "b", "kv", "k", "hd"),
    }
    with pytest.raises(ValueError, match="at most 128 features, got 136"):
        attend(**changed(**wide), implementation="triton")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_ranges_hold_all_keys_that_are_seen(data) -> None:
    """Whatever the positions; and between the first two numbers every query sees every key."""
    batch, queries, keys = data.draw(st.sampled_from([(3, 1, 200), (2, 40, 70), (1, 9, 129)]))
    window = data.draw(st.sampled_from([None, 1, 30, 80]))
    at = np.random.default_rng(data.draw(st.integers(0, 99)))
    in_order = data.draw(st.booleans())
    start = at.integers(0, 200, (batch, 1))
    q_at = start + np.arange(queries)
    k_at = np.where(np.arange(keys) < start + queries, np.arange(keys), EMPTY)
    if not in_order:
        k_at = at.permuted(k_at, axis=1)
    blocks = choose_blocks(batch, queries, keys, 6, 2, 16, window, 90)
    ranges = np.asarray(block_ranges(jnp.asarray(q_at), jnp.asarray(k_at), window, blocks))
    case = Case.random(at, q_at, k_at, kv=1, group=1, head_dim=1, window=window)
    seen = case.seen()
    for b, n in np.ndindex(ranges.shape[:2]):
        first, clear_end, last = ranges[b, n]
        assert 0 <= first <= clear_end <= last <= -(-keys // blocks.keys)
        rows = seen[b, n * blocks.queries : (n + 1) * blocks.queries]
        found = np.flatnonzero(rows.any(0)) // blocks.keys
        assert all(first <= block < last for block in found)
        clear = slice(first * blocks.keys, clear_end * blocks.keys)
        assert clear.stop <= keys and rows[:, clear].all()


def test_a_prompt_in_order_has_masks_at_its_end_only() -> None:
    at = jnp.arange(1024)[None]
    blocks = choose_blocks(1, 1024, 1024, 64, 8, 64, None, 90)
    first, clear_end, last = np.asarray(block_ranges(at, at, None, blocks))[0].T
    assert (first == 0).all() and (last - clear_end == 1).all()


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "splits"),
    [(1, 1, 1056, 8), (1, 1, 65536, 64), (8, 1, 1056, 8), (256, 1, 1056, 1), (1, 8192, 8192, 1)],
)
def test_keys_of_few_rows_are_split(batch: int, queries: int, keys: int, splits: int) -> None:
    assert choose_blocks(batch, queries, keys, 64, 8, 64, None, 90).splits == splits


@needs_triton
@pytest.mark.slow
def test_interpreted() -> None:
    run_interpreted("interpreted_attention.py")


def compile_call(monkeypatch, capability, queries, keys, window, heads=(64, 8, 64)):
    """What the kernel behind a call of so many queries and keys compiles to, and its name."""
    found = {}
    types = {"int32": "i32", "float32": "fp32", "bfloat16": "bf16"}

    def call(kernel, *inputs, out_type, grid, num_warps, num_stages, **constants):
        del grid
        values = [*inputs, *jax.tree.leaves(out_type)]
        kinds = {
            name: "i32" if isinstance(v, int) else f"*{types[str(v.dtype)]}"
            for name, v in zip(kernel.arg_names, values, strict=False)
        }
        found[kernel.fn.__name__] = compiled(
            kernel, kinds, constants, capability, num_warps=num_warps, num_stages=num_stages
        )
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out_type)

    monkeypatch.setattr(launch, "_call", call)
    monkeypatch.setattr(launch, "cuda_capability", lambda: capability)
    h, kv, hd = heads
    kv_like = jnp.zeros((1, kv, keys, hd), jnp.bfloat16)
    launch.attend(
        jnp.zeros((1, queries, h, hd), jnp.bfloat16),
        kv_like,
        kv_like,
        jnp.zeros(h, jnp.bfloat16),
        jnp.zeros((1, queries), jnp.int32),
        jnp.zeros((1, keys), jnp.int32),
        window=window,
    )
    [(name, code)] = found.items()
    return name, code


@needs_triton
@pytest.mark.compiles
@pytest.mark.parametrize(
    ("capability", "queries", "keys", "window", "name"),
    [
        *((capability, 512, 512, None, "attend_whole") for capability in CAPABILITIES),
        (90, 512, 640, 128, "attend_whole"),
        *((capability, 1, 1056, None, "attend_part") for capability in CAPABILITIES),
        (90, 1, 128, 128, "attend_whole"),
    ],
)
def test_compiles(monkeypatch, capability, queries, keys, window, name) -> None:
    found, code = compile_call(monkeypatch, capability, queries, keys, window)
    assert found == name and not code.spills
    assert "wgmma" in code.ptx or "mma.sync" in code.ptx or "tcgen05" in code.ptx
    if queries > 1 and capability == 90:
        assert "wgmma" in code.ptx
    assert "cp.async" in code.ptx


@needs_triton
@pytest.mark.compiles
@pytest.mark.parametrize("heads", [(8, 8, 128), (12, 2, 40)], ids=str)
def test_other_heads_compile(monkeypatch, heads) -> None:
    _, code = compile_call(monkeypatch, 90, 300, 300, None, heads)
    assert not code.spills
