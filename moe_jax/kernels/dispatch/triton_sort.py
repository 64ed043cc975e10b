"""Triton kernels for the counting sort of (token, expert) pairs.

A tile is [token, expert]. Where a token's experts are marked in it, the number of marks above one
is the rank of its pair within the expert: the sort needs no comparison of pairs, and no atomics, so
that its result is the same each time. The marks are summed several experts to a word.

Few tokens take one program. Many are split in chunks: a first kernel ranks pairs within their chunk
and counts the chunk's pairs for each expert, and `place_pairs` adds what other chunks hold.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl


@triton.jit
def _look_up(table, index):
    """table[index] of a table [n], in the shape of `index`."""
    return tl.reshape(tl.gather(table, tl.ravel(index), 0), index.shape)


@triton.jit
def _unpack(words, index, PER_WORD: tl.constexpr, BITS: tl.constexpr):
    """The counts numbered `index` of counts that lie PER_WORD to a word, BITS each."""
    word = _look_up(words, (index.to(tl.uint32) // PER_WORD).to(tl.int32))
    return (word >> (index & (PER_WORD - 1)) * BITS) & (2**BITS - 1)


@triton.jit
def _name(
    ids,
    OPTIONS: tl.constexpr,
    token,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Reads the ids of a tile of tokens. There are no OPTIONS.

    Returns them, int32 [token, BLOCK_K], how often they name each expert, int32 [token, expert],
    and how often each pair's expert was named by an earlier pair of its token, like the ids.
    """
    nth = tl.arange(0, BLOCK_K)[None, :]
    here = (token < num_tokens)[:, None] & (nth < K)
    index = tl.load(ids + token[:, None] * K + nth, mask=here, other=-1)
    expert = tl.arange(0, BLOCK_E)[None, :]
    marks = tl.zeros([index.shape[0], BLOCK_E], tl.int32)
    again = tl.zeros(index.shape, tl.int32)
    for j in tl.static_range(K):
        which = tl.sum(tl.where(nth == j, index, 0), 1)[:, None]
        marks += ((which == expert) & (expert < E)).to(tl.int32)
        again += ((which == index) & (nth > j)).to(tl.int32)
    return index, marks, again


