"""The kernels that route, sort and combine pairs, interpreted; test_dispatch_kernels.py runs it."""

import dispatch_oracle as oracle
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_tools import interpreted_call

from moe_jax.kernels.dispatch import launch

# NumPy warns where the kernels compute infinities and NaN that they then do not use
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_call", interpreted_call)
        yield


def check_sorted(result, ids, num_experts):
    order, sizes = oracle.sort_pairs(ids, num_experts)
    np.testing.assert_array_equal(result.order, order)
    np.testing.assert_array_equal(result.group_sizes, sizes)
    assert result.order.dtype == result.group_sizes.dtype == np.int32


def check_routed(logits, k, token_mask=None):
    result = launch.route_pairs(logits, token_mask, experts_per_token=k)
    num_tokens, num_experts = logits.shape
    ids, weights = oracle.route(logits, k, token_mask)
    found = np.asarray(result.ids)
    unknown = np.isnan(weights).all(1)
    known = ~np.isnan(logits.astype(np.float32)).any(1)
    np.testing.assert_array_equal(found[known], ids[known])
    for row in found[unknown & ~known]:
        assert len(set(row)) == k and (row >= 0).all() and (row < num_experts).all()
    np.testing.assert_allclose(
        np.asarray(result.pair_weight).reshape(num_tokens, k), weights, rtol=1e-5, atol=1e-7
    )
    check_sorted(result, found, num_experts)


SIZES = [
    (0, 5, 2),
    (1, 32, 4),
    (1, 1, 1),
    (5, 7, 3),
    (17, 33, 8),
    (128, 32, 4),
    (129, 32, 4),  # the smallest number of tokens that takes two launches
    (300, 20, 3),  # the last chunk is not full
    (70, 130, 5),
    (40, 256, 8),
]


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SIZES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_routes(num_tokens, num_experts, k, dtype, rng):
    check_routed(rng.normal(size=(num_tokens, num_experts)).astype(dtype), k)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"), [(5, 8, 3), (128, 32, 4), (300, 20, 4)]
)
@pytest.mark.parametrize("devices", [2, 4])
def test_routes_to_the_experts_of_a_device(num_tokens, num_experts, k, devices, rng):
    logits = rng.normal(size=(num_tokens, num_experts)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.4] = -np.inf
    mask = rng.random(num_tokens) < 0.9
    ids, weights = oracle.route(logits, k, mask)
    count = num_experts // devices
    for first in range(0, num_experts, count):
        pairs, _ = launch.route_and_clear(
            logits,
            mask,
            experts_per_token=k,
            first_expert=np.array(first, np.int32),
            num_experts=count,
        )
        own = (ids >= first) & (ids < first + count)
        np.testing.assert_array_equal(pairs.ids, np.where(own, ids - first, count))
        np.testing.assert_allclose(
            np.asarray(pairs.pair_weight).reshape(ids.shape), np.where(own, weights, 0), rtol=1e-5
        )
        check_sorted(pairs, np.asarray(pairs.ids), count)


@pytest.mark.parametrize(("num_tokens", "num_counters"), [(0, 1), (3, 40), (3, 2100), (300, 40)])
def test_counters_are_cleared(num_tokens, num_counters, rng):
    logits = rng.normal(size=(num_tokens, 20)).astype(np.float32)
    pairs, counters = launch.route_and_clear(logits, experts_per_token=3, num_counters=num_counters)
    np.testing.assert_array_equal(counters, np.zeros(num_counters, np.int32))
    check_sorted(pairs, np.asarray(pairs.ids), 20)
    pairs, counters = launch.sort_and_clear(
        np.asarray(pairs.ids), num_experts=20, num_counters=num_counters
    )
    np.testing.assert_array_equal(counters, np.zeros(num_counters, np.int32))


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SIZES)
def test_routes_with_ties_bars_nan_and_mask(num_tokens, num_experts, k, rng):
    logits = rng.integers(-2, 3, (num_tokens, num_experts)).astype(np.float32)
    logits[logits == 0] *= rng.choice([-1, 1], int((logits == 0).sum()))
    logits[rng.random(logits.shape) < 0.5] = -np.inf
    logits[rng.random(logits.shape) < 1 / (4 * num_experts)] = np.nan
    logits[rng.random(logits.shape) < 1 / (4 * num_experts)] = -np.nan
    logits[rng.random(logits.shape) < 1 / (4 * num_experts)] = np.inf
    logits[rng.random(num_tokens) < 0.2] = -np.inf
    check_routed(logits, k, rng.random(num_tokens) < 0.7)


