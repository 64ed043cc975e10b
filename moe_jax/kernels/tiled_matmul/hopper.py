"""The matmuls of tiled MXFP4 weights in Gluon, for NVIDIA GPUs of compute capability 9.0.

A program computes some outputs for a block of tokens of one expert, and writes what becomes of the
sums: activated rows, or weighted rows of pairs, or the rows themselves.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_jax.kernels.tiled_matmul import programs, schedule


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
    block = schedule.place(
        ids, group_sizes, num_pairs, E, SORTED, HEIGHTS, COLUMNS, 1, programs.experts
    )
    if block.expert == E:
        return
    programs.gate_up(
        x, words, scales, factor, bias, order, hidden, block, ALPHA, BETA, LIMIT,
        IN, OUT, K, SORTED, OUTPUTS, HEIGHTS, TILES, STAGES, INSTRUCTION,
    )  # fmt: skip


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
    block = schedule.place(
        ids, group_sizes, num_pairs, E, SORTED, HEIGHTS, COLUMNS, SPLITS, programs.experts
    )
    if block.expert == E:
        return
    programs.down(
        hidden, words, scales, factor, bias, order, pair_weight, y, block, pair_weight, 0,
        IN, OUT, SORTED, SPLITS, OUTPUTS, HEIGHTS, TILES, STAGES, INSTRUCTION,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_pairs"])
def layer_kernel(
    x,  # bf16 [num_pairs // K, SIZE]
    gate_up_words,
    gate_up_scales,
    gate_up_factor,  # f32 [E, 2 * INNER]
    gate_up_bias,  # [E, 2 * INNER]
    down_words,
    down_scales,
    down_factor,  # f32 [E, SIZE]
    down_bias,  # [E, SIZE]
    group_sizes,  # i32 [E]
    order,  # i32 [num_pairs]
    pair_weight,  # f32 [num_pairs]
    _counters,  # where `counters` are, too
    num_pairs,
    counters,  # i32 [TICKETS + blocks], zeros: of tickets, and of each block's programs
    hidden,  # bf16 [num_pairs, INNER]
    y,  # [num_pairs * SPLITS, SIZE]
    ALPHA: gl.constexpr,
    BETA: gl.constexpr,
    LIMIT: gl.constexpr,
    SIZE: gl.constexpr,
    INNER: gl.constexpr,
    E: gl.constexpr,
    K: gl.constexpr,
    SPLITS: gl.constexpr,
    TICKETS: gl.constexpr,
    GATE_UP: gl.constexpr,
    DOWN: gl.constexpr,
):
    """Both matmuls of sorted pairs: the second begins where the first leaves places free.

    Programs take tickets: what a program waits for then belongs to programs that began before it,
    whatever the order in which the GPU starts them. GATE_UP and DOWN are (outputs, heights, tiles,
    stages, instruction).
    """
    UP_COLUMNS: gl.constexpr = (2 * INNER + GATE_UP[0] - 1) // GATE_UP[0]
    COLUMNS: gl.constexpr = (SIZE + DOWN[0] - 1) // DOWN[0]
    HEIGHTS: gl.constexpr = GATE_UP[1]
    gl.static_assert(HEIGHTS == DOWN[1], "both must cut rows into the same blocks")
    ticket = gl.atomic_add(counters, 1, sem="relaxed")
    groups = schedule.groups(group_sizes, num_pairs, E, HEIGHTS, programs.experts)
    blocks = gl.sum(groups[2], 0)
    second = ticket - blocks * UP_COLUMNS
    if second < 0:
        block = schedule.sorted_block(ticket, groups, num_pairs, E, UP_COLUMNS, 1)
        programs.gate_up(
            x, gate_up_words, gate_up_scales, gate_up_factor, gate_up_bias, order, hidden, block,
            ALPHA, BETA, LIMIT, SIZE, 2 * INNER, K, True,
            GATE_UP[0], HEIGHTS, GATE_UP[2], GATE_UP[3], GATE_UP[4],
        )  # fmt: skip
        gl.barrier()  # all have written their rows
        gl.atomic_add(counters + TICKETS + block.index, 1, sem="release")
    elif second < blocks * (COLUMNS * SPLITS):
        block = schedule.sorted_block(second, groups, num_pairs, E, COLUMNS, SPLITS)
        programs.down(
            hidden, down_words, down_scales, down_factor, down_bias, order, pair_weight, y, block,
            counters + TICKETS + block.index, UP_COLUMNS, INNER, SIZE, True, SPLITS,
            DOWN[0], HEIGHTS, DOWN[2], DOWN[3], DOWN[4],
        )  # fmt: skip


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
    block = schedule.place(
        group_sizes, group_sizes, num_rows, E, True, HEIGHTS, COLUMNS, 1, programs.experts
    )
    if block.expert == E:
        return
    programs.rows(
        x, words, scales, factor, result, block,
        IN, OUT, OUTPUTS, HEIGHTS, TILES, STAGES, INSTRUCTION,
    )  # fmt: skip
