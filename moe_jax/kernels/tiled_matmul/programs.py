"""What a program of the Hopper kernels does with its block: tile, epilogue, rows written.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_jax.kernels.tiled_matmul import epilogues, narrow, ring, schedule, wide


@gluon.jit
def experts(E: gl.constexpr):
    """0, 1, ... for E experts or more."""
    PADDED: gl.constexpr = max(32, 1 << (E - 1).bit_length())
    return gl.arange(0, PADDED, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def _range(like, AXIS: gl.constexpr):
    """The indices of an axis of a matrix."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1 - AXIS, like.type.layout)
    return gl.arange(0, like.shape[AXIS], layout=LAYOUT)


@triton.constexpr_function
def _store_layout(warps):
    """The layout in which rows are written: 8 neighbours a lane."""
    return gl.BlockedLayout([1, 8], [8, 4], [warps, 1], [1, 0])


@gluon.jit
def _rows_to_read(block, TOKENS: gl.constexpr):
    """The rows of a block of TOKENS, in the layout of reading them: i32 [TOKENS]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, ring.read_layout(gl.num_warps()))
    return block.start + gl.arange(0, TOKENS, layout=LAYOUT)


@gluon.jit
def _rows_to_write(block, TOKENS: gl.constexpr):
    """The rows of a block of TOKENS, in the layout of writing them: i32 [TOKENS]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, _store_layout(gl.num_warps()))
    return block.start + gl.arange(0, TOKENS, layout=LAYOUT)


@gluon.jit
def _rows_of_parts(block, PARTS: gl.constexpr):
    """The rows of each of a block's parts, as a tuple."""
    rows = ()
    for p in gl.static_range(len(PARTS)):
        rows = rows + (_rows_to_read(schedule.part(block, PARTS, p), PARTS[p]),)
    return rows


@gluon.jit
def _tile(
    x, rows, words, scales, block, ready, WANTED: gl.constexpr,
    IN: gl.constexpr, OUT: gl.constexpr, SPLITS: gl.constexpr, OUTPUTS: gl.constexpr,
    PARTS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, INSTRUCTION: gl.constexpr,
):  # fmt: skip
    """The tile's sums by the instruction that the configuration names; see `narrow.tile`."""
    gl.static_assert(INSTRUCTION == "wgmma" or INSTRUCTION == "mma")
    if INSTRUCTION == "wgmma":
        return wide.tile(
            x,
            rows,
            words,
            scales,
            block,
            ready,
            WANTED,
            IN,
            OUT,
            SPLITS,
            OUTPUTS,
            PARTS,
            TILES,
            STAGES,
        )
    else:
        return narrow.tile(
            x,
            rows,
            words,
            scales,
            block,
            ready,
            WANTED,
            IN,
            OUT,
            SPLITS,
            OUTPUTS,
            PARTS,
            TILES,
            STAGES,
        )


@gluon.jit
def _store_rows(out, values, row, block, OUT: gl.constexpr):
    """Writes a block's values [OUTPUTS, TOKENS] to the rows of out [*, OUT], integers [TOKENS]."""
    ROWS: gl.constexpr = _store_layout(gl.num_warps())
    values = gl.permute(values.to(out.dtype.element_ty), [1, 0])
    values = gl.convert_layout(values, ROWS)
    m = gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, ROWS))
    n = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, ROWS))
    n += block.column * values.shape[1]
    inside = (m < block.count)[:, None] & (n < OUT)[None, :]
    gl.store(out + (row.to(gl.int64) * OUT)[:, None] + n[None, :], values, mask=inside)


