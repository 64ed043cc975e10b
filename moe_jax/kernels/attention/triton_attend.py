"""Triton kernels for attention with sinks and windows, by position.

A program has some queries of all heads that read one key/value head, and goes over the blocks of
keys that they may see. Scores never leave its registers. Constants of all kernels:

    SHAPE      heads, key/value heads, features of a head
    BLOCKS     queries, heads that read a key/value head, keys, features, as in `blocks.Blocks`
    OPTIONS    the window or 0, what scores are multiplied by, `blocks.Blocks.skips_masks`

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e30)  # of logits; no infinity, whose differences are NaN
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_whole(
    q,
    k,
    v,
    sinks,
    q_at,
    k_at,
    ranges,
    num_queries,
    num_keys,
    out,
    SHAPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Attention of a block of queries over all keys; see `api`."""
    H: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[2]
    place, row, head, column, real = _rows(num_queries, SHAPE, BLOCKS)
    largest, total, mixed = _scan(
        q, k, v, sinks, q_at, k_at, ranges, num_queries, num_keys, place, row, head, column, real,
        0, 1, SHAPE, BLOCKS, OPTIONS,
    )  # fmt: skip
    at = ((place[0].to(tl.int64) * num_queries + row) * H + head)[:, None] * D + column[None, :]
    inside = real[:, None] & (column < D)[None, :]
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def attend_part(
    q,
    k,
    v,
    sinks,
    q_at,
    k_at,
    ranges,
    num_queries,
    num_keys,
    out,
    largest_out,
    total_out,
    SPLITS: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """The same over a part of the keys, not divided by the sum of its weights yet.

    Results {split, b, q, h, hd}, and the logarithm (base 2) that weights are relative to and their
    sum, {split, b, q, h}.
    """
    H: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[2]
    split = tl.program_id(1)
    place, row, head, column, real = _rows(num_queries, SHAPE, BLOCKS)
    largest, total, mixed = _scan(
        q, k, v, sinks, q_at, k_at, ranges, num_queries, num_keys, place, row, head, column, real,
        split, SPLITS, SHAPE, BLOCKS, OPTIONS,
    )  # fmt: skip
    batch = tl.num_programs(0) // (SHAPE[1] * tl.cdiv(num_queries, BLOCKS[0]))
    first = (split * batch + place[0]).to(tl.int64) * num_queries
    at = (first + row) * H + head
    inside = real[:, None] & (column < D)[None, :]
    tl.store(out + at[:, None] * D + column[None, :], mixed, mask=inside)
    tl.store(largest_out + at, largest, mask=real)
    tl.store(total_out + at, total, mask=real)


@triton.jit
def _rows(num_queries, SHAPE: tl.constexpr, BLOCKS: tl.constexpr):
    """Which batch row, key/value head and block of queries is this program's; and its rows.

    A row is a query of a head: (place, query [rows], head [rows], column [D], is real [rows]).
    """
    H: tl.constexpr = SHAPE[0]
    KV: tl.constexpr = SHAPE[1]
    GROUP: tl.constexpr = H // KV
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    BLOCK_G: tl.constexpr = BLOCKS[1]
    count = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0)
    block = count - 1 - program % count  # the last queries see the most keys, and start first
    kv = (program // count) % KV
    b = program // (count * KV)
    lane = tl.arange(0, BLOCK_Q * BLOCK_G)
    row = block * BLOCK_Q + lane // BLOCK_G
    member = lane % BLOCK_G
    real = (row < num_queries) & (member < GROUP)
    column = tl.arange(0, BLOCKS[3])
    return (b, kv, block), row, kv * GROUP + member, column, real


@triton.jit
def _scan(
    q, k, v, sinks, q_at, k_at, ranges, num_queries, num_keys, place, row, head, column, real,
    split, SPLITS: tl.constexpr, SHAPE: tl.constexpr, BLOCKS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Goes over a program's keys: (largest logit [rows], base 2; sum [rows]; mixed [rows, D])."""
    H: tl.constexpr = SHAPE[0]
    KV: tl.constexpr = SHAPE[1]
    D: tl.constexpr = SHAPE[2]
    BLOCK_D: tl.constexpr = BLOCKS[3]
    b = place[0].to(tl.int64)
    inside = (column < D)[None, :]
    at = ((b * num_queries + row) * H + head)[:, None] * D + column[None, :]
    queries = tl.load(q + at, mask=real[:, None] & inside, other=0.0)
    position = tl.load(q_at + b * num_queries + row, mask=real, other=-1)

    sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * _LOG2_E
    largest = tl.where(split == 0, tl.maximum(sink, _LOWEST), _LOWEST) + tl.zeros_like(sink)
    total = tl.where(split == 0, tl.exp2(tl.minimum(sink - largest, 0.0)), 0.0)
    mixed = tl.zeros([row.shape[0], BLOCK_D], tl.float32)

    keys = k + (b * KV + place[1]) * num_keys * D
    values = v + (b * KV + place[1]) * num_keys * D
    k_at += b * num_keys
    ranges += (b * tl.cdiv(num_queries, BLOCKS[0]) + place[2]) * 3
    first, last = tl.load(ranges), tl.load(ranges + 2)
    if SPLITS > 1:
        size = tl.cdiv(last - first, SPLITS)
        first += split * size
        last = tl.minimum(last, first + size)
    state = (largest, total, mixed)
    if OPTIONS[2]:
        clear_end = tl.load(ranges + 1)
        state = _blocks(
            queries, position, keys, values, k_at, num_keys, column,
            first, clear_end, state, False, SHAPE, BLOCKS, OPTIONS,
        )  # fmt: skip
        first = clear_end
    return _blocks(
        queries, position, keys, values, k_at, num_keys, column,
        first, last, state, True, SHAPE, BLOCKS, OPTIONS,
    )  # fmt: skip


@triton.jit
def _blocks(
    queries, position, keys, values, k_at, num_keys, column, first, last, state,
    MASKED: tl.constexpr, SHAPE: tl.constexpr, BLOCKS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Goes over the blocks of keys from `first` to `last`, all of them seen unless MASKED."""
    D: tl.constexpr = SHAPE[2]
    BLOCK_K: tl.constexpr = BLOCKS[2]
    BLOCK_D: tl.constexpr = BLOCKS[3]
    WINDOW: tl.constexpr = OPTIONS[0]
    SCALE: tl.constexpr = OPTIONS[1]
    largest, total, mixed = state
    lane = tl.arange(0, BLOCK_K)
    for block in tl.range(first, last):
        slot = block * BLOCK_K + lane
        at = slot[:, None] * D + column[None, :]
        inside = (slot < num_keys)[:, None] & (column < D)[None, :]
        if MASKED or BLOCK_D != D:
            key = tl.load(keys + at, mask=inside, other=0.0)
            value = tl.load(values + at, mask=inside, other=0.0)
        else:
            key = tl.load(keys + at)
            value = tl.load(values + at)
        scores = tl.dot(queries, key.T) * (SCALE * _LOG2_E)
        if MASKED:
            there = tl.load(k_at + slot, mask=slot < num_keys, other=-1)[None, :]
            seen = (there >= 0) & (there <= position[:, None])
            if WINDOW > 0:
                seen = seen & (there > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        keep = tl.exp2(largest - new)
        total = total * keep + tl.sum(weights, 1)
        mixed = mixed * keep[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed)
        largest = new
    return largest, total, mixed
