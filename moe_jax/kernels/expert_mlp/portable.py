"""The matmuls of tiled MXFP4 weights in plain Triton, for every NVIDIA GPU with bfloat16.

The same layout and arithmetic as in `hopper`, for any sizes. Codes are decoded to float32 and
rounded to the dtype of the activations, which is exact: the products of a code and a scale have two
significant bits.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl


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
def _block_of(group_sizes, index, num_rows, E: tl.constexpr, TOKENS: tl.constexpr):
    """(expert, first row, rows) of the block of that index; E where there is no such block.

    Every expert's rows are cut into as few blocks of at most TOKENS as there can be, of one size
    but for the last. Sizes that are wrong reach no foreign memory.
    """
    e = tl.arange(0, triton.next_power_of_2(E))
    sizes = tl.load(group_sizes + e, mask=e < E, other=0)
    sizes = tl.minimum(tl.maximum(sizes, 0), num_rows)
    blocks = (sizes + TOKENS - 1) // TOKENS
    passed = tl.cumsum(blocks, 0) <= index
    expert = tl.minimum(tl.sum(passed.to(tl.int32)), E)
    size = tl.sum(tl.where(e == expert, sizes, 0))
    parts = tl.maximum((size + TOKENS - 1) // TOKENS, 1)
    rows = (size + parts - 1) // parts
    before = (index - tl.sum(tl.where(passed, blocks, 0))) * rows
    start = tl.sum(tl.where(passed, sizes, 0)) + before
    return expert, start, tl.minimum(tl.minimum(size - before, rows), num_rows - start)


@triton.jit
def _place(
    ids,
    group_sizes,
    num_pairs,
    E: tl.constexpr,
    SORTED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """(expert, first row, rows, column, split) of this program; E where it has nothing to do."""
    program = tl.program_id(0)
    column = program % COLUMNS
    split = program // COLUMNS % SPLITS
    block = program // COLUMNS // SPLITS
    if SORTED:
        expert, start, count = _block_of(group_sizes, block, num_pairs, E, TOKENS)
    else:
        expert = tl.load(ids + block)
        expert = tl.where(expert < 0, E, tl.minimum(expert, E))
        start, count = block, 1
    return expert, start, count, column, split


@triton.jit
def _fits(count, HEIGHTS: tl.constexpr, i: tl.constexpr):
    """Whether the i-th of the ascending heights is the least that holds so many rows."""
    fits = count <= HEIGHTS[i][0] if i + 1 < len(HEIGHTS) else count > 0
    return fits & (count > HEIGHTS[i - 1][0]) if i > 0 else fits


@triton.jit
def _tile(
    x,
    row,
    count,
    words,
    scales,
    expert,
    column,
    split,
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
    first = expert.to(tl.int64) * (DOWN * ACROSS)
    lane = tl.arange(0, 2 * OUTPUTS)
    # where there are no more outputs, the last are read again
    tile = tl.minimum(column * (OUTPUTS // 16) + lane // 32, DOWN - 1) * ACROSS + split * SPAN
    word = tl.arange(0, 4)
    words_at = words + first * 128 + (tile * 128 + lane % 32 * 4)[:, None] + word[None, :]
    scales_at = scales + first * 8 + (tile * 8 + lane % 32 // 4)
    k = tl.arange(0, 64) + split * (SPAN * 64)
    x_at = x + (row.to(tl.int64) * IN)[:, None] + k[None, :]
    inside = (tl.arange(0, TOKENS) < count)[:, None]
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
def _store_rows(out, values, row, count, column, OUT: tl.constexpr):
    """Writes values [outputs, tokens] to the rows of out [*, OUT]."""
    n = column * values.shape[0] + tl.arange(0, values.shape[0])
    inside = (tl.arange(0, values.shape[1]) < count)[None, :] & (n < OUT)[:, None]
    place = out + (row * OUT)[None, :] + n[:, None]
    tl.store(place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows(start, TOKENS: tl.constexpr):
    return start.to(tl.int64) + tl.arange(0, TOKENS)


@triton.jit
def _pairs(order, start, count, SORTED: tl.constexpr, TOKENS: tl.constexpr):
    """The pairs of a block's rows, i64 [TOKENS]; pair 0 for those past its end."""
    row = _rows(start, TOKENS)
    if SORTED:
        return tl.load(order + row, mask=row < start + count, other=0).to(tl.int64)
    else:
        return tl.where(row < start + count, row, 0)


