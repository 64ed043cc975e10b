"""Pairs of a token and an expert: routing, sorting by expert, and combining what comes back.

Each is one operation that lowers to Triton kernels for CUDA and to `reference` elsewhere. None has
derivatives: call them inside `jax.custom_vjp`.

T tokens, E experts, k experts per token, P = T * k pairs, token by token. A pair has no expert
where its id is negative or at least E. Contents are dynamic, results the same bits each time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels.dispatch import launch, reference
from moe_jax.kernels.dispatch.pairs import RoutedPairs, SortedPairs
from moe_jax.kernels.lowering import per_platform
from moe_jax.routing import check_experts_per_token

_route_pairs = per_platform("route_pairs", reference.route_pairs, launch.route_pairs)
_sort_pairs = per_platform("sort_pairs", reference.sort_pairs, launch.sort_pairs)
_combine_pairs = per_platform("combine_pairs", reference.combine_pairs, launch.combine_pairs)


def route_pairs(
    logits: jax.Array,
    experts_per_token: int,
    token_mask: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> RoutedPairs:
    """Chooses each token's best experts, weighs them by a softmax over those, and sorts the pairs.

    As `moe_jax.routing.route` with the default router: of equal logits the expert with the lowest
    index wins, -inf bars an expert, and a NaN makes all weights of its token NaN.

    Args:
        logits: float [T, E].
        experts_per_token: how many experts a token is sent to, at most E.
        token_mask: bool [T]; tokens that are False get no expert.
        implementation: see `lowering.per_platform`.

    Returns:
        ids, weights, order and group sizes.

    Raises:
        ValueError: sizes do not fit.
        TypeError: a dtype is wrong.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [tokens, experts], got the shape {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floats, got {logits.dtype}")
    check_experts_per_token(experts_per_token, logits.shape[1])
    arrays = [logits]
    if token_mask is not None:
        if token_mask.shape != logits.shape[:1]:
            raise ValueError(
                f"token_mask must have the shape {logits.shape[:1]}, got {token_mask.shape}"
            )
        if token_mask.dtype != jnp.bool_:
            raise TypeError(f"token_mask must be bool, got {token_mask.dtype}")
        arrays.append(token_mask)
    return _route_pairs(*arrays, experts_per_token=experts_per_token, implementation=implementation)


def sort_pairs(
    ids: jax.Array, num_experts: int, *, implementation: str | None = None
) -> SortedPairs:
    """Sorts the pairs of a routing that is done already.

    Args:
        ids: int32 [T, k]; a token may name an expert more than once.
        num_experts: E.
        implementation: see `lowering.per_platform`.

    Raises:
        ValueError: `ids` has not two axes.
        TypeError: `ids` are not int32.
    """
    _check_ids(ids)
    return _sort_pairs(ids, num_experts=num_experts, implementation=implementation)


def combine_pairs(
    y: jax.Array,
    ids: jax.Array,
    num_experts: int,
    dtype: Any = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sums the rows of each token's pairs, in float32 at least.

    Rows of pairs without an expert are nothing, whatever they hold, even NaN.

    Args:
        y: float [P * splits, D], in the order of pairs, weighted. A pair may have several rows, as
            many as every other, one after the other.
        ids: int32 [T, k].
        num_experts: E.
        dtype: the result's; None for that of `y`.
        implementation: see `lowering.per_platform`.

    Returns:
        [T, D].

    Raises:
        ValueError: sizes do not fit.
        TypeError: a dtype is wrong.
    """
    _check_ids(ids)
    splits = y.shape[0] // max(1, ids.size) if y.ndim == 2 else 0
    if y.ndim != 2 or y.shape[0] != splits * ids.size or (ids.size and not splits):
        raise ValueError(
            f"y must be [pairs, d] with {ids.size} pairs for ids {ids.shape}, or with several "
            f"rows for each pair, got {y.shape}"
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"y must be floats, got {y.dtype}")
    dtype = y.dtype if dtype is None else jnp.dtype(dtype)
    return _combine_pairs(
        y, ids, num_experts=num_experts, dtype=dtype, implementation=implementation
    )


def _check_ids(ids: jax.Array) -> None:
    if ids.ndim != 2:
        raise ValueError(f"ids must be [tokens, experts_per_token], got the shape {ids.shape}")
    if ids.dtype != jnp.int32:
        raise TypeError(f"ids must be int32, got {ids.dtype}")
