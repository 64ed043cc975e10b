"""Long chunks on several devices, in pieces: while sums of one travel, another is computed.

Every layer sums twice over the devices that share it. A chunk taken whole would wait for each sum;
of two pieces one goes on. The second follows the first through each layer, whose keys and values it
sees in the cache.
"""

import jax

from moe_jax.sharding import Sharding

LEAST_TOKENS = 2048
"""Tokens of a piece at least, on all rows together: experts take fewer at a worse rate."""


def pieces(rows: int, size: int, sharding: Sharding | None) -> list[tuple[int, int]]:
    """Where pieces of `size` tokens of each of so many rows begin and end: one piece or two."""
    if sharding is None or rows * size < 2 * LEAST_TOKENS or size < 2:
        return [(0, size)]
    if sharding.count(*{*sharding.axes("expert"), *sharding.axes("h")}) == 1:
        return [(0, size)]  # copies of the model send nothing
    half = size // 2
    return [(0, half), (half, size)]


def apart[T](block: T) -> T:
    """A layer that XLA takes for another than the one it was given.

    Matmuls of two pieces with one weight would be made one, which has to wait for both.
    """
    return jax.lax.optimization_barrier(block)
