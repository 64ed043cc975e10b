"""Rows of activations in Gluon: from memory to a ring of slots in shared memory.

A slot holds a step of inputs, TILES tiles of 64, of each of the parts that a program's tokens are
cut into. While one is multiplied, the next are on their way.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moe_jax.kernels.tiled_matmul import schedule


@triton.constexpr_function
def read_layout(warps):
    """The layout in which rows are read: 16 bytes a lane, fewer where tokens are few."""
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def _addresses(x, row, count, first, IN: gl.constexpr):
    """Where each row's 64 inputs from `first` on are [tokens, 64], and which rows there are."""
    ROWS: gl.constexpr = read_layout(gl.num_warps())
    m = gl.arange(0, row.shape[0], layout=gl.SliceLayout(1, ROWS))
    k = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))
    return x + (row.to(gl.int64) * IN + first)[:, None] + k[None, :], (m < count)[:, None]


@gluon.jit
def copy(shared, slot, x_at, inside, wanted, TILES: gl.constexpr):
    """Starts to copy a step of all parts, zeros if it is not `wanted`; returns the next x_at."""
    following = ()
    for p in gl.static_range(len(x_at)):
        for u in gl.static_range(TILES):
            async_copy.async_load(
                shared[p].index(slot * TILES + u), x_at[p] + u * 64, mask=inside[p] & wanted
            )
        following = following + (x_at[p] + 64 * TILES,)
    async_copy.commit_group()
    return following


@gluon.jit
def begin(
    x,
    rows,
    block,
    IN: gl.constexpr,
    SPLITS: gl.constexpr,
    PARTS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Makes a ring of STAGES slots, and starts to copy all steps that it holds but one.

    Args:
        x: bf16 [*, IN].
        rows: for each of PARTS, the rows of x that are its tokens, i32 [part].
        block: a `schedule.Block`; its split's inputs are copied.

    Returns:
        shared: for each part, bf16 [STAGES * TILES, part, 64].
        x_at: for each part, where the next step's first 64 inputs are, [part, 64].
        inside: for each part, which rows there are, [part, 1]; the others are zeros.
    """
    SPAN: gl.constexpr = IN // 64 // SPLITS
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    shared, x_at, inside = (), (), ()
    for p in gl.static_range(len(PARTS)):
        count = block.count - schedule.tokens_before(PARTS, p)
        at, known = _addresses(x, rows[p], count, block.split * (SPAN * 64), IN)
        x_at, inside = x_at + (at,), inside + (known,)
        shared = shared + (
            gl.allocate_shared_memory(gl.bfloat16, [STAGES * TILES, PARTS[p], 64], SHARED),
        )
    for i in gl.static_range(STAGES - 1):
        x_at = copy(shared, i, x_at, inside, i < SPAN // TILES, TILES)
    return shared, x_at, inside


@gluon.jit
def slot_before(slot, STAGES: gl.constexpr):
    """The slot of the step before, which is free, and the next to be filled."""
    before = slot + STAGES - 1
    return gl.where(before >= STAGES, before - STAGES, before)


@gluon.jit
def slot_after(slot, STAGES: gl.constexpr):
    """The slot of the next step."""
    return gl.where(slot == STAGES - 1, 0, slot + 1)
