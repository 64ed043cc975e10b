"""The grouped matmul of float weights in Triton, and its two gradients, for NVIDIA GPUs.

Rows and weights are both bfloat16, float16 or float32. Sums are kept in float32; the products of
float32 are exact, too, and so not made by tensor cores.

The rows of an expert are cut into blocks of `block_m`; a program computes one tile of the result.
Which expert and which rows are its own it finds from `group_sizes`, so the grid is the largest
that any contents of `group_sizes` need, and the programs left over return at once. Neighbouring
programs share an expert: a column of row blocks first, so that they read the same weights.

All sizes but the number of rows are constants of the kernels.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportOperatorIssue=false
# (Triton's tuples of tensors are typed as if they were sums of tuples)

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import triton
import triton.language as tl

from moe_jax.kernels.grouped_matmul.tiles import Config


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, its constants and its grid.

    Attributes:
        kernel: the Triton function.
        grid: how many programs.
        constants: the values of its constexpr parameters.
        config: how it is tiled.
        blocks: for each of the first two operands, the block a descriptor of it loads.
    """

    kernel: Any
    grid: tuple[int]
    constants: Mapping[str, Any]
    config: Config
    blocks: tuple[tuple[int, int], tuple[int, int]]


@triton.jit
def _swizzle(index, rows, columns, GROUP: tl.constexpr):
    """Tile number -> (row, column) in an order of GROUP rows, column by column."""
    first = index // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    index = index % (GROUP * columns)
    return first + index % height, index // height


