"""Which rows, outputs and inputs a program computes.

The functions are written in what plain Triton and Gluon share, and compiled as the language of the
kernel that calls them.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# (what kernels are written in looks like Python, but its types are not)

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Block(NamedTuple):
    """What a program computes.

    Attributes:
        expert: whose weight; the number of experts where there is nothing to do.
        start: the first of its rows, which are sorted by expert.
        count: how many rows there are.
        column: which outputs, in units of a program's outputs.
        split: which inputs, in units of a split.
        index: the number of its block of rows.
    """

    expert: Any
    start: Any
    count: Any
    column: Any
    split: Any
    index: Any


@triton.constexpr_function
def capacity(heights, i):
    """How many tokens the i-th of the heights holds, in all its parts."""
    return sum(heights[i])


@triton.constexpr_function
def tokens_before(parts, p):
    """How many tokens the parts before the p-th hold."""
    return sum(parts[:p])


@triton.jit
def groups(group_sizes, num_rows, E: tl.constexpr, HEIGHTS: tl.constexpr, EXPERTS: tl.constexpr):
    """(experts, their rows, their blocks of rows), each of E experts or more.

    Every expert's rows are cut into as few blocks as there can be, of one size but for the last.
    Sizes that are wrong reach no foreign memory.

    Args:
        group_sizes: i32 [E], how many rows each expert has.
        num_rows: of all experts.
        EXPERTS: (E) -> 0, 1, ... of E experts or more, in the layout of the kernel's language.
    """
    TOKENS: tl.constexpr = capacity(HEIGHTS, len(HEIGHTS) - 1)
    e = EXPERTS(E)
    sizes = tl.load(group_sizes + e, mask=e < E, other=0)
    sizes = tl.minimum(tl.maximum(sizes, 0), num_rows)
    return e, sizes, (sizes + TOKENS - 1) // TOKENS


@triton.jit
def _rows_of(groups, index, num_rows, E: tl.constexpr):
    """(expert, first row, rows) of the block of that index; E where there is no such block."""
    e, sizes, blocks = groups
    passed = tl.cumsum(blocks, 0) <= index
    expert = tl.minimum(tl.sum(passed.to(tl.int32), 0), E)
    size = tl.sum(tl.where(e == expert, sizes, 0), 0)
    parts = tl.maximum(tl.sum(tl.where(e == expert, blocks, 0), 0), 1)
    rows = (size + parts - 1) // parts
    before = (index - tl.sum(tl.where(passed, blocks, 0), 0)) * rows
    start = tl.sum(tl.where(passed, sizes, 0), 0) + before
    return expert, start, tl.minimum(tl.minimum(size - before, rows), num_rows - start)


@triton.jit
def sorted_block(
    program, groups, num_rows, E: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr
):
    """The `Block` of a program of that number, where rows are sorted by expert."""
    column = program % COLUMNS
    split = program // COLUMNS % SPLITS
    index = program // COLUMNS // SPLITS
    expert, start, count = _rows_of(groups, index, num_rows, E)
    return Block(expert, start, count, column, split, index)


@triton.jit
def single_block(program, ids, E: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    """The `Block` of a program of that number, where every row of experts ids is a block."""
    column = program % COLUMNS
    split = program // COLUMNS % SPLITS
    index = program // COLUMNS // SPLITS
    expert = tl.load(ids + index)
    expert = tl.where(expert < 0, E, tl.minimum(expert, E))
    return Block(expert, index, 1, column, split, index)


@triton.jit
def place(
    ids,
    group_sizes,
    num_rows,
    E: tl.constexpr,
    SORTED: tl.constexpr,
    HEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The `Block` of this program; see `groups`, `sorted_block` and `single_block`."""
    program = tl.program_id(0)
    if SORTED:
        cut = groups(group_sizes, num_rows, E, HEIGHTS, EXPERTS)
        return sorted_block(program, cut, num_rows, E, COLUMNS, SPLITS)
    else:
        return single_block(program, ids, E, COLUMNS, SPLITS)


@triton.jit
def fits(block, HEIGHTS: tl.constexpr, i: tl.constexpr):
    """Whether the i-th of the ascending heights is the least that holds the block's rows."""
    count = block.count
    fits = count <= capacity(HEIGHTS, i) if i + 1 < len(HEIGHTS) else count > 0
    return fits & (count > capacity(HEIGHTS, i - 1)) if i > 0 else fits


@triton.jit
def part(block, PARTS: tl.constexpr, p: tl.constexpr):
    """The `Block` of the p-th of the parts that a height is the sum of."""
    first = tokens_before(PARTS, p)
    return Block(
        block.expert,
        block.start + first,
        block.count - first,
        block.column,
        block.split,
        block.index,
    )


@triton.jit
def pairs(order, row, block, SORTED: tl.constexpr):
    """The pairs of a block's rows, like `row`; pair 0 for those past the block's end."""
    inside = row < block.start + block.count
    if SORTED:
        return tl.load(order + row, mask=inside, other=0)
    else:
        return tl.where(inside, row, 0)
