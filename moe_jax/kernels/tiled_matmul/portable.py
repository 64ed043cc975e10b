"""The matmuls of tiled MXFP4 weights in plain Triton, for every NVIDIA GPU with bfloat16.

The schedule, the epilogues and the arithmetic are those of `hopper`, for any sizes; apart are only
what Gluon must write with layouts, under the same names, and the tile: Triton stages the loop and
chooses the instruction. Codes are decoded to float32 and rounded to the dtype of the activations,
which is exact: the products of a code and a scale have two significant bits.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl

from moe_jax.kernels.tiled_matmul import epilogues, schedule


@triton.jit
def _experts(E: tl.constexpr):
    """0, 1, ... for E experts or more."""
    return tl.arange(0, triton.next_power_of_2(E))


@triton.jit
def _range(like, AXIS: tl.constexpr):
    """The indices of an axis of a matrix."""
    return tl.arange(0, like.shape[AXIS])


@triton.jit
def _rows(block, TOKENS: tl.constexpr):
    """The rows of a block of TOKENS: i64 [TOKENS]."""
    return block.start.to(tl.int64) + tl.arange(0, TOKENS)


@triton.jit
def _as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _decode(words, scales, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr):
    """words i32 [2 * OUTPUTS, 4], scales i32 [2 * OUTPUTS] -> [OUTPUTS, 64] of DTYPE.

    Row 16 w + 8 r + g of the result is output 16 w + 2 g + r, as in `hopper`. A code's sign and
    magnitude are moved to where a float32 has its sign and the three bits above and below its
    exponent's last; that number times a power of two is the decoded weight.
    """
    # the low half and the high half, in the upper half of 32 bits
    halves = tl.reshape(tl.join(words << 16, words), [2 * OUTPUTS, 8])
    byte = tl.arange(0, 8) // 2  # of each word: 2 a + r
    scale = _as_float(((scales[:, None] >> (8 * byte)[None, :]) & 255) << 23)
    KEPT: tl.constexpr = 0x81C00000 - (1 << 32)  # as a signed number
    o0 = _as_float(halves & KEPT) * scale
    o1 = _as_float((halves << 3) & KEPT) * scale
    o2 = _as_float((halves << 6) & KEPT) * scale
    sign = (halves << 1) & (-1 << 31)
    high, low = (halves >> 5) & 0x01000000, (halves >> 4) & 0x00C00000
    o3 = _as_float(sign | high | low) * scale
    codes = tl.join(tl.join(o0.to(DTYPE), o1.to(DTYPE)), tl.join(o2.to(DTYPE), o3.to(DTYPE)))
    codes = tl.reshape(codes, [OUTPUTS // 16, 8, 4, 2, 2, 2, 2, 2])  # w g t a r b h p
    return tl.reshape(tl.permute(codes, [0, 4, 1, 3, 7, 6, 2, 5]), [OUTPUTS, 64])


@triton.jit
def _tile(
    x,
    row,
    words,
    scales,
    block,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over this split's inputs: f32 [OUTPUTS, TOKENS]; as in `hopper`."""
    ACROSS: tl.constexpr = (IN + 63) // 64
    SPAN: tl.constexpr = ACROSS // SPLITS
    DOWN: tl.constexpr = (OUT + 15) // 16
    first = block.expert.to(tl.int64) * (DOWN * ACROSS)
    lane = tl.arange(0, 2 * OUTPUTS)
    # where there are no more outputs, the last are read again
    tile = (
        tl.minimum(block.column * (OUTPUTS // 16) + lane // 32, DOWN - 1) * ACROSS
        + block.split * SPAN
    )
    word = tl.arange(0, 4)
    words_at = words + first * 128 + (tile * 128 + lane % 32 * 4)[:, None] + word[None, :]
    scales_at = scales + first * 8 + (tile * 8 + lane % 32 // 4)
    k = tl.arange(0, 64) + block.split * (SPAN * 64)
    x_at = x + (row.to(tl.int64) * IN)[:, None] + k[None, :]
    inside = (tl.arange(0, TOKENS) < block.count)[:, None]
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for i in tl.range(0, SPAN // TILES, num_stages=STAGES):
        for u in tl.static_range(TILES):
            packed = tl.load(words_at + u * 128)
            weights = _decode(packed, tl.load(scales_at + u * 8), OUTPUTS, x.dtype.element_ty)
            if IN % 64 == 0:
                tokens = tl.load(x_at + u * 64, mask=inside, other=0.0)
            else:
                known = (k < IN - (i * TILES + u) * 64)[None, :]
                tokens = tl.load(x_at + u * 64, mask=inside & known, other=0.0)
            total = tl.dot(weights, tl.trans(tokens), total, input_precision="ieee")
        words_at += 128 * TILES
        scales_at += 8 * TILES
        x_at += 64 * TILES
    return total


@triton.jit
def _store_rows(out, values, row, block, OUT: tl.constexpr):
    """Writes a block's values [OUTPUTS, TOKENS] to the rows of out [*, OUT], i64 [TOKENS]."""
    n = block.column * values.shape[0] + tl.arange(0, values.shape[0])
    inside = (tl.arange(0, values.shape[1]) < block.count)[None, :] & (n < OUT)[:, None]
    place = out + (row * OUT)[None, :] + n[:, None]
    tl.store(place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_kernel(
    x,  # [num_pairs // K, IN]
    words,
    scales,
    factor,  # f32 [E, OUT]
    bias,  # [E, OUT]
    ids,  # i32 [num_pairs]
    group_sizes,  # i32 [E]
    order,  # i32 [num_pairs]
    num_pairs,
    hidden,  # [num_pairs, OUT // 2]
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SORTED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    INSTRUCTION: tl.constexpr,
):
    """Each pair's token times its expert's weight, activated; sorted by expert where SORTED."""
    COLUMNS: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    block = schedule.place(ids, group_sizes, num_pairs, E, SORTED, HEIGHTS, COLUMNS, 1, _experts)
    if block.expert == E:
        return
    for i in tl.static_range(len(HEIGHTS)):
        if schedule.fits(block, HEIGHTS, i):
            TOKENS: tl.constexpr = HEIGHTS[i][0]
            pair = schedule.pairs(order, _rows(block, TOKENS), block, SORTED).to(tl.int64)
            total = _tile(
                x, pair // K, words, scales, block,
                IN, OUT, 1, OUTPUTS, TOKENS, TILES, STAGES,
            )  # fmt: skip
            gate, up = epilogues.gate_and_up(total)
            n = 2 * (block.column * (OUTPUTS // 2) + _range(gate, 0))
            values = epilogues.activated(gate, up, n, factor, bias, block, ALPHA, BETA, LIMIT, OUT)
            _store_rows(hidden, values, _rows(block, TOKENS), block, OUT // 2)


@triton.jit(do_not_specialize=["num_pairs"])
def down_kernel(
    hidden,  # [num_pairs, IN]
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
    IN: tl.constexpr,
    OUT: tl.constexpr,
    E: tl.constexpr,
    SORTED: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    INSTRUCTION: tl.constexpr,
):
    """The rows of `gate_up_kernel` times their expert's weight, weighted, in the order of pairs."""
    COLUMNS: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    block = schedule.place(
        ids, group_sizes, num_pairs, E, SORTED, HEIGHTS, COLUMNS, SPLITS, _experts
    )
    if block.expert == E:
        return
    for i in tl.static_range(len(HEIGHTS)):
        if schedule.fits(block, HEIGHTS, i):
            TOKENS: tl.constexpr = HEIGHTS[i][0]
            total = _tile(
                hidden, _rows(block, TOKENS), words, scales, block,
                IN, OUT, SPLITS, OUTPUTS, TOKENS, TILES, STAGES,
            )  # fmt: skip
            total = epilogues.in_order(total)
            n = block.column * OUTPUTS + _range(total, 0)
            total = epilogues.scaled(total, n, factor, block, OUT)
            total = epilogues.biased(total, n, bias, block, OUT)
            pair = schedule.pairs(order, _rows(block, TOKENS), block, SORTED).to(tl.int64)
            total *= tl.load(pair_weight + pair)[None, :]
            _store_rows(y, total, pair * SPLITS + block.split, block, OUT)


@triton.jit(do_not_specialize=["num_rows"])
def rows_kernel(
    x,  # [num_rows, IN]
    words,
    scales,
    factor,  # f32 [E, OUT]
    group_sizes,  # i32 [E]
    num_rows,
    result,  # [num_rows, OUT]
    IN: tl.constexpr,
    OUT: tl.constexpr,
    E: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    INSTRUCTION: tl.constexpr,
):
    """Rows sorted by expert times their expert's weight. Rows past the sum are not written."""
    COLUMNS: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    block = schedule.place(
        group_sizes, group_sizes, num_rows, E, True, HEIGHTS, COLUMNS, 1, _experts
    )
    if block.expert == E:
        return
    for i in tl.static_range(len(HEIGHTS)):
        if schedule.fits(block, HEIGHTS, i):
            TOKENS: tl.constexpr = HEIGHTS[i][0]
            total = _tile(
                x, _rows(block, TOKENS), words, scales, block,
                IN, OUT, 1, OUTPUTS, TOKENS, TILES, STAGES,
            )  # fmt: skip
            total = epilogues.in_order(total)
            n = block.column * OUTPUTS + _range(total, 0)
            total = epilogues.scaled(total, n, factor, block, OUT)
            _store_rows(result, total, _rows(block, TOKENS), block, OUT)
