"""What the algorithms cost: operations, memory and time follow the experts that are chosen."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import random_mxfp4, weight

import moe_jax
from moe_jax import mixture_of_experts

HIDDEN, WIDE, K = 192, 256, 4


def float_experts(count: int) -> moe_jax.MLP:
    rng = np.random.default_rng(0)
    up = weight(rng.normal(size=(count, WIDE, HIDDEN)) * 0.1)
    down = weight(rng.normal(size=(count, HIDDEN, WIDE)) * 0.1)
    return moe_jax.MLP(up, down, activation=moe_jax.Activation("relu"))


def packed_experts(count: int) -> moe_jax.MLP:
    rng = np.random.default_rng(0)
    up, _ = random_mxfp4(rng, count, WIDE, HIDDEN // 32)
    down, _ = random_mxfp4(rng, count, HIDDEN, WIDE // 32)
    return moe_jax.MLP(up, down, activation=moe_jax.Activation("relu"))


KINDS = {"float32": float_experts, "mxfp4": packed_experts}


def compiled(experts, tokens: int, k: int = K, **options):
    count = next(iter(jax.tree.leaves(experts))).shape[0]
    call = functools.partial(mixture_of_experts, experts_per_token=k, **options)
    x, gating = jnp.ones((tokens, HIDDEN)), jnp.ones((tokens, count))
    return jax.jit(call).lower(experts, x, gating).compile(), (experts, x, gating)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_and_memory_of_one_token_follow_k_not_the_number_of_experts(kind):
    few, many, double = (
        compiled(KINDS[kind](count), 1, k)[0] for count, k in ((8, K), (64, K), (64, 2 * K))
    )
    flops = [c.cost_analysis()["flops"] for c in (few, many, double)]
    assert flops[1] <= 1.25 * flops[0]
    assert flops[2] >= 1.5 * flops[1]
    assert flops[0] >= 2 * K * 2 * HIDDEN * WIDE
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (few, many)]
    assert temporary[1] <= 1.25 * temporary[0] + 4096


def median_ratio(one, other, repeats: int) -> float:
    """The median over pairs of runs, one after the other, of time(other) / time(one)."""
    ratios = []
    for _ in range(repeats):
        times = []
        for call, arguments in (one, other):
            start = time.perf_counter()
            for _ in range(5):
                jax.block_until_ready(call(*arguments))
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


@pytest.mark.parametrize("kind", KINDS)
def test_time_of_one_token_follows_k_not_the_number_of_experts(kind):
    """The best of several attempts: what else the machine does only ever adds noise."""
    few, many = (compiled(KINDS[kind](count), 1) for count in (8, 64))
    for call, arguments in (few, many):
        jax.block_until_ready(call(*arguments))
    attempts = []
    while len(attempts) < 5 and min(attempts, default=2.0) >= 1.25:
        attempts.append(median_ratio(few, many, 15))
    assert min(attempts) < 1.25, attempts


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_holds_neither_all_experts_nor_every_token_with_every_expert(kind):
    """Temporary memory: rows in blocks and one decoded expert, not the weights of 64."""
    tokens, experts = 64, 64
    one_expert = HIDDEN * WIDE * 4
    grouped, _ = compiled(KINDS[kind](experts), tokens, 2, algorithm="grouped")
    assert grouped.memory_analysis().temp_size_in_bytes < experts * one_expert / 4
    dense, _ = compiled(KINDS[kind](experts), tokens, 2, algorithm="dense")
    assert dense.memory_analysis().temp_size_in_bytes > experts * tokens * WIDE * 4


def test_time_of_grouped_follows_the_pairs_not_the_number_of_experts():
    """At 64 tokens and two experts each: less than half the time of computing all pairs."""
    grouped, dense = (
        compiled(float_experts(64), 64, 2, algorithm=name) for name in ("grouped", "dense")
    )
    for call, arguments in (grouped, dense):
        jax.block_until_ready(call(*arguments))
    attempts = []
    while len(attempts) < 5 and max(attempts, default=0.0) <= 2:
        attempts.append(median_ratio(grouped, dense, 5))
    assert max(attempts) > 2, attempts
