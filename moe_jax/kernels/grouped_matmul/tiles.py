"""How the Triton kernels of the float grouped matmul are tiled; which tiles for which sizes."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is tiled.

    Attributes:
        block_m: rows of a tile (outputs of the weight, in the kernel of its gradient).
        block_n: columns of a tile.
        block_k: terms added in one step.
        num_warps: warps a program.
        num_stages: steps that are in flight from memory.
        group: row blocks that share one pass over the columns.
        descriptors: whether tiles are loaded by TMA, through tensor descriptors (sm_90 and later).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    descriptors: bool = False


_PLAIN = Config(64, 64, 32, num_warps=4, num_stages=2)
"""For float32, whose exact products no tensor core makes, and for rows of odd sizes, which are
loaded element by element: larger tiles do not fit the registers."""

_LARGE_MEMORY = {
    16: Config(16, 128, 128, num_warps=4, num_stages=4),
    64: Config(64, 128, 64, num_warps=4, num_stages=4),
    128: Config(128, 256, 64, num_warps=8, num_stages=4, descriptors=True),
}
"""By rows of a tile, for sm_90 and sm_100, which have more than 200 KiB of shared memory."""

_SMALL_MEMORY = {
    16: Config(16, 128, 64, num_warps=4, num_stages=4),
    64: Config(64, 128, 32, num_warps=4, num_stages=4),
    128: Config(128, 128, 32, num_warps=4, num_stages=4),
}
"""By rows of a tile, for GPUs with at least 96 KiB of shared memory."""

_WEIGHT_GRADIENT = {
    True: Config(128, 256, 64, num_warps=8, num_stages=4, descriptors=True),
    False: Config(128, 128, 32, num_warps=4, num_stages=4),
}
"""For large and for small shared memory."""


def for_rows(
    num_rows: int, experts: int, axes: tuple[int, int], dtype: Any, capability: int
) -> Config:
    """Tiles of rows times weights, forwards or for the gradient of the rows.

    Args:
        num_rows: rows of all experts.
        experts: how many experts.
        axes: the sizes of the two axes that lie innermost in the rows and in the weight.
        dtype: of the operands.
        capability: the GPU's compute capability, 90 for 9.0.
    """
    if _is_plain(axes, dtype):
        return _PLAIN
    table = _LARGE_MEMORY if _has_large_memory(capability) else _SMALL_MEMORY
    mean = num_rows / experts
    height = 16 if mean <= 32 else 64 if mean <= 96 else 128
    return table[height]


def for_weight_gradient(axes: tuple[int, int], dtype: Any, capability: int) -> Config:
    """Tiles of the gradient of the weight; the arguments are those of `for_rows`."""
    if _is_plain(axes, dtype):
        return _PLAIN
    return _WEIGHT_GRADIENT[_has_large_memory(capability)]


def _has_large_memory(capability: int) -> bool:
    return capability // 10 in (9, 10)


def _is_plain(axes: tuple[int, int], dtype: Any) -> bool:
    """Whether products are exact float32, or rows do not all start at a multiple of 16 bytes."""
    size = jnp.dtype(dtype).itemsize
    return jnp.dtype(dtype) == jnp.float32 or any(axis * size % 16 for axis in axes)
