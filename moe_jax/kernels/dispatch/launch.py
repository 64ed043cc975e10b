"""The Triton kernels as functions of JAX arrays; see `api` for what they compute.

They are called while lowering for CUDA, and only then import Triton.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels.dispatch.blocks import (
    SortBlocks,
    combine_blocks,
    count_bits,
    place_blocks,
    sort_blocks,
)
from moe_jax.kernels.dispatch.pairs import RoutedPairs, SortedPairs


def route_pairs(
    logits: jax.Array, token_mask: jax.Array | None = None, *, experts_per_token: int
) -> RoutedPairs:
    """See `api`."""
    return route_and_clear(logits, token_mask, experts_per_token=experts_per_token)[0]


def route_and_clear(
    logits: jax.Array,
    token_mask: jax.Array | None = None,
    *,
    experts_per_token: int,
    first_expert: jax.Array | None = None,
    num_experts: int | None = None,
    num_counters: int = 0,
) -> tuple[RoutedPairs, jax.Array]:
    """The same, for a device that may have some of the experts only, and zeros.

    Args:
        logits, token_mask, experts_per_token: see `api`.
        first_expert: int32 [], the first of the device's experts, which ids then count from; a pair
            of another device's expert has none. None where the device has all.
        num_experts: how many it has; None for all.
        num_counters: how many zeros to return; for 0 what is returned is not defined.

    Returns:
        Pairs, and int32 [num_counters], no fewer than one.
    """
    from moe_jax.kernels.dispatch import triton_route as kernels

    (num_tokens, total), k = logits.shape, experts_per_token
    num_experts = num_experts or total
    num_pairs = num_tokens * k
    ids, weight = _int32(num_tokens, k), _type((num_pairs,), jnp.float32)
    counters = _int32(max(1, num_counters))
    if not num_tokens:
        *pairs, zeros = _zeros(ids, weight, _int32(0), _int32(num_experts), counters)
        return RoutedPairs(*pairs), zeros
    blocks = sort_blocks(num_tokens, total, k)
    options = _options(blocks, num_experts, k)
    arguments = (
        logits,
        logits if token_mask is None else token_mask,
        logits if first_expert is None else first_expert.reshape(1),
        num_tokens,
    )
    options["BITS"] = count_bits(blocks.tokens)  # a token names an expert at most once
    options["OPTIONS"] = total, token_mask is not None
    if blocks.chunks == 1:
        return _call(
            kernels.route_once,
            *arguments,
            out_type=(RoutedPairs(ids, weight, _int32(num_pairs), _int32(num_experts)), counters),
            grid=(1,),
            COUNTERS=num_counters,
            **options,
        )
    chosen, weights, rank, counts = _call(
        kernels.route_chunk,
        *arguments,
        out_type=(ids, weight, _int32(num_pairs), _int32(blocks.chunks, num_experts)),
        grid=(blocks.chunks,),
        TILES=blocks.tiles,
        **options,
    )
    pairs, zeros = _place(chosen, rank, counts, blocks, num_counters)
    return RoutedPairs(chosen, weights, *pairs), zeros


def sort_pairs(ids: jax.Array, *, num_experts: int) -> SortedPairs:
    """See `api`."""
    return sort_and_clear(ids, num_experts=num_experts)[0]


def sort_and_clear(
    ids: jax.Array, *, num_experts: int, num_counters: int = 0
) -> tuple[SortedPairs, jax.Array]:
    """The same, and int32 [num_counters] zeros (undefined, and no fewer than one, for 0)."""
    from moe_jax.kernels.dispatch import triton_sort as kernels

    num_tokens, k = ids.shape
    counters = _int32(max(1, num_counters))
    if not ids.size:
        *pairs, zeros = _zeros(_int32(0), _int32(num_experts), counters)
        return SortedPairs(*pairs), zeros
    blocks = sort_blocks(num_tokens, num_experts, k)
    options = _options(blocks, num_experts, k)
    if blocks.chunks == 1:
        return _call(
            kernels.sort_once,
            ids,
            num_tokens,
            out_type=(SortedPairs(_int32(num_tokens * k), _int32(num_experts)), counters),
            grid=(1,),
            COUNTERS=num_counters,
            **options,
        )
    rank, counts = _call(
        kernels.sort_chunk,
        ids,
        num_tokens,
        out_type=(_int32(num_tokens * k), _int32(blocks.chunks, num_experts)),
        grid=(blocks.chunks,),
        TILES=blocks.tiles,
        **options,
    )
    return _place(ids, rank, counts, blocks, num_counters)


def combine_pairs(y: jax.Array, ids: jax.Array, *, num_experts: int, dtype: Any) -> jax.Array:
    """See `api`."""
    from moe_jax.kernels.dispatch import triton_combine as kernels

    (num_tokens, k), size = ids.shape, y.shape[1]
    out = _type((num_tokens, size), dtype)
    if not ids.size or not size:
        return _zeros(out)[0]
    blocks = combine_blocks(size, y.dtype.itemsize)
    return _call(
        kernels.combine_pairs,
        y,
        ids,
        out_type=out,
        grid=(num_tokens, -(-size // blocks.columns)),
        num_warps=blocks.num_warps,
        D=size,
        E=num_experts,
        K=k,
        SPLITS=y.shape[0] // ids.size,
        BLOCK_D=blocks.columns,
    )


def _place(
    ids: jax.Array, rank: jax.Array, counts: jax.Array, blocks: SortBlocks, num_counters: int
) -> tuple[SortedPairs, jax.Array]:
    from moe_jax.kernels.dispatch import triton_sort as kernels

    k, num_experts = ids.shape[1], counts.shape[1]
    steps = place_blocks(blocks, k)
    return _call(
        kernels.place_pairs,
        ids,
        rank,
        counts,
        ids.size,
        blocks.chunks,
        out_type=(
            SortedPairs(_int32(ids.size), _int32(num_experts)),
            _int32(max(1, num_counters)),
        ),
        grid=(blocks.chunks,),
        num_warps=steps.num_warps,
        COUNTERS=num_counters,
        E=num_experts,
        CHUNK_PAIRS=blocks.tokens * blocks.tiles * k,
        BLOCK_P=steps.pairs,
        BLOCK_C=steps.chunks,
        BLOCK_E=blocks.experts,
    )


def _options(blocks: SortBlocks, num_experts: int, experts_per_token: int) -> dict[str, Any]:
    return {
        "num_warps": blocks.num_warps,
        "E": num_experts,
        "K": experts_per_token,
        "BLOCK_T": blocks.tokens,
        "BLOCK_E": blocks.experts,
        "BLOCK_K": blocks.pairs,
        "BITS": count_bits(blocks.tokens * experts_per_token),
    }


def _call(kernel: Any, *arguments: Any, **options: Any) -> Any:
    import jax_triton

    return jax_triton.triton_call(*arguments, kernel=kernel, **options)


def _type(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _int32(*shape: int) -> Any:
    return _type(shape, jnp.int32)


def _zeros(*types: jax.ShapeDtypeStruct) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(t.shape, t.dtype) for t in types)
