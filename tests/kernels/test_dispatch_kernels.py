"""Routing, sorting and combining pairs: the definition, the kernels interpreted, and compiled."""

import importlib.util

import dispatch_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_tools import CAPABILITIES, MISSING, compiled, run_interpreted

from moe_jax.kernels.dispatch import combine_pairs, launch, route_pairs, sort_pairs
from moe_jax.kernels.dispatch.blocks import count_bits, sort_blocks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=MISSING)


@needs_triton
@pytest.mark.slow
def test_interpreted():
    run_interpreted("interpreted_dispatch.py")


TYPES = {"int32": "i32", "float32": "fp32", "bfloat16": "bf16", "bool": "i1"}


def compile_calls(monkeypatch, capability, function, *arguments, **static):
    """What the kernels behind a call compile to, by name."""
    found = {}

    def call(kernel, *inputs, out_type, grid, num_warps, **constants):
        del grid
        values = [*inputs, *jax.tree.leaves(out_type)]
        names = dict(zip(kernel.arg_names, values, strict=False))
        # jax-triton compiles in scalars that are 1
        constants |= {n: v for n, v in names.items() if isinstance(v, int) and v == 1}
        kinds = {
            n: "i32" if isinstance(v, int) else f"*{TYPES[str(v.dtype)]}"
            for n, v in names.items()
            if n not in constants
        }
        found[kernel.fn.__name__] = compiled(
            kernel, kinds, constants, capability, num_warps=num_warps
        )
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out_type)

    monkeypatch.setattr(launch, "_call", call)
    function(*arguments, **static)
    return found


@needs_triton
@pytest.mark.parametrize(
    ("capability", "num_tokens", "num_experts", "k", "dtype"),
    [
        (90, 1, 32, 4, "float32"),
        (90, 7, 1, 1, "float32"),
        (90, 16, 20, 3, "bfloat16"),
        (90, 32, 128, 4, "float32"),
        (90, 1000, 256, 8, "float32"),
        *((capability, 128, 32, 4, "float32") for capability in CAPABILITIES),
        *((capability, 8192, 32, 4, "bfloat16") for capability in CAPABILITIES),
    ],
)
@pytest.mark.compiles
def test_routing_compiles(monkeypatch, capability, num_tokens, num_experts, k, dtype):
    logits = jnp.zeros((num_tokens, num_experts), dtype)
    found = compile_calls(
        monkeypatch, capability, launch.route_pairs, logits, None, experts_per_token=k
    )
    launches = {"route_once"} if num_tokens <= 128 else {"route_chunk", "place_pairs"}
    assert found.keys() == launches
    assert not any(c.spills for c in found.values())


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 128, 8192])
@pytest.mark.compiles
def test_routing_to_the_experts_of_a_device_compiles(monkeypatch, num_tokens):
    found = compile_calls(
        monkeypatch,
        90,
        launch.route_and_clear,
        jnp.zeros((num_tokens, 32)),
        jnp.ones(num_tokens, bool),
        experts_per_token=4,
        first_expert=jnp.int32(8),
        num_experts=8,
        num_counters=40,
    )
    assert found and not any(c.spills for c in found.values())


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.compiles
def test_sorting_compiles(monkeypatch, capability):
    for num_tokens, num_experts, k in [(1, 32, 4), (128, 32, 4), (1000, 20, 3)]:
        ids = jnp.zeros((num_tokens, k), jnp.int32)
        found = compile_calls(
            monkeypatch, capability, launch.sort_pairs, ids, num_experts=num_experts
        )
        assert not any(c.spills for c in found.values())


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.compiles
def test_combining_reads_16_bytes_at_once(monkeypatch, capability, dtype):
    y, ids = jnp.zeros((20, 2880), dtype), jnp.zeros((5, 4), jnp.int32)
    found = compile_calls(
        monkeypatch, capability, launch.combine_pairs, y, ids, num_experts=32, dtype=jnp.bfloat16
    )["combine_pairs"]
    loads = [line for line in found.ptx.splitlines() if "ld.global" in line]
    assert sum(".v4.b32" in line for line in loads) == 4
    assert not found.spills


@needs_triton
@pytest.mark.parametrize(("num_tokens", "launches"), [(0, 0), (1, 1), (128, 1), (129, 2)])
def test_what_is_lowered(monkeypatch, num_tokens, launches):
    called = []

    def call(kernel, *_, out_type, **__):
        called.append(kernel.fn.__name__)
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out_type)

    def count(function, *arguments, platform="cuda"):
        called.clear()
        jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
        return len(called)

    monkeypatch.setattr(launch, "_call", call)
    logits, mask = jnp.zeros((num_tokens, 32)), jnp.ones(num_tokens, bool)
    ids, y = jnp.zeros((num_tokens, 4), jnp.int32), jnp.zeros((num_tokens * 4, 8))
    assert count(lambda x: route_pairs(x, 4), logits) == launches
    assert count(lambda x, m: route_pairs(x, 4, m), logits, mask) == launches
    assert count(lambda i: sort_pairs(i, 32), ids) == launches
    assert count(lambda i, y: combine_pairs(y, i, 32), ids, y) == min(1, num_tokens)
    assert count(lambda x: route_pairs(x, 4), logits, platform="cpu") == 0


