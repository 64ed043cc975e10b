"""Losses that keep a router in health, as functions of its logits.

References:
    Switch Transformer (load balance): https://arxiv.org/abs/2101.03961, equations 4-6
    ST-MoE (router z-loss): https://arxiv.org/abs/2202.08906, equation 5
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.routing import Routing
from moe_jax.tagged import Tagged


def load_balance_loss(
    logits: Tagged, routing: Routing, token_mask: Tagged | None = None
) -> jax.Array:
    """num_experts x sum over experts of (share of pairs) x (mean probability).

    It is 1 where tokens are spread evenly and grows to the number of experts where all go to one.

    Args:
        logits: {..., expert}.
        routing: ids {..., top_expert} that came from these logits.
        token_mask: bool {...}; tokens that are False do not count, nor do those whose logits are
            all -inf.

    Returns:
        A float32 scalar; 0 without tokens.
    """
    probabilities, mask = _rows(logits, jax.nn.softmax, token_mask)
    num_experts = probabilities.shape[-1]
    rest = tuple(n for n in logits.axes if n != "expert")
    ids = routing.ids.untag(*rest, "top_expert")
    ids = ids.reshape(mask.shape[0], ids.shape[-1])
    chosen = jax.nn.one_hot(ids, num_experts, dtype=jnp.bool_) & mask[:, None, None]
    pairs = jnp.maximum(1, chosen.sum())
    tokens = jnp.maximum(1, mask.sum())
    share = chosen.sum((0, 1)).astype(jnp.float32) / pairs.astype(jnp.float32)
    mean = jnp.where(mask[:, None], probabilities, 0.0).sum(0) / tokens.astype(jnp.float32)
    return num_experts * (share * mean).sum()


def router_z_loss(logits: Tagged, token_mask: Tagged | None = None) -> jax.Array:
    """The mean over tokens of logsumexp(logits)^2, a float32 scalar; 0 without tokens."""
    squares, mask = _rows(logits, _square_logsumexp, token_mask)
    tokens = jnp.maximum(1, mask.sum()).astype(jnp.float32)
    return jnp.where(mask, squares[:, 0], 0.0).sum() / tokens


def _square_logsumexp(logits: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def _rows(logits: Tagged, function, token_mask: Tagged | None) -> tuple[jax.Array, jax.Array]:
    """function(logits) as rows [tokens, n] and which of them count [tokens]."""
    rest = tuple(n for n in logits.axes if n != "expert")
    array = logits.untag(*rest, "expert").astype(jnp.float32)
    rows = array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
    mask = ~(rows == -jnp.inf).all(-1)
    if token_mask is not None:
        mask &= token_mask.untag(*rest).reshape(-1)
    # before the function, so that what does not count does not reach the gradients either
    return function(jnp.where(mask[:, None], rows, 0.0)), mask
