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

from moe_jax.kernels.tiled_matmul import ring, weights


@triton.constexpr_function
def _product_layout(warps, tokens):
    """The layout of a product of so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 16])


@triton.constexpr_function
def _operand_layout(warps, tokens):
    """That of its left operand, which lies in registers alike however many columns there are."""
    return gl.DotOperandLayout(0, _product_layout(warps, tokens), 2)


@gluon.jit
def _multiply(left, shared, index, totals, PARTS: gl.constexpr):
    """Starts to add left bf16 [OUTPUTS, 64] times each part's tile of that index to its total."""
    sums = ()
    for p in gl.static_range(len(PARTS)):
        operand = gl.convert_layout(
            left, _operand_layout(gl.num_warps(), PARTS[p]), assert_trivial=True
        )
        tokens = shared[p].index(index).permute((1, 0))
        sums = sums + (warpgroup_mma(operand, tokens, totals[p], is_async=True),)
    return sums


@gluon.jit
def tile(
    x,
    rows,
    words,
    scales,
    block,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    SPLITS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PARTS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """See `narrow.tile`."""
    STEPS: gl.constexpr = IN // 64 // SPLITS // TILES
    LEFT: gl.constexpr = _operand_layout(gl.num_warps(), PARTS[0])
    words_at, scales_at = weights.addresses(words, scales, block, IN, OUT, SPLITS, OUTPUTS)
    packed, exponents = weights.load(words_at, scales_at, TILES)
    shared, x_at, inside = ring.begin(x, rows, block, IN, SPLITS, PARTS, TILES, STAGES)
    totals = ()
    for p in gl.static_range(len(PARTS)):
        totals = totals + (
            gl.zeros([OUTPUTS, PARTS[p]], gl.float32, _product_layout(gl.num_warps(), PARTS[p])),
        )
    left = weights.decode(packed[0], exponents[0], OUTPUTS, LEFT)
    ahead = TILES if STEPS > 1 else 0
    packed, exponents = weights.advance(packed, exponents, words_at, scales_at, ahead)
    slot = 0
    for i in range(0, STEPS):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        gl.barrier()
        # the last step reads its own weights again
        words_at += (i + 1 < STEPS).to(gl.int32) * (128 * TILES)
        scales_at += (i + 1 < STEPS).to(gl.int32) * (8 * TILES)
        for u in gl.static_range(TILES):
            totals = _multiply(left, shared, slot * TILES + u, totals, PARTS)
            if u == 0:
                free = ring.slot_before(slot, STAGES)
                x_at = ring.copy(shared, free, x_at, inside, i + STAGES - 1 < STEPS, TILES)
            following = weights.decode(packed[0], exponents[0], OUTPUTS, LEFT)
            ahead = gl.where(i + 2 < STEPS, TILES, 0) if u + 1 == TILES else u + 1
            packed, exponents = weights.advance(packed, exponents, words_at, scales_at, ahead)
            waited = warpgroup_mma_wait(0, deps=totals + (left,))
            totals, left = waited[:-1], following
        slot = ring.slot_after(slot, STAGES)
    async_copy.wait_group(0)  # what follows may use the same shared memory
    return totals