@triton.jit
def _gated(
    total,
    factor,
    bias,
    expert,
    column,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    OUT: tl.constexpr,
):
    """The activation of a sum of `_tile`: f32 [OUTPUTS, TOKENS] -> [OUTPUTS // 2, TOKENS]."""
    OUTPUTS: tl.constexpr = total.shape[0]
    TOKENS: tl.constexpr = total.shape[1]
    total = tl.permute(tl.reshape(total, [OUTPUTS // 16, 2, 8, TOKENS]), [0, 2, 3, 1])  # w g m r
    gate, up = tl.split(total)
    gate = tl.reshape(gate, [OUTPUTS // 2, TOKENS])
    up = tl.reshape(up, [OUTPUTS // 2, TOKENS])
    n = 2 * (column * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2))
    at = expert * OUT + n
    inside = n < OUT
    gate *= tl.load(factor + at, mask=inside, other=0.0)[:, None]
    up *= tl.load(factor + at + 1, mask=inside, other=0.0)[:, None]
    gate += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[:, None]
    up += tl.load(bias + at + 1, mask=inside, other=0.0).to(tl.float32)[:, None]
    if LIMIT is not None:
        ALL: tl.constexpr = tl.PropagateNan.ALL
        gate = tl.minimum(gate, LIMIT, propagate_nan=ALL)
        up = tl.minimum(tl.maximum(up, -LIMIT, propagate_nan=ALL), LIMIT, propagate_nan=ALL)
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + BETA)


@triton.jit
def _scaled(total, factor, expert, column, OUT: tl.constexpr):
    """A sum of `_tile` times its outputs' factors, in order, and where its outputs are."""
    OUTPUTS: tl.constexpr = total.shape[0]
    TOKENS: tl.constexpr = total.shape[1]
    total = tl.permute(tl.reshape(total, [OUTPUTS // 16, 2, 8, TOKENS]), [0, 2, 1, 3])  # w g r m
    total = tl.reshape(total, [OUTPUTS, TOKENS])
    n = column * OUTPUTS + tl.arange(0, OUTPUTS)
    total *= tl.load(factor + expert * OUT + n, mask=n < OUT, other=0.0)[:, None]
    return total, n


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
    expert, start, count, column, split = _place(
        ids, group_sizes, num_pairs, E, SORTED, HEIGHTS[len(HEIGHTS) - 1][0], COLUMNS, 1
    )
    if expert == E:
        return
    for i in tl.static_range(len(HEIGHTS)):
        if _fits(count, HEIGHTS, i):
            TOKENS: tl.constexpr = HEIGHTS[i][0]
            token = _pairs(order, start, count, SORTED, TOKENS) // K
            total = _tile(
                x, token, count, words, scales, expert, column, split,
                IN, OUT, 1, OUTPUTS, TOKENS, TILES, STAGES,
            )  # fmt: skip
            values = _gated(total, factor, bias, expert, column, ALPHA, BETA, LIMIT, OUT)
            _store_rows(hidden, values, _rows(start, TOKENS), count, column, OUT // 2)


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
    expert, start, count, column, split = _place(
        ids, group_sizes, num_pairs, E, SORTED, HEIGHTS[len(HEIGHTS) - 1][0], COLUMNS, SPLITS
    )
    if expert == E:
        return
    for i in tl.static_range(len(HEIGHTS)):
        if _fits(count, HEIGHTS, i):
            TOKENS: tl.constexpr = HEIGHTS[i][0]
            total = _tile(
                hidden, _rows(start, TOKENS), count, words, scales, expert, column, split,
                IN, OUT, SPLITS, OUTPUTS, TOKENS, TILES, STAGES,
            )  # fmt: skip
            total, n = _scaled(total, factor, expert, column, OUT)
            biased = n < tl.where(split == 0, OUT, 0)  # one split adds it
            terms = tl.load(bias + expert * OUT + n, mask=biased, other=0.0)
            total += terms.to(tl.float32)[:, None]
            pair = _pairs(order, start, count, SORTED, TOKENS)
            total *= tl.load(pair_weight + pair)[None, :]
            _store_rows(y, total, pair * SPLITS + split, count, column, OUT)


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
    expert, start, count, column, split = _place(
        group_sizes, group_sizes, num_rows, E, True, HEIGHTS[len(HEIGHTS) - 1][0], COLUMNS, 1
    )
    if expert == E:
        return
    for i in tl.static_range(len(HEIGHTS)):
        if _fits(count, HEIGHTS, i):
            TOKENS: tl.constexpr = HEIGHTS[i][0]
            total = _tile(
                x, _rows(start, TOKENS), count, words, scales, expert, column, split,
                IN, OUT, 1, OUTPUTS, TOKENS, TILES, STAGES,
            )  # fmt: skip
            total, n = _scaled(total, factor, expert, column, OUT)
            _store_rows(result, total, _rows(start, TOKENS), count, column, OUT)
