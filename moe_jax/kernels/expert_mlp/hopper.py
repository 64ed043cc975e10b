"""The matmuls of tiled MXFP4 weights in Gluon, for NVIDIA GPUs of compute capability 9.0.

A program computes some outputs for a block of tokens of one expert, and writes what becomes of the
sums: activated rows, or weighted rows of pairs, or the rows themselves.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_jax.kernels.expert_mlp import narrow, weights, wide


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _block_of(group_sizes, index, P: gl.constexpr, E: gl.constexpr, TOKENS: gl.constexpr):
    """(expert, first row, rows) of the block of that index; E where there is no such block.

    Every expert's rows are cut into as few blocks of at most TOKENS as there can be, of one size
    but for the last. Sizes that are wrong reach no foreign memory.
    """
    PADDED: gl.constexpr = max(32, 1 << (E - 1).bit_length())
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    e = gl.arange(0, PADDED, layout=LAYOUT)
    sizes = gl.load(group_sizes + e, mask=e < E, other=0)
    sizes = gl.minimum(gl.maximum(sizes, 0), P)
    blocks = (sizes + TOKENS - 1) // TOKENS
    passed = gl.associative_scan(blocks, 0, _add) <= index
    expert = gl.minimum(gl.sum(passed.to(gl.int32), 0), E)
    size = gl.sum(gl.where(e == expert, sizes, 0), 0)
    parts = gl.maximum((size + TOKENS - 1) // TOKENS, 1)
    rows = (size + parts - 1) // parts
    before = (index - gl.sum(gl.where(passed, blocks, 0), 0)) * rows
    start = gl.sum(gl.where(passed, sizes, 0), 0) + before
    return expert, start, gl.minimum(gl.minimum(size - before, rows), P - start)


@gluon.jit
def _place(
    ids,
    group_sizes,
    num_pairs,
    E: gl.constexpr,
    SORTED: gl.constexpr,
    TOKENS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """(expert, first row, rows, column, split) of this program; E where it has nothing to do."""
    program = gl.program_id(0)
    column = program % COLUMNS
    split = program // COLUMNS % SPLITS
    block = program // COLUMNS // SPLITS
    if SORTED:
        expert, start, count = _block_of(group_sizes, block, num_pairs, E, TOKENS)
    else:
        expert = gl.load(ids + block)
        expert = gl.where(expert < 0, E, gl.minimum(expert, E))
        start, count = block, 1
    return expert, start, count, column, split


@triton.constexpr_function
def _capacity(heights, i):
    """How many tokens the i-th of the heights holds, in all its parts."""
    return sum(heights[i])


@gluon.jit
def _fits(count, HEIGHTS: gl.constexpr, i: gl.constexpr):
    """Whether the i-th of the ascending heights is the least that holds so many rows."""
    fits = count <= _capacity(HEIGHTS, i) if i + 1 < len(HEIGHTS) else count > 0
    return fits & (count > _capacity(HEIGHTS, i - 1)) if i > 0 else fits


@gluon.jit
def _tile(
    x, rows, count, words, scales, expert, column, split,
    IN: gl.constexpr, OUT: gl.constexpr, SPLITS: gl.constexpr, OUTPUTS: gl.constexpr,
    PARTS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, INSTRUCTION: gl.constexpr,
):  # fmt: skip
    """The tile's sums by the instruction that the configuration names."""
    gl.static_assert(INSTRUCTION == "wgmma" or INSTRUCTION == "mma")
    if INSTRUCTION == "wgmma":
        return wide.tile(
            x, rows, count, words, scales, expert, column, split,
            IN, OUT, SPLITS, OUTPUTS, PARTS, TILES, STAGES,
        )  # fmt: skip
    else:
        return narrow.tile(
            x, rows, count, words, scales, expert, column, split,
            IN, OUT, SPLITS, OUTPUTS, PARTS, TILES, STAGES,
        )  # fmt: skip


@gluon.jit
def _rows(start, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows of a block: i32 [TOKENS], of that layout."""
    return start + gl.arange(0, TOKENS, layout=LAYOUT)


@gluon.jit
def _pairs(order, start, count, SORTED: gl.constexpr, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """The pairs of a block's rows: i32 [TOKENS]; pair 0 for those past its end."""
    row = _rows(start, TOKENS, LAYOUT)
    if SORTED:
        return gl.load(order + row, mask=row < start + count, other=0)
    else:
        return gl.where(row < start + count, row, 0)


@triton.constexpr_function
def _store_layout(warps):
    """The layout in which rows are written: 8 neighbours a lane."""
    return gl.BlockedLayout([1, 8], [8, 4], [warps, 1], [1, 0])


@gluon.jit
def _store_rows(out, values, row, count, column, OUT: gl.constexpr):
    """Writes values [OUTPUTS, TOKENS] to the rows, i32 or i64 [TOKENS], of out [*, OUT]."""
    ROWS: gl.constexpr = _store_layout(gl.num_warps())
    values = gl.permute(values.to(out.dtype.element_ty), [1, 0])
    values = gl.convert_layout(values, ROWS)
    m = gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, ROWS))
    n = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, ROWS)) + column * values.shape[1]
    inside = (m < count)[:, None] & (n < OUT)[None, :]
    gl.store(out + (row.to(gl.int64) * OUT)[:, None] + n[None, :], values, mask=inside)