@gluon.jit
def gate_up(
    x, words, scales, factor, bias, order, hidden, block,
    ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr,
    IN: gl.constexpr, OUT: gl.constexpr, K: gl.constexpr, SORTED: gl.constexpr,
    OUTPUTS: gl.constexpr, HEIGHTS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    INSTRUCTION: gl.constexpr,
):  # fmt: skip
    """Each pair's token times its expert's weight, activated; sorted by expert where SORTED."""
    for i in gl.static_range(len(HEIGHTS)):
        if schedule.fits(block, HEIGHTS, i):
            PARTS: gl.constexpr = HEIGHTS[i]
            tokens = ()
            for p in gl.static_range(len(PARTS)):
                part = schedule.part(block, PARTS, p)
                pair = schedule.pairs(order, _rows_to_read(part, PARTS[p]), part, SORTED)
                tokens = tokens + (pair // K,)
            totals = _tile(
                x, tokens, words, scales, block, order, 0,
                IN, OUT, 1, OUTPUTS, PARTS, TILES, STAGES, INSTRUCTION,
            )  # fmt: skip
            for p in gl.static_range(len(PARTS)):
                part = schedule.part(block, PARTS, p)
                gate, up = epilogues.gate_and_up(totals[p])
                n = 2 * (part.column * (OUTPUTS // 2) + _range(gate, 0))
                values = epilogues.activated(
                    gate, up, n, factor, bias, part, ALPHA, BETA, LIMIT, OUT
                )
                row = _rows_to_write(part, PARTS[p])
                _store_rows(hidden, values, row, part, OUT // 2)


@gluon.jit
def down(
    hidden, words, scales, factor, bias, order, pair_weight, y, block,
    ready, WANTED: gl.constexpr,
    IN: gl.constexpr, OUT: gl.constexpr, SORTED: gl.constexpr, SPLITS: gl.constexpr,
    OUTPUTS: gl.constexpr, HEIGHTS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    INSTRUCTION: gl.constexpr,
):  # fmt: skip
    """The rows of `gate_up` times their expert's weight, weighted, in the order of pairs."""
    for i in gl.static_range(len(HEIGHTS)):
        if schedule.fits(block, HEIGHTS, i):
            PARTS: gl.constexpr = HEIGHTS[i]
            totals = _tile(
                hidden, _rows_of_parts(block, PARTS), words, scales, block, ready, WANTED,
                IN, OUT, SPLITS, OUTPUTS, PARTS, TILES, STAGES, INSTRUCTION,
            )  # fmt: skip
            for p in gl.static_range(len(PARTS)):
                part = schedule.part(block, PARTS, p)
                total = epilogues.in_order(totals[p])
                n = _range(total, 0) + part.column * OUTPUTS
                total = epilogues.scaled(total, n, factor, part, OUT)
                total = epilogues.biased(total, n, bias, part, OUT)
                row = part.start + _range(total, 1)
                pair = schedule.pairs(order, row, part, SORTED)
                total *= gl.load(pair_weight + pair)[None, :]
                pair = schedule.pairs(order, _rows_to_write(part, PARTS[p]), part, SORTED)
                row = pair.to(gl.int64) * SPLITS + part.split
                _store_rows(y, total, row, part, OUT)


@gluon.jit
def rows(
    x, words, scales, factor, result, block,
    IN: gl.constexpr, OUT: gl.constexpr, OUTPUTS: gl.constexpr, HEIGHTS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr, INSTRUCTION: gl.constexpr,
):  # fmt: skip
    """Rows sorted by expert times their expert's weight."""
    for i in gl.static_range(len(HEIGHTS)):
        if schedule.fits(block, HEIGHTS, i):
            PARTS: gl.constexpr = HEIGHTS[i]
            totals = _tile(
                x, _rows_of_parts(block, PARTS), words, scales, block, factor, 0,
                IN, OUT, 1, OUTPUTS, PARTS, TILES, STAGES, INSTRUCTION,
            )  # fmt: skip
            for p in gl.static_range(len(PARTS)):
                part = schedule.part(block, PARTS, p)
                total = epilogues.in_order(totals[p])
                n = _range(total, 0) + part.column * OUTPUTS
                total = epilogues.scaled(total, n, factor, part, OUT)
                _store_rows(result, total, _rows_to_write(part, PARTS[p]), part, OUT)
