"""Many tokens times tiled MXFP4 weights: tensor cores that are kept busy.

While the warpgroup's matrix instruction works on one tile of weights, the warps decode the next.

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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_jax.kernels.expert_mlp import weights


@triton.constexpr_function
def _product_layout(warps, tokens):
    """The layout of a product of so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 16])


@triton.constexpr_function
def _operand_layout(warps, tokens):
    """That of its left operand, which lies in registers alike however many columns there are."""
    return gl.DotOperandLayout(0, _product_layout(warps, tokens), 2)


@gluon.jit
def tile(
    x,
    rows,
    count,
    words,
    scales,
    expert,
    column,
    split,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    SPLITS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PARTS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """See `narrow.tile`."""
    WARPS: gl.constexpr = gl.num_warps()
    SPAN: gl.constexpr = IN // 64 // SPLITS
    STEPS: gl.constexpr = SPAN // TILES
    LEFT: gl.constexpr = _operand_layout(WARPS, PARTS[0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    words_at, scales_at = weights.addresses(
        words, scales, expert, column, split, IN, OUT, SPLITS, OUTPUTS
    )
    packed, exponents = weights.load(words_at, scales_at, TILES)
    x_at, inside, shared, totals = (), (), (), ()
    for p in gl.static_range(len(PARTS)):
        at, known = weights.rows_at(
            x, rows[p], count - weights.tokens_before(PARTS, p), split * (SPAN * 64), IN
        )
        x_at, inside = x_at + (at,), inside + (known,)
        shared = shared + (
            gl.allocate_shared_memory(gl.bfloat16, [STAGES * TILES, PARTS[p], 64], SHARED),
        )
        totals = totals + (
            gl.zeros([OUTPUTS, PARTS[p]], gl.float32, _product_layout(WARPS, PARTS[p])),
        )
    for i in gl.static_range(STAGES - 1):
        for p in gl.static_range(len(PARTS)):
            weights.copy_rows(shared[p], i, x_at[p], inside[p] & (i < STEPS), TILES)
            x_at = x_at[:p] + (x_at[p] + 64 * TILES,) + x_at[p + 1 :]
        async_copy.commit_group()

    left = weights.decode(weights.split(packed[0])[0], exponents[0], 0, OUTPUTS, LEFT)
    before = left
    slot = 0
    for i in range(0, STEPS):
        # the last step reads its own weights again
        words_at += (i + 1 < STEPS).to(gl.int32) * (128 * TILES)
        scales_at += (i + 1 < STEPS).to(gl.int32) * (8 * TILES)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        gl.barrier()
        for u in gl.static_range(TILES):
            for half in gl.static_range(2):
                for p in gl.static_range(len(PARTS)):
                    tokens = shared[p].index(slot * TILES + u).slice(32 * half, 32, dim=1)
                    total = warpgroup_mma(
                        gl.convert_layout(
                            left, _operand_layout(WARPS, PARTS[p]), assert_trivial=True
                        ),
                        tokens.permute((1, 0)),
                        totals[p],
                        is_async=True,
                    )
                    totals = totals[:p] + (total,) + totals[p + 1 :]
                # the half before is done, this one goes on while the next is decoded
                waited = warpgroup_mma_wait(len(PARTS), deps=totals + (before,))
                totals, before = waited[:-1], left
                if u == 0 and half == 0:
                    gl.barrier()
                    free = slot + STAGES - 1
                    free = gl.where(free >= STAGES, free - STAGES, free)
                    for p in gl.static_range(len(PARTS)):
                        known = inside[p] & (i + STAGES - 1 < STEPS)
                        weights.copy_rows(shared[p], free, x_at[p], known, TILES)
                        x_at = x_at[:p] + (x_at[p] + 64 * TILES,) + x_at[p + 1 :]
                    async_copy.commit_group()
                following = weights.split(packed[0])[1 - half]
                left = weights.decode(following, exponents[0], 2 - 2 * half, OUTPUTS, LEFT)
                if half == 0:
                    packed = packed[1:] + (gl.load(words_at + u * 128),)
                    exponents = exponents[1:] + (gl.load(scales_at + u * 8),)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    waited = warpgroup_mma_wait(0, deps=totals + (before,))
    async_copy.wait_group(0)  # what follows may use the same shared memory
    return waited[:-1]
