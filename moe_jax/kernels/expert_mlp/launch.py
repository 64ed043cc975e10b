"""The layer as a few kernels, on JAX arrays; see `api` for what they compute.

This is called while lowering for CUDA, and only then imports Triton.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels.dispatch import launch as dispatch
from moe_jax.kernels.dispatch.pairs import RoutedPairs, SortedPairs
from moe_jax.kernels.tiled_matmul import launch as matmul
from moe_jax.kernels.tiled_matmul.configs import Plan

_EXACT_PAIRS = 1024
"""Up to so many pairs, and where inputs are split, what experts return is summed from float32."""


def routed_layer(
    experts: Any,
    x: jax.Array,
    logits: jax.Array,
    token_mask: jax.Array | None,
    first_expert: jax.Array | None,
    k: int,
) -> jax.Array:
    """Experts (a `GptOssMLP`) on x [T, d], routed by logits [T, all experts] -> [T, d]."""
    plan = matmul.plan(x.shape[0] * k, experts.gate_up, experts.down)
    pairs, counters = dispatch.route_and_clear(
        logits,
        token_mask,
        experts_per_token=k,
        first_expert=first_expert,
        num_experts=_count(experts),
        num_counters=matmul.num_counters(plan, x.shape[0] * k, _count(experts)),
    )
    return _layer(experts, x, pairs, counters, plan)


def layer(experts: Any, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Experts (a `GptOssMLP`) on x [T, d], with ids i32 and weights f32 [T, k] -> [T, d]."""
    plan, num_experts = matmul.plan(ids.size, experts.gate_up, experts.down), _count(experts)
    if plan.sorted:
        num_counters = matmul.num_counters(plan, ids.size, num_experts)
        pairs, counters = dispatch.sort_and_clear(
            ids, num_experts=num_experts, num_counters=num_counters
        )
    else:
        pairs, counters = SortedPairs(ids.reshape(-1), ids.reshape(-1)), ids  # not read
    return _layer(experts, x, RoutedPairs(ids, weights.reshape(-1), *pairs), counters, plan)


def _layer(
    experts: Any, x: jax.Array, pairs: RoutedPairs, counters: jax.Array, plan: Plan
) -> jax.Array:
    if not x.size or not pairs.ids.size:
        return jnp.zeros_like(x)
    exact = pairs.ids.size <= _EXACT_PAIRS or plan.down.splits > 1
    y = matmul.mlp(experts, x, pairs, counters, plan, jnp.float32 if exact else x.dtype)
    return dispatch.combine_pairs(y, pairs.ids, num_experts=_count(experts), dtype=x.dtype)


def _count(experts: Any) -> int:
    """The number of experts."""
    return experts.gate_up.size("expert")