@triton.jit
def _rank(marks, index, BITS: tl.constexpr):
    """From marks [token, expert] and the experts of pairs [token, BLOCK_K]: for each pair, the
    marks of its expert by earlier tokens, and int32 [expert], all marks, each below 2**BITS."""
    T: tl.constexpr = marks.shape[0]
    BLOCK_E: tl.constexpr = marks.shape[1]
    PER_WORD: tl.constexpr = min(32 // BITS, BLOCK_E)
    expert = tl.arange(0, BLOCK_E)
    fields = marks << ((expert & (PER_WORD - 1)) * BITS)[None, :]
    words = tl.sum(tl.reshape(fields, [T, BLOCK_E // PER_WORD, PER_WORD]), 2)
    above = tl.ravel(tl.cumsum(words, 0) - words)
    place = tl.arange(0, T)[:, None] * BLOCK_E + index
    sizes = _unpack(tl.sum(words, 0), expert, PER_WORD, BITS)
    return _unpack(above, place, PER_WORD, BITS), sizes


@triton.jit
def clear(counters, COUNTERS: tl.constexpr):
    """Zeros i32 [COUNTERS], for a kernel that counts what it has done."""
    for first in range(0, COUNTERS, 1024):
        at = first + tl.arange(0, 1024)
        tl.store(counters + at, 0, mask=at < COUNTERS)


@triton.jit
def sort_tile(
    marks,
    index,
    again,
    token,
    num_tokens,
    order,
    group_sizes,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BITS: tl.constexpr,
):
    """Sorts all pairs in one program: writes order and group sizes."""
    expert = tl.arange(0, BLOCK_E)
    nth = tl.arange(0, index.shape[1])[None, :]
    here = (token < num_tokens)[:, None] & (nth < K)
    valid = (index >= 0) & (index < E)
    pair_expert = tl.where(valid, index, 0)
    rank, sizes = _rank(marks, pair_expert, BITS)
    tl.store(group_sizes + expert, sizes, mask=expert < E)
    place = rank + again + _look_up(tl.cumsum(sizes, 0) - sizes, pair_expert)
    assigned = tl.sum(sizes, 0)
    if assigned < num_tokens * K:
        absent = (here & (valid == 0)).to(tl.int32)
        lines = tl.sum(absent, 1)
        earlier = (tl.cumsum(lines, 0) - lines)[:, None] + tl.cumsum(absent, 1) - absent
        place = tl.where(valid, place, assigned + earlier)
    tl.store(order + place, token[:, None] * K + nth, mask=here)


@triton.jit
def _rank_tile(
    marks,
    index,
    again,
    sizes,
    token,
    num_tokens,
    rank,
    E: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
):
    """Writes the ranks of a tile's pairs, above the `sizes` of earlier tiles; returns new sizes."""
    nth = tl.arange(0, index.shape[1])[None, :]
    here = (token < num_tokens)[:, None] & (nth < K)
    pair_expert = tl.where((index >= 0) & (index < E), index, 0)
    above, more = _rank(marks, pair_expert, BITS)
    above += again + _look_up(sizes, pair_expert)
    tl.store(rank + token[:, None] * K + nth, above, mask=here)
    return sizes + more


@triton.jit
def rank_chunk(
    MARK: tl.constexpr,
    arguments,
    OPTIONS: tl.constexpr,
    num_tokens,
    rank,
    counts,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes the ranks of the pairs of TILES * BLOCK_T tokens, and the chunk's pairs by expert.

    MARK(*arguments, OPTIONS, ...) -> (index, marks, again) of a tile, as `_name` does.
    """
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    sizes = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(TILES):
        token = (chunk * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        index, marks, again = MARK(*arguments, OPTIONS, token, num_tokens, E, K, BLOCK_E, BLOCK_K)
        sizes = _rank_tile(marks, index, again, sizes, token, num_tokens, rank, E, K, BITS)
    tl.store(counts + chunk * E + expert, sizes, mask=expert < E)


@triton.jit
def sort_once(
    ids,
    num_tokens,
    order,
    group_sizes,
    counters,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Sorts the pairs of up to BLOCK_T tokens in one program: ids [T, K] -> order, sizes."""
    clear(counters, COUNTERS)
    token = tl.arange(0, BLOCK_T)
    index, marks, again = _name(ids, None, token, num_tokens, E, K, BLOCK_E, BLOCK_K)
    sort_tile(marks, index, again, token, num_tokens, order, group_sizes, E, K, BLOCK_E, BITS)


@triton.jit
def sort_chunk(
    ids,
    num_tokens,
    rank,
    counts,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Ranks int32 [P] of the pairs of TILES * BLOCK_T tokens, and counts int32 [chunks, E]."""
    rank_chunk(
        _name, (ids,), None, num_tokens, rank, counts, E, K, BLOCK_T, BLOCK_E, BLOCK_K, BITS, TILES
    )


@triton.jit
def place_pairs(
    ids,
    rank,
    counts,
    num_pairs,
    num_chunks,
    order,
    group_sizes,
    counters,
    E: tl.constexpr,
    CHUNK_PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Places a chunk's pairs from their ranks in the chunk and every chunk's counts."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], tl.int32)
    sizes = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_chunks, BLOCK_C):
        other = first + tl.arange(0, BLOCK_C)
        some = (other < num_chunks)[:, None] & (expert < E)[None, :]
        tile = tl.load(counts + other[:, None] * E + expert[None, :], mask=some, other=0)
        sizes += tl.sum(tile, 0)
        before += tl.sum(tl.where((other < chunk)[:, None], tile, 0), 0)
    if chunk == 0:
        clear(counters, COUNTERS)
        tl.store(group_sizes + expert, sizes, mask=expert < E)
    base = tl.cumsum(sizes, 0) - sizes + before
    missing = tl.sum(sizes, 0) + chunk * CHUNK_PAIRS - tl.sum(before, 0)
    for first in range(0, CHUNK_PAIRS, BLOCK_P):
        within = first + tl.arange(0, BLOCK_P)
        pair = chunk * CHUNK_PAIRS + within
        here = (within < CHUNK_PAIRS) & (pair < num_pairs)
        index = tl.load(ids + pair, mask=here, other=0)
        above = tl.load(rank + pair, mask=here, other=0)
        valid = (index >= 0) & (index < E)
        place = tl.gather(base, tl.where(valid, index, 0), 0) + above
        tl.store(order + place, pair, mask=here & valid)
        none = (here & (valid == 0)).to(tl.int32)
        count = tl.sum(none, 0)
        if count > 0:
            tl.store(order + missing + tl.cumsum(none, 0) - none, pair, mask=none != 0)
            missing += count
