"""A few tokens times tiled MXFP4 weights: warps that stream weights, each on its own.

At few tokens an expert, the way of the weights from memory is all that counts, and instructions a
weight decide whether it is kept up with. The matrix instruction is `mma.sync`, which has no
set-up, and is narrow enough for 8 tokens.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from moe_jax.kernels.tiled_matmul import ring, weights


@gluon.jit
def _operands(shared, index, RIGHT: gl.constexpr):
    """Each part's tile of that index as a right operand: bf16 [64, part]."""
    rights = ()
    for p in gl.static_range(len(shared)):
        rights = rights + (shared[p].index(index).permute((1, 0)).load(RIGHT),)
    return rights


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
    """The sums of a block over its split's inputs.

    Args:
        x: bf16 [*, IN].
        rows: for each of PARTS, the rows of x that are its tokens, i32 [part].
        words, scales: the weights, tiled.
        block: a `schedule.Block`.
        ready: a counter i32 ...
        WANTED: ... of what must be done before x can be read; 0 if there is nothing to wait for.

    Returns:
        For each of PARTS, f32 [OUTPUTS, part]; rows as `weights.decode` leaves them. Columns past
        the block's rows are zero.
    """
    STEPS: gl.constexpr = IN // 64 // SPLITS // TILES
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    words_at, scales_at = weights.addresses(words, scales, block, IN, OUT, SPLITS, OUTPUTS)
    packed, exponents = weights.load(words_at, scales_at, TILES)
    if WANTED > 0:
        gl.atomic_poll(ready, WANTED)  # weights are on their way meanwhile
    shared, x_at, inside = ring.begin(x, rows, block, IN, SPLITS, PARTS, TILES, STAGES)
    totals = ()
    for p in gl.static_range(len(PARTS)):
        totals = totals + (gl.zeros([OUTPUTS, PARTS[p]], gl.float32, PRODUCT),)
    slot = 0
    for i in range(0, STEPS):
        async_copy.wait_group(STAGES - 2)
        gl.barrier()
        free = ring.slot_before(slot, STAGES)
        x_at = ring.copy(shared, free, x_at, inside, i + STAGES - 1 < STEPS, TILES)
        # the last step reads its own weights again
        words_at += gl.where(i + 1 < STEPS, 128 * TILES, 0)
        scales_at += gl.where(i + 1 < STEPS, 8 * TILES, 0)
        for u in gl.static_range(TILES):
            # loaded before the weights are decoded: fewer registers are alive
            rights = _operands(shared, slot * TILES + u, RIGHT)
            left = weights.decode(packed[0], exponents[0], 0, OUTPUTS, LEFT)
            packed, exponents = weights.advance(packed, exponents, words_at, scales_at, u)
            for p in gl.static_range(len(PARTS)):
                totals = totals[:p] + (mma_v2(left, rights[p], totals[p]),) + totals[p + 1 :]
        slot = ring.slot_after(slot, STAGES)
    async_copy.wait_group(0)  # what follows may use the same shared memory
    return totals
