"""Routing, sorting and combining of pairs in XLA: the definition of `api`."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.dtypes import accumulator
from moe_jax.kernels.dispatch.pairs import RoutedPairs, SortedPairs
from moe_jax.routing import route
from moe_jax.tagged import Tagged


def route_pairs(
    logits: jax.Array, token_mask: jax.Array | None = None, *, experts_per_token: int
) -> RoutedPairs:
    """See `api`."""
    mask = None if token_mask is None else Tagged(token_mask, ("s",))
    routing = route(Tagged(logits, ("s", "expert")), experts_per_token, token_mask=mask)
    ids = routing.ids.untag("s", "top_expert").astype(jnp.int32)
    # the softmax over an infinite logit is NaN, for barred experts too
    weight = jnp.where(ids < logits.shape[1], routing.weights.untag("s", "top_expert"), 0)
    return RoutedPairs(ids, weight.reshape(-1), *sort_pairs(ids, num_experts=logits.shape[1]))


def sort_pairs(ids: jax.Array, *, num_experts: int) -> SortedPairs:
    """See `api`."""
    flat = ids.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return SortedPairs(order, jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop"))


def combine_pairs(y: jax.Array, ids: jax.Array, *, num_experts: int, dtype: Any) -> jax.Array:
    """See `api`."""
    splits = y.shape[0] // max(1, ids.size)
    rows = y.astype(accumulator(y.dtype)).reshape(*ids.shape, splits, y.shape[1])
    valid = (ids >= 0) & (ids < num_experts)
    return jnp.where(valid[:, :, None, None], rows, 0).sum((1, 2)).astype(dtype)