@triton.jit
def _own_tile(
    group_sizes,
    num_rows,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(expert, first row, end of the expert's rows, column) of this program.

    Rows past the sum count as those of one more expert, EXPERTS; programs left over get a greater
    one. Sizes are clipped to the rows there are, so that wrong ones reach no foreign memory.
    """
    program = tl.program_id(0)
    index = tl.arange(0, PADDED)
    sizes = tl.maximum(tl.load(group_sizes + index, mask=index < EXPERTS, other=0), 0)
    total = tl.cumsum(sizes)
    start = tl.minimum(tl.where(index <= EXPERTS, total - sizes, num_rows), num_rows)
    end = tl.minimum(tl.where(index < EXPERTS, total, num_rows), num_rows)
    programs = tl.cumsum((end - start + BLOCK_M - 1) // BLOCK_M) * COLUMNS
    before = programs <= program
    expert = tl.sum(before.to(tl.int32))
    first = tl.max(tl.where(before, end, 0))
    last = tl.min(tl.where(before, num_rows, end))
    index = program - tl.max(tl.where(before, programs, 0))
    blocks = tl.maximum((last - first + BLOCK_M - 1) // BLOCK_M, 1)
    row, column = _swizzle(index, blocks, COLUMNS, GROUP)
    return expert, first + row * BLOCK_M, last, column


@triton.jit
def _store_tile(result, values, row, end, column, N: tl.constexpr):
    """Writes a tile of a row-major [*, N] at (row, column), up to row `end`."""
    m = tl.arange(0, values.shape[0])
    n = column + tl.arange(0, values.shape[1])
    place = result + row.to(tl.int64) * N + m[:, None] * N + n[None, :]
    tl.store(
        place, values.to(result.dtype.element_ty), mask=(row + m < end)[:, None] & (n < N)[None, :]
    )


@triton.jit(do_not_specialize=["num_rows"])
def multiply_kernel(
    rows,  # [num_rows, K]
    weight,  # [EXPERTS, N, K], or [EXPERTS, K, N] where N_INNER
    group_sizes,  # i32 [EXPERTS]
    num_rows,
    result,  # [num_rows, N]
    N: tl.constexpr,
    K: tl.constexpr,
    N_INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """result[r] = sum over k of rows[r, k] * weight[expert of r][.., k]."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, row, end, column = _own_tile(
        group_sizes, num_rows, EXPERTS, PADDED, BLOCK_M, COLUMNS, GROUP
    )
    if expert > EXPERTS:
        return
    column = column * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if expert == EXPERTS:
        _store_tile(result, total, row, end, column, N)
        return

    k = tl.arange(0, BLOCK_K)
    if DESCRIPTORS:
        if N_INNER:
            WHOLE: tl.constexpr = K // BLOCK_K * BLOCK_K
            for step in range(0, WHOLE, BLOCK_K):
                a = rows.load([row, step])
                b = weight.load([expert * K + step, column])
                total = tl.dot(a, b, total)
            if WHOLE < K:
                # the block ends in weights of the next expert; where those are not finite, the
                # zeros that `a` ends in do not cancel them
                a = rows.load([row, WHOLE])
                b = weight.load([expert * K + WHOLE, column])
                b = tl.where((k < K - WHOLE)[:, None], b, tl.zeros_like(b))
                total = tl.dot(a, b, total)
        else:
            for step in range(0, K, BLOCK_K):
                a = rows.load([row, step])
                b = weight.load([expert * N + column, step])
                total = tl.dot(a, b.T, total)
    else:
        # rows and columns beyond the tile's own are not stored: any that exist may stand for them
        m = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
        n = column + tl.arange(0, BLOCK_N)
        a_at = rows + m.to(tl.int64)[:, None] * K + k[None, :]
        b_at = weight + expert.to(tl.int64) * N * K
        if N_INNER:
            b_at += k[:, None] * N + n[None, :]
        else:
            b_at += tl.minimum(n, N - 1)[None, :] * K + k[:, None]
        for step in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                a = tl.load(a_at)
                if N_INNER and N % BLOCK_N != 0:
                    b = tl.load(b_at, mask=(n < N)[None, :], other=0)
                else:
                    b = tl.load(b_at)
            else:
                a = tl.load(a_at, mask=(k < K - step)[None, :], other=0)
                b = tl.load(b_at, mask=(k < K - step)[:, None] & (n < N)[None, :], other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
            a_at += BLOCK_K
            b_at += BLOCK_K * N if N_INNER else BLOCK_K
    _store_tile(result, total, row, end, column, N)


@triton.jit(do_not_specialize=["num_rows"])
def outer_products_kernel(
    gradient,  # [num_rows, M]
    rows,  # [num_rows, N]
    group_sizes,  # i32 [EXPERTS]
    num_rows,
    result,  # [EXPERTS, M, N]
    M: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """result[e] = sum over the rows r of expert e of outer(gradient[r], rows[r])."""
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (TILES_M * TILES_N)
    tile_m, tile_n = _swizzle(tl.program_id(0) % (TILES_M * TILES_N), TILES_M, TILES_N, GROUP)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N

    index = tl.arange(0, PADDED)
    sizes = tl.maximum(tl.load(group_sizes + index, mask=index < EXPERTS, other=0), 0)
    first = tl.minimum(tl.sum(tl.where(index < expert, sizes, 0)), num_rows)
    end = tl.minimum(tl.sum(tl.where(index <= expert, sizes, 0)), num_rows)
    whole = first + (end - first) // BLOCK_K * BLOCK_K

    m, n, k = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # whole blocks of rows without a mask, then what is left: rows of another expert must count as
    # zero in both operands, for zero times infinity is not zero
    if DESCRIPTORS:
        for row in range(first, whole, BLOCK_K):
            a = gradient.load([row, m0])
            b = rows.load([row, n0])
            total = tl.dot(a.T, b, total)
        if whole < end:
            own = (whole + k < end)[:, None]
            a = gradient.load([whole, m0])
            b = rows.load([whole, n0])
            a = tl.where(own, a, tl.zeros_like(a))
            b = tl.where(own, b, tl.zeros_like(b))
            total = tl.dot(a.T, b, total)
        _store_tile(result + expert.to(tl.int64) * M * N, total, m0, M, n0, N)
    else:
        a_at = gradient + first.to(tl.int64) * M + k[None, :] * M + m[:, None]
        b_at = rows + first.to(tl.int64) * N + k[:, None] * N + n[None, :]
        for _ in range(first, whole, BLOCK_K):
            if M % BLOCK_M == 0:
                a = tl.load(a_at)
            else:
                a = tl.load(a_at, mask=(m < M)[:, None], other=0)
            if N % BLOCK_N == 0:
                b = tl.load(b_at)
            else:
                b = tl.load(b_at, mask=(n < N)[None, :], other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
            a_at += BLOCK_K * M
            b_at += BLOCK_K * N
        if whole < end:
            own = whole + k < end
            a = tl.load(a_at, mask=own[None, :] & (m < M)[:, None], other=0)
            b = tl.load(b_at, mask=own[:, None] & (n < N)[None, :], other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
        _store_tile(result + expert.to(tl.int64) * M * N, total, m0, M, n0, N)


def multiply_launch(
    num_rows: int, experts: int, n: int, k: int, config: Config, *, n_inner: bool
) -> Launch:
    """The launch of `multiply_kernel`: [num_rows, k] -> [num_rows, n]."""
    # each expert, and the rows past the sum, may end in a block that is not full
    row_blocks = min(num_rows, num_rows // config.block_m + min(experts + 1, num_rows))
    constants = {
        "N": n,
        "K": k,
        "N_INNER": n_inner,
        "EXPERTS": experts,
        "PADDED": triton.next_power_of_2(experts + 1),
        **_tile_constants(config),
    }
    of_weight = (config.block_k, config.block_n) if n_inner else (config.block_n, config.block_k)
    grid = (row_blocks * triton.cdiv(n, config.block_n),)
    blocks = (config.block_m, config.block_k), of_weight
    return Launch(multiply_kernel, grid, constants, config, blocks)


def outer_products_launch(experts: int, m: int, n: int, config: Config) -> Launch:
    """The launch of `outer_products_kernel`: [rows, m], [rows, n] -> [experts, m, n]."""
    constants = {
        "M": m,
        "N": n,
        "EXPERTS": experts,
        "PADDED": triton.next_power_of_2(experts),
        **_tile_constants(config),
    }
    grid = (experts * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    blocks = (config.block_k, config.block_m), (config.block_k, config.block_n)
    return Launch(outer_products_kernel, grid, constants, config, blocks)


def call(
    launch: Launch, first: jax.Array, second: jax.Array, group_sizes: jax.Array, out_type: Any
) -> jax.Array:
    """Calls a kernel on arrays; `out_type` is what it returns, a `jax.ShapeDtypeStruct`."""
    import jax_triton

    num_rows, config = first.shape[0], launch.config
    operands: list[Any] = [first, second.reshape(-1, second.shape[-1])]
    if config.descriptors:
        operands = [
            jax_triton.TensorDescriptor.from_array(array, block)
            for array, block in zip(operands, launch.blocks, strict=True)
        ]
    return jax_triton.triton_call(
        *operands,
        group_sizes,
        num_rows,
        kernel=launch.kernel,
        out_type=out_type,
        grid=launch.grid,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        backend_options={"enable_fp_fusion": True},
        **launch.constants,
    )


def _tile_constants(config: Config) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "DESCRIPTORS": config.descriptors,
    }
