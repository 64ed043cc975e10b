"""Triton kernels for routing: logits to ids, weights, and pairs sorted as in `triton_sort`.

A tile is [token, expert]. Choosing takes `K` rounds of arg max over experts, on integer keys that
order floats. The experts that have been taken are the marks that pairs are sorted by.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl

from moe_jax.kernels.dispatch import triton_sort

_NAN = tl.constexpr(0x7FFFFFFF)
_MINUS_INF = tl.constexpr(-0x7F800001)
_TAKEN = tl.constexpr(-0x80000000)


@triton.jit
def _key(x):
    """int32 in the order of float32 `x`: both zeros are one, and any NaN is above all else."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(key):
    """The float32 of a key; of NaN's, a NaN."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _choose(
    logits,
    token_mask,
    first_expert,
    ids,
    pair_weight,
    OPTIONS: tl.constexpr,
    token,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes ids and weights of a tile of tokens; OPTIONS are (ALL, HAS_MASK).

    Tokens choose among ALL experts. Where those are more than E, only E from `first_expert` on are
    known here: ids count from that one, and a pair of another has no expert.

    Returns the ids, int32 [token, BLOCK_K], the experts they mark, int32 [token, expert], and 0:
    a token chooses no expert again.
    """
    ALL: tl.constexpr = OPTIONS[0]
    HAS_MASK: tl.constexpr = OPTIONS[1]
    expert = tl.arange(0, BLOCK_E)[None, :]
    nth = tl.arange(0, BLOCK_K)[None, :]
    here = token < num_tokens
    real = here[:, None] & (expert < ALL)
    x = tl.load(logits + token[:, None] * ALL + expert, mask=real, other=float("-inf"))
    keep = here
    if HAS_MASK:
        keep = tl.load(token_mask + token, mask=here, other=0) != 0
    key = tl.where(expert < ALL, _key(x.to(tl.float32)), _TAKEN)
    index = tl.full([token.shape[0], BLOCK_K], ALL, tl.int32)
    found = tl.full([token.shape[0], BLOCK_K], _MINUS_INF, tl.int32)
    for j in tl.static_range(K):
        best = tl.max(key, 1)[:, None]
        where = tl.min(tl.where(key == best, expert, BLOCK_E), 1)[:, None]
        key = tl.where(expert == where, _TAKEN, key)
        index = tl.where(nth == j, where, index)
        found = tl.where(nth == j, best, found)
    top = tl.max(found, 1)[:, None]
    unknown = top == _NAN
    valid = keep[:, None] & (nth < K) & ((found > _MINUS_INF) | unknown)
    gate = tl.where(valid, tl.exp(_value(found) - _value(top)), 0.0)
    total = tl.sum(gate, 1)[:, None]
    weight = tl.where(unknown, float("nan"), gate * tl.where(total == 0.0, 0.0, 1.0 / total))
    if E < ALL:
        index -= tl.load(first_expert)
        valid &= (index >= 0) & (index < E)
    weight = tl.where(valid, weight, 0.0)
    index = tl.where(valid, index, E)
    pair = token[:, None] * K + nth
    tl.store(ids + pair, index, mask=here[:, None] & (nth < K))
    tl.store(pair_weight + pair, weight, mask=here[:, None] & (nth < K))
    if E < ALL:
        marks = tl.zeros([token.shape[0], BLOCK_E], tl.int32)
        for j in tl.static_range(K):
            own = tl.sum(tl.where(nth == j, index, 0), 1)[:, None]
            marks += ((own == expert) & (expert < E)).to(tl.int32)
        return index, marks, 0
    else:
        barred = (_key(x.to(tl.float32)) <= _MINUS_INF) & (top != _NAN)
        marks = (key == _TAKEN) & (expert < E) & keep[:, None] & (barred == 0)
        return index, marks.to(tl.int32), 0


@triton.jit
def route_once(
    logits,
    token_mask,
    first_expert,
    num_tokens,
    ids,
    pair_weight,
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
    OPTIONS: tl.constexpr,
):
    """Routes up to BLOCK_T tokens in one program: logits [T, all] -> ids, weights, order, sizes."""
    triton_sort.clear(counters, COUNTERS)
    token = tl.arange(0, BLOCK_T)
    index, marks, again = _choose(
        logits, token_mask, first_expert, ids, pair_weight, OPTIONS,
        token, num_tokens, E, K, BLOCK_E, BLOCK_K,
    )  # fmt: skip
    triton_sort.sort_tile(
        marks, index, again, token, num_tokens, order, group_sizes, E, K, BLOCK_E, BITS
    )


@triton.jit
def route_chunk(
    logits,
    token_mask,
    first_expert,
    num_tokens,
    ids,
    pair_weight,
    rank,
    counts,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    TILES: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Routes TILES * BLOCK_T tokens; ranks int32 [P] within the chunk, counts int32 [chunks, E]."""
    arguments = (logits, token_mask, first_expert, ids, pair_weight)
    triton_sort.rank_chunk(
        _choose,
        arguments,
        OPTIONS,
        num_tokens,
        rank,
        counts,
        E,
        K,
        BLOCK_T,
        BLOCK_E,
        BLOCK_K,
        BITS,
        TILES,
    )