@gluon.jit
def _gated(
    total,
    factor,
    bias,
    expert,
    column,
    ALPHA: gl.constexpr,
    BETA: gl.constexpr,
    LIMIT: gl.constexpr,
    OUT: gl.constexpr,
):
    """The activation of a sum of `tile`: f32 [OUTPUTS, TOKENS] -> [OUTPUTS // 2, TOKENS]."""
    OUTPUTS: gl.constexpr = total.shape[0]
    TOKENS: gl.constexpr = total.shape[1]
    total = gl.permute(gl.reshape(total, [OUTPUTS // 16, 2, 8, TOKENS]), [0, 2, 3, 1])  # w g m r
    gate, up = gl.split(total)
    gate = gl.reshape(gate, [OUTPUTS // 2, TOKENS])
    up = gl.reshape(up, [OUTPUTS // 2, TOKENS])
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gate.type.layout)
    n = 2 * (column * (OUTPUTS // 2) + gl.arange(0, OUTPUTS // 2, layout=LAYOUT))
    at = expert * OUT + n
    inside = n < OUT
    gate *= gl.load(factor + at, mask=inside, other=0.0)[:, None]
    up *= gl.load(factor + at + 1, mask=inside, other=0.0)[:, None]
    gate += gl.load(bias + at, mask=inside, other=0.0).to(gl.float32)[:, None]
    up += gl.load(bias + at + 1, mask=inside, other=0.0).to(gl.float32)[:, None]
    if LIMIT is not None:
        ALL: gl.constexpr = tl.PropagateNan.ALL
        gate = gl.minimum(gate, LIMIT, propagate_nan=ALL)
        up = gl.minimum(gl.maximum(up, -LIMIT, propagate_nan=ALL), LIMIT, propagate_nan=ALL)
    return gate / (1.0 + gl.exp(-ALPHA * gate)) * (up + BETA)


@gluon.jit
def _scaled(total, factor, expert, column, OUT: gl.constexpr):
    """A sum of `tile` times its outputs' factors, in order, and where its outputs are."""
    OUTPUTS: gl.constexpr = total.shape[0]
    TOKENS: gl.constexpr = total.shape[1]
    total = gl.permute(gl.reshape(total, [OUTPUTS // 16, 2, 8, TOKENS]), [0, 2, 1, 3])  # w g r m
    total = gl.reshape(total, [OUTPUTS, TOKENS])
    n = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, total.type.layout)) + column * OUTPUTS
    total *= gl.load(factor + expert * OUT + n, mask=n < OUT, other=0.0)[:, None]
    return total, n


@gluon.jit(do_not_specialize=["num_pairs"])
def gate_up_kernel(
    x,  # bf16 [num_pairs // K, IN]
    words,
    scales,
    factor,  # f32 [E, OUT]
    bias,  # [E, OUT]
    ids,  # i32 [num_pairs]
    group_sizes,  # i32 [E]
    order,  # i32 [num_pairs]
    num_pairs,
    hidden,  # bf16 [num_pairs, OUT // 2]
    ALPHA: gl.constexpr,
    BETA: gl.constexpr,
    LIMIT: gl.constexpr,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    E: gl.constexpr,
    K: gl.constexpr,
    SORTED: gl.constexpr,
    OUTPUTS: gl.constexpr,
    HEIGHTS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    INSTRUCTION: gl.constexpr,
):
    """Each pair's token times its expert's weight, activated; sorted by expert where SORTED."""
    COLUMNS: gl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    ROWS: gl.constexpr = gl.SliceLayout(1, weights.read_layout(gl.num_warps()))
    STORED: gl.constexpr = gl.SliceLayout(1, _store_layout(gl.num_warps()))
    expert, start, count, column, split = _place(
        ids, group_sizes, num_pairs, E, SORTED, _capacity(HEIGHTS, len(HEIGHTS) - 1), COLUMNS, 1
    )
    if expert == E:
        return
    for i in gl.static_range(len(HEIGHTS)):
        if _fits(count, HEIGHTS, i):
            rows = ()
            for p in gl.static_range(len(HEIGHTS[i])):
                first = weights.tokens_before(HEIGHTS[i], p)
                pair = _pairs(order, start + first, count - first, SORTED, HEIGHTS[i][p], ROWS)
                rows = rows + (pair // K,)
            totals = _tile(
                x, rows, count, words, scales, expert, column, split,
                IN, OUT, 1, OUTPUTS, HEIGHTS[i], TILES, STAGES, INSTRUCTION,
            )  # fmt: skip
            for p in gl.static_range(len(HEIGHTS[i])):
                first = weights.tokens_before(HEIGHTS[i], p)
                values = _gated(totals[p], factor, bias, expert, column, ALPHA, BETA, LIMIT, OUT)
                row = _rows(start + first, HEIGHTS[i][p], STORED)
                _store_rows(hidden, values, row, count - first, column, OUT // 2)


@gluon.jit(do_not_specialize=["num_pairs"])
def down_kernel(
    hidden,  # bf16 [num_pairs, IN]
    words,
    scales,
    factor,  # f32 [E, OUT]
    bias,  # [E, OUT]
    ids,  # i32 [num_pairs]
    group_sizes,  # i32 [E]
    order,  # i32 [num_pairs]
    pair_weight,  # f32 [num_pairs]
    num_pairs,
    y,  # [num_pairs * SPLITS, OUT]
    IN: gl.constexpr,
    OUT: gl.constexpr,
    E: gl.constexpr,
    SORTED: gl.constexpr,
    SPLITS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    HEIGHTS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    INSTRUCTION: gl.constexpr,
):
    """The rows of `gate_up_kernel` times their expert's weight, weighted, in the order of pairs."""
    COLUMNS: gl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    ROWS: gl.constexpr = gl.SliceLayout(1, weights.read_layout(gl.num_warps()))
    STORED: gl.constexpr = gl.SliceLayout(1, _store_layout(gl.num_warps()))
    expert, start, count, column, split = _place(
        ids,
        group_sizes,
        num_pairs,
        E,
        SORTED,
        _capacity(HEIGHTS, len(HEIGHTS) - 1),
        COLUMNS,
        SPLITS,
    )
    if expert == E:
        return
    for i in gl.static_range(len(HEIGHTS)):
        if _fits(count, HEIGHTS, i):
            rows = ()
            for p in gl.static_range(len(HEIGHTS[i])):
                first = weights.tokens_before(HEIGHTS[i], p)
                rows = rows + (_rows(start + first, HEIGHTS[i][p], ROWS),)
            totals = _tile(
                hidden, rows, count, words, scales, expert, column, split,
                IN, OUT, SPLITS, OUTPUTS, HEIGHTS[i], TILES, STAGES, INSTRUCTION,
            )  # fmt: skip
            for p in gl.static_range(len(HEIGHTS[i])):
                first = weights.tokens_before(HEIGHTS[i], p)
                total, n = _scaled(totals[p], factor, expert, column, OUT)
                biased = n < gl.where(split == 0, OUT, 0)  # one split adds it
                terms = gl.load(bias + expert * OUT + n, mask=biased, other=0.0)
                total += terms.to(gl.float32)[:, None]
                pair = _pairs(
                    order, start + first, count - first, SORTED, HEIGHTS[i][p],
                    gl.SliceLayout(0, total.type.layout),
                )  # fmt: skip
                total *= gl.load(pair_weight + pair)[None, :]
                pair = _pairs(order, start + first, count - first, SORTED, HEIGHTS[i][p], STORED)
                row = pair.to(gl.int64) * SPLITS + split
                _store_rows(y, total, row, count - first, column, OUT)


@gluon.jit(do_not_specialize=["num_rows"])
def rows_kernel(
    x,  # bf16 [num_rows, IN]
    words,
    scales,
    factor,  # f32 [E, OUT]
    group_sizes,  # i32 [E]
    num_rows,
    result,  # bf16 [num_rows, OUT]
    IN: gl.constexpr,
    OUT: gl.constexpr,
    E: gl.constexpr,
    OUTPUTS: gl.constexpr,
    HEIGHTS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    INSTRUCTION: gl.constexpr,
):
    """Rows sorted by expert times their expert's weight. Rows past the sum are not written."""
    COLUMNS: gl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    ROWS: gl.constexpr = gl.SliceLayout(1, weights.read_layout(gl.num_warps()))
    STORED: gl.constexpr = gl.SliceLayout(1, _store_layout(gl.num_warps()))
    expert, start, count, column, split = _place(
        group_sizes,
        group_sizes,
        num_rows,
        E,
        True,
        _capacity(HEIGHTS, len(HEIGHTS) - 1),
        COLUMNS,
        1,
    )
    if expert == E:
        return
    for i in gl.static_range(len(HEIGHTS)):
        if _fits(count, HEIGHTS, i):
            rows = ()
            for p in gl.static_range(len(HEIGHTS[i])):
                first = weights.tokens_before(HEIGHTS[i], p)
                rows = rows + (_rows(start + first, HEIGHTS[i][p], ROWS),)
            totals = _tile(
                x, rows, count, words, scales, expert, column, split,
                IN, OUT, 1, OUTPUTS, HEIGHTS[i], TILES, STAGES, INSTRUCTION,
            )  # fmt: skip
            for p in gl.static_range(len(HEIGHTS[i])):
                first = weights.tokens_before(HEIGHTS[i], p)
                total, n = _scaled(totals[p], factor, expert, column, OUT)
                row = _rows(start + first, HEIGHTS[i][p], STORED)
                _store_rows(result, total, row, count - first, column, OUT)
