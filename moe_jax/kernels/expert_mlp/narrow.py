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

from moe_jax.kernels.expert_mlp import weights


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
    """Sums over this split's inputs: a tuple of f32 [OUTPUTS, part], rows as `weights.decode`'s.

    Args:
        x: bf16 [rows, IN].
        rows: for each of PARTS, the rows of x that are its tokens.
        count: how many tokens there are; the columns of the others are zero.
        words, scales: the weights, of which this is the OUTPUTS from column * OUTPUTS of `expert`.
    """
    SPAN: gl.constexpr = IN // 64 // SPLITS
    STEPS: gl.constexpr = SPAN // TILES
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
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
        totals = totals + (gl.zeros([OUTPUTS, PARTS[p]], gl.float32, PRODUCT),)
    for i in gl.static_range(STAGES - 1):
        for p in gl.static_range(len(PARTS)):
            weights.copy_rows(shared[p], i, x_at[p], inside[p] & (i < STEPS), TILES)
            x_at = x_at[:p] + (x_at[p] + 64 * TILES,) + x_at[p + 1 :]
        async_copy.commit_group()

    slot = 0
    for i in range(0, STEPS):
        async_copy.wait_group(STAGES - 2)
        gl.barrier()
        free = slot + STAGES - 1
        free = gl.where(free >= STAGES, free - STAGES, free)
        for p in gl.static_range(len(PARTS)):
            known = inside[p] & (i + STAGES - 1 < STEPS)
            weights.copy_rows(shared[p], free, x_at[p], known, TILES)
            x_at = x_at[:p] + (x_at[p] + 64 * TILES,) + x_at[p + 1 :]
        async_copy.commit_group()
        # the last step reads its own weights again
        words_at += gl.where(i + 1 < STEPS, 128 * TILES, 0)
        scales_at += gl.where(i + 1 < STEPS, 8 * TILES, 0)
        for u in gl.static_range(TILES):
            rights = ()  # loaded before the weights are decoded: fewer registers are alive
            for p in gl.static_range(len(PARTS)):
                tokens = shared[p].index(slot * TILES + u).permute((1, 0))
                rights = rights + (tokens.load(RIGHT),)
            left = weights.decode(packed[u], exponents[u], 0, OUTPUTS, LEFT)
            packed = packed[:u] + (gl.load(words_at + u * 128),) + packed[u + 1 :]
            exponents = exponents[:u] + (gl.load(scales_at + u * 8),) + exponents[u + 1 :]
            for p in gl.static_range(len(PARTS)):
                totals = totals[:p] + (mma_v2(left, rights[p], totals[p]),) + totals[p + 1 :]
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    async_copy.wait_group(0)  # what follows may use the same shared memory
    return totals
