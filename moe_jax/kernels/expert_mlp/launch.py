"""The layer as a few kernels, on JAX arrays; see `api` for what they compute.

This is called while lowering for CUDA, and only then imports Triton.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels.dispatch import launch as dispatch
from moe_jax.kernels.dispatch.pairs import RoutedPairs, SortedPairs
from moe_jax.kernels.tiled_matmul import launch as matmul

_EXACT_PAIRS = 1024
"""Up to so many pairs, and where inputs are split, what experts return is summed from float32."""


def routed_layer(
    experts: Any, x: jax.Array, logits: jax.Array, token_mask: jax.Array | None, k: int
) -> jax.Array:
    """Experts (a `GptOssMLP`) on x [T, d], routed by logits [T, E] -> [T, d]."""
    return _layer(experts, x, dispatch.route_pairs(logits, token_mask, experts_per_token=k))


def layer(experts: Any, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Experts (a `GptOssMLP`) on x [T, d], with ids i32 and weights f32 [T, k] -> [T, d]."""
    if matmul.plan(ids.size, experts.gate_up, experts.down).sorted:
        pairs = dispatch.sort_pairs(ids, num_experts=experts.gate_up.size("expert"))
    else:
        pairs = SortedPairs(ids.reshape(-1), ids.reshape(-1))  # not read
    return _layer(experts, x, RoutedPairs(ids, weights.reshape(-1), *pairs))


def _layer(experts: Any, x: jax.Array, pairs: RoutedPairs) -> jax.Array:
    if not x.size or not pairs.ids.size:
        return jnp.zeros_like(x)
    weights = experts.gate_up, experts.down
    plan = matmul.plan(pairs.ids.size, *weights)
    exact = pairs.ids.size <= _EXACT_PAIRS or plan.down.splits > 1
    dtype = jnp.float32 if exact else x.dtype
    gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
    hidden = matmul.gate_up(x, experts.gate_up, gate_up_bias, experts.activation, pairs, plan)
    y = matmul.down(hidden, experts.down, down_bias, pairs, plan, dtype)
    num_experts = experts.gate_up.size("expert")
    return dispatch.combine_pairs(y, pairs.ids, num_experts=num_experts, dtype=x.dtype)
