"""Triton kernel for the sum of what each token's experts return.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl


@triton.jit
def combine_pairs(
    y,
    ids,
    out,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums the rows y [T * K * SPLITS, D] of each token's pairs of an expert: out [T, D]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    wide = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_D], wide)
    for j in tl.static_range(K * SPLITS):
        # read before it is known whether the pair has an expert, so that one load does not wait
        # for the other
        row = tl.load(y + (token * (K * SPLITS) + j) * D + column, mask=inside, other=0.0).to(wide)
        index = tl.load(ids + token * K + j // SPLITS)
        total += tl.where((index >= 0) & (index < E), row, 0.0)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)