@pytest.mark.parametrize("num_tokens", [100, 600])
def test_routes_all_tokens_to_the_same_experts(num_tokens, rng):
    check_routed(np.tile(rng.normal(size=32).astype(np.float32), (num_tokens, 1)), 4)
    check_routed(np.zeros((num_tokens, 32), np.float32), 4)
    check_routed(np.full((num_tokens, 32), -np.inf, np.float32), 4)


def test_more_tiles_than_one_in_a_chunk(monkeypatch, rng):
    monkeypatch.setattr("moe_jax.kernels.dispatch.blocks._MOST_CHUNKS", 2)
    monkeypatch.setattr("moe_jax.kernels.dispatch.blocks._TILE", 256)
    logits = rng.normal(size=(200, 12)).astype(np.float32)
    check_routed(logits, 3, rng.random(200) < 0.8)
    ids = rng.integers(-1, 13, (200, 3), dtype=np.int32)
    check_sorted(launch.sort_pairs(ids, num_experts=12), ids, 12)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_routes_anything(num_tokens, num_experts, k, seed):
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, -np.inf, np.inf, np.nan, 1e38, -1e38, 1e-40], np.float32)
    logits = rng.normal(size=(num_tokens, num_experts)).astype(np.float32)
    odd = rng.random(logits.shape) < rng.random()
    logits[odd] = rng.choice(special, int(odd.sum()))
    mask = rng.random(num_tokens) < 0.8 if seed % 2 else None
    check_routed(logits, min(k, num_experts), mask)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_sorts_anything(num_tokens, num_experts, k, seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(-2, num_experts)
    ids = rng.integers(low, num_experts + 2, (num_tokens, k), dtype=np.int32)
    check_sorted(launch.sort_pairs(ids, num_experts=num_experts), ids, num_experts)


def test_sorts_ids_far_out_of_range(rng):
    ids = rng.choice(np.array([-(2**31), 2**31 - 1, -9, 3, 0], np.int32), (50, 4))
    check_sorted(launch.sort_pairs(ids, num_experts=5), ids, 5)


def test_sorts_one_expert_named_by_all(rng):
    ids = np.full((512, 8), 2, np.int32)
    check_sorted(launch.sort_pairs(ids, num_experts=3), ids, 3)
    check_sorted(launch.sort_pairs(ids[:127], num_experts=3), ids[:127], 3)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"), [(4096, 1, 16), (2048, 2, 32), (2000, 2, 40)]
)
def test_sorts_more_pairs_than_16_bits_count(num_tokens, num_experts, k):
    ids = np.zeros((num_tokens, k), np.int32)
    check_sorted(launch.sort_pairs(ids, num_experts=num_experts), ids, num_experts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "size", "k"), [(0, 8, 2), (1, 2880, 4), (5, 33, 3), (7, 1, 1)]
)
def test_combines(num_tokens, size, k, dtype, rng):
    ids = rng.integers(-2, 9, (num_tokens, k), dtype=np.int32)
    y = rng.normal(size=(num_tokens * k, size)).astype(dtype)
    y[((ids < 0) | (ids >= 7)).reshape(-1)] = np.nan
    # the interpreter does not round to bfloat16 as GPUs do
    wide = np.float64 if dtype == np.float64 else np.float32
    with jax.enable_x64(True):
        result = launch.combine_pairs(y, ids, num_experts=7, dtype=wide)
    assert result.dtype == wide
    np.testing.assert_allclose(
        result, oracle.combine(y, ids, 7), rtol=1e-14 if wide == np.float64 else 1e-5, atol=1e-6
    )


def test_combines_several_rows_a_pair(rng):
    ids = rng.integers(-2, 9, (5, 3), dtype=np.int32)
    y = rng.normal(size=(15, 2, 33)).astype(np.float32)
    result = launch.combine_pairs(y.reshape(30, 33), ids, num_experts=7, dtype=jax.numpy.float32)
    np.testing.assert_allclose(result, oracle.combine(y.sum(1), ids, 7), rtol=1e-5, atol=1e-5)
