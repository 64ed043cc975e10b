"""Many tokens times tiled MXFP4 weights: tensor cores that are kept busy.

While the warpgroup's matrix instruction works on half a tile of weights, the warps decode the next
half, and start its product before they wait for that one: the tensor cores always have work.

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
def _multiply(left, shared, index, half: gl.constexpr, totals, PARTS: gl.constexpr):
    """Starts to add left bf16 [OUTPUTS, 32] times half of each part's tile to its total."""
    sums = ()
    for p in gl.static_range(len(PARTS)):
        operand = gl.convert_layout(
            left, _operand_layout(gl.num_warps(), PARTS[p]), assert_trivial=True
        )
        tokens = shared[p].index(index).slice(32 * half, 32, dim=1).permute((1, 0))
        sums = sums + (warpgroup_mma(operand, tokens, totals[p], is_async=True),)
    return sums


@gluon.jit
def tile(
    x,
    rows,
    words,
    scales,
    block,
    ready,
    WANTED: gl.constexpr,
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
    if WANTED > 0:
        gl.atomic_poll(ready, WANTED)  # weights are on their way meanwhile
    shared, x_at, inside = ring.begin(x, rows, block, IN, SPLITS, PARTS, TILES, STAGES)
    totals = ()
    for p in gl.static_range(len(PARTS)):
        totals = totals + (
            gl.zeros([OUTPUTS, PARTS[p]], gl.float32, _product_layout(gl.num_warps(), PARTS[p])),
        )
    left = weights.decode(weights.split(packed[0])[0], exponents[0], 0, OUTPUTS, LEFT)
    before = left
    slot = 0
    for i in range(0, STEPS):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        gl.barrier()
        # the last step reads its own weights again
        words_at += (i + 1 < STEPS).to(gl.int32) * (128 * TILES)
        scales_at += (i + 1 < STEPS).to(gl.int32) * (8 * TILES)
        for u in gl.static_range(TILES):
            for half in gl.static_range(2):
                totals = _multiply(left, shared, slot * TILES + u, half, totals, PARTS)
                # the half before is done with; this one goes on while the next is decoded
                waited = warpgroup_mma_wait(len(PARTS), deps=totals + (before,))
                totals, before = waited[:-1], left
                if u == 0 and half == 0:
                    gl.barrier()  # every warp is done with the step before
                    free = ring.slot_before(slot, STAGES)
                    x_at = ring.copy(shared, free, x_at, inside, i + STAGES - 1 < STEPS, TILES)
                following = weights.split(packed[0])[1 - half]
                left = weights.decode(following, exponents[0], 2 - 2 * half, OUTPUTS, LEFT)
                if half == 0:
                    packed, exponents = weights.advance(packed, exponents, words_at, scales_at, u)
        slot = ring.slot_after(slot, STAGES)
    waited = warpgroup_mma_wait(0, deps=totals + (before,))
    async_copy.wait_group(0)  # what follows may use the same shared memory
    return waited[:-1]
