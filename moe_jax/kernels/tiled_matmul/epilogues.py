"""What becomes of a tile's sums: put in order, scaled, biased, activated.

The functions are written in what plain Triton and Gluon share, and compiled as the language of the
kernel that calls them. Indices are the kernel's to make: in Gluon they need a layout.

Rows of sums are as `weights.decode` leaves them: 16 w + 8 r + g is output 16 w + 2 g + r.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (what kernels are written in looks like Python, but its types are not)

import triton
import triton.language as tl


@triton.jit
def gate_and_up(total):
    """Even and odd outputs, in order: sums f32 [OUTPUTS, TOKENS] -> two [OUTPUTS // 2, TOKENS]."""
    OUTPUTS: tl.constexpr = total.shape[0]
    TOKENS: tl.constexpr = total.shape[1]
    total = tl.permute(tl.reshape(total, [OUTPUTS // 16, 2, 8, TOKENS]), [0, 2, 3, 1])  # w g m r
    gate, up = tl.split(total)
    gate = tl.reshape(gate, [OUTPUTS // 2, TOKENS])
    up = tl.reshape(up, [OUTPUTS // 2, TOKENS])
    return gate, up


@triton.jit
def activated(
    gate,
    up,
    n,
    factor,
    bias,
    block,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    OUT: tl.constexpr,
):
    """SwiGLU of sums f32 [OUTPUTS, TOKENS], scaled and biased; gates are outputs n [OUTPUTS]."""
    at = block.expert * OUT + n
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
def in_order(total):
    """Sums f32 [OUTPUTS, TOKENS] with their rows in the order of outputs."""
    OUTPUTS: tl.constexpr = total.shape[0]
    TOKENS: tl.constexpr = total.shape[1]
    total = tl.permute(tl.reshape(total, [OUTPUTS // 16, 2, 8, TOKENS]), [0, 2, 1, 3])  # w g r m
    return tl.reshape(total, [OUTPUTS, TOKENS])


@triton.jit
def scaled(total, n, factor, block, OUT: tl.constexpr):
    """Sums f32 [OUTPUTS, TOKENS] of the outputs n [OUTPUTS] times their factors."""
    factors = tl.load(factor + block.expert * OUT + n, mask=n < OUT, other=0.0)
    return total * factors[:, None]


@triton.jit
def biased(total, n, bias, block, OUT: tl.constexpr):
    """Sums f32 [OUTPUTS, TOKENS] of the outputs n, with the bias where this is the first split."""
    inside = n < tl.where(block.split == 0, OUT, 0)
    terms = tl.load(bias + block.expert * OUT + n, mask=inside, other=0.0)
    return total + terms.to(tl.float32)[:, None]
