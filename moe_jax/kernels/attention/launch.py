"""The Triton kernels as functions of JAX arrays; see `api` for what they compute.

They are called while lowering for CUDA, and only then import Triton.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels.attention.blocks import block_ranges, choose_blocks
from moe_jax.kernels.kernel_call import kernel_call
from moe_jax.kernels.lowering import cuda_capability

DTYPES = "bfloat16", "float16"
MOST_FEATURES = 128


def fits(queries: jax.Array, keys: jax.Array) -> bool:
    """Whether the kernels take queries [b, q, h, hd] and keys [b, kv, k, hd]."""
    return (
        queries.dtype.name in DTYPES
        and queries.shape[-1] <= MOST_FEATURES
        and bool(queries.size and keys.size)
    )


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    sinks: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """See `api`."""
    from moe_jax.kernels.attention import triton_attend as kernels

    (batch, num_queries, heads, head_dim), (_, kv, num_keys, _) = queries.shape, keys.shape
    blocks = choose_blocks(
        batch, num_queries, num_keys, heads, kv, head_dim, window, cuda_capability()
    )
    ranges = block_ranges(q_positions, k_positions, window, blocks)
    arguments = queries, keys, values, sinks, q_positions, k_positions, ranges
    programs = batch * kv * -(-num_queries // blocks.queries)
    options = {
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "SHAPE": (heads, kv, head_dim),
        "BLOCKS": (blocks.queries, blocks.heads, blocks.keys, blocks.features),
        "OPTIONS": (window or 0, head_dim**-0.5, blocks.skips_masks),
    }
    if blocks.splits == 1:
        return _call(
            kernels.attend_whole,
            *arguments,
            num_queries,
            num_keys,
            out_type=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            grid=(programs,),
            **options,
        )
    rows = blocks.splits, batch, num_queries, heads
    mixed, largest, total = _call(
        kernels.attend_part,
        *arguments,
        num_queries,
        num_keys,
        out_type=(
            jax.ShapeDtypeStruct((*rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ),
        grid=(programs, blocks.splits),
        SPLITS=blocks.splits,
        **options,
    )
    share = jnp.exp2(largest - largest.max(0, keepdims=True))
    whole = (mixed * share[..., None]).sum(0) / (total * share).sum(0)[..., None]
    return whole.astype(queries.dtype)


def _call(kernel: Any, *arguments: Any, **options: Any) -> Any:
    return kernel_call(*arguments, kernel=kernel, **options)