@pytest.mark.parametrize("k", [1, 2, 16, 17, 32, 40, 255, 256, 4097, 65535])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 32, 5000])
def test_counts_of_a_tile_fit_their_bits(num_experts, k):
    """A token may name one expert k times, and all tokens the same."""
    for num_tokens in (1, 2, 15, 16, 2000, 2048, 4095, 4096, 4097, 10**6):
        blocks = sort_blocks(num_tokens, num_experts, k)
        assert blocks.tokens * k < 2 ** count_bits(blocks.tokens * k)
        assert blocks.tokens * blocks.tiles * blocks.chunks >= num_tokens
        if blocks.tokens < num_tokens and blocks.tokens * num_experts <= 1024:
            assert blocks.tokens * 2 * k > 65535  # no tile is smaller than it must be


def test_more_than_the_bits_of_counts_hold_is_refused():
    assert [count_bits(n) for n in (0, 255, 256, 65535)] == [8, 8, 16, 16]
    with pytest.raises(ValueError, match="16 bits, up to 65535, got 65536"):
        count_bits(65536)


def test_no_experts_per_token_launch_nothing(monkeypatch):
    def call(*_, **__):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch, "_call", call)
    ids, y = jnp.zeros((3, 0), jnp.int32), jnp.zeros((0, 8), jnp.bfloat16)
    order, sizes = launch.sort_pairs(ids, num_experts=5)
    assert order.shape == (0,)
    np.testing.assert_array_equal(sizes, np.zeros(5, np.int32))
    result = launch.combine_pairs(y, ids, num_experts=5, dtype=jnp.float32)
    np.testing.assert_array_equal(result, np.zeros((3, 8), np.float32))
    for found, expected in zip(sort_pairs(ids, 5), (order, sizes), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(combine_pairs(y, ids, 5, jnp.float32), result)


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(0, 5, 2), (1, 4, 4), (37, 11, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_definition_of_routing(num_tokens, num_experts, k, dtype, rng):
    logits = rng.integers(-2, 3, (num_tokens, num_experts)).astype(np.float32)
    logits[logits == 0] *= rng.choice([-1, 1], int((logits == 0).sum()))
    logits[rng.random(logits.shape) < 0.4] = -np.inf
    mask = rng.random(num_tokens) < 0.8
    result = route_pairs(jnp.asarray(logits, dtype), k, jnp.asarray(mask))
    ids, weights = oracle.route(logits, k, mask)
    np.testing.assert_array_equal(result.ids, ids)
    np.testing.assert_allclose(result.pair_weight, weights.reshape(-1), rtol=1e-5, atol=1e-7)
    order, sizes = oracle.sort_pairs(ids, num_experts)
    np.testing.assert_array_equal(result.order, order)
    np.testing.assert_array_equal(result.group_sizes, sizes)
    assert {a.dtype for a in result} == {jnp.dtype("int32"), jnp.dtype("float32")}


def test_definition_of_sorting(rng):
    ids = rng.integers(-3, 9, (23, 4), dtype=np.int32)
    result = jax.jit(lambda i: sort_pairs(i, 7))(ids)
    for found, expected in zip(result, oracle.sort_pairs(ids, 7), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_definition_of_combining(rng):
    ids = rng.integers(-1, 7, (5, 3), dtype=np.int32)
    y = rng.normal(size=(15, 6)).astype(np.float32)
    y[((ids < 0) | (ids >= 6)).reshape(-1)] = np.nan
    expected = oracle.combine(y, ids, 6)
    np.testing.assert_allclose(combine_pairs(jnp.asarray(y), jnp.asarray(ids), 6), expected, 1e-5)
    narrow = combine_pairs(jnp.asarray(y), jnp.asarray(ids), 6, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, rtol=2**-8)


def test_a_pair_may_have_several_rows(rng):
    ids = rng.integers(-1, 7, (5, 3), dtype=np.int32)
    y = rng.normal(size=(15, 4, 6)).astype(np.float32)
    result = combine_pairs(jnp.asarray(y.reshape(60, 6)), jnp.asarray(ids), 6)
    np.testing.assert_allclose(result, oracle.combine(y.sum(1), ids, 6), rtol=1e-5, atol=1e-5)


def test_small_terms_are_not_lost_in_bfloat16():
    y = jnp.asarray([[256.0], [1.0], [1.0], [-256.0]], jnp.bfloat16)
    result = combine_pairs(y, jnp.zeros((1, 4), jnp.int32), 1)
    np.testing.assert_array_equal(result.astype(jnp.float32), [[2.0]])


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda: route_pairs(jnp.zeros(3), 1), ValueError, r"\[tokens, experts\]"),
        (lambda: route_pairs(jnp.zeros((3, 4), jnp.int32), 1), TypeError, "logits must be floats"),
        (lambda: route_pairs(jnp.zeros((3, 4)), 5), ValueError, "experts_per_token"),
        (
            lambda: route_pairs(jnp.zeros((3, 4)), 1, jnp.zeros(4, bool)),
            ValueError,
            "token_mask must have the shape",
        ),
        (
            lambda: route_pairs(jnp.zeros((3, 4)), 1, jnp.zeros(3)),
            TypeError,
            "token_mask must be bool",
        ),
        (lambda: sort_pairs(jnp.zeros(3, jnp.int32), 4), ValueError, r"\[tokens, experts_per"),
        (lambda: sort_pairs(jnp.zeros((3, 2)), 4), TypeError, "ids must be int32"),
        (
            lambda: combine_pairs(jnp.zeros((5, 8)), jnp.zeros((3, 2), jnp.int32), 4),
            ValueError,
            "with 6 pairs",
        ),
        (
            lambda: combine_pairs(jnp.zeros((6, 8), jnp.int32), jnp.zeros((3, 2), jnp.int32), 4),
            TypeError,
            "y must be floats",
        ),
    ],
)
def test_refuses(function, error, match):
    with pytest.raises(error, match=match):
        function()
