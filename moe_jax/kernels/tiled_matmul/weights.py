"""Tiled MXFP4 weights in Gluon: from memory to the operand of a matrix instruction.

A lane loads 16 bytes of a tile of 16 outputs x 64 inputs (see `moe_jax.quantization.tiled`), and
decodes them where they are: what comes out is the lane's share of a tensor core's operand, so that
weights never pass through shared memory. An operand's rows are outputs, its columns the tokens of
one expert, so that a matmul may be as narrow as 8 tokens.

This module imports Triton: import it only where a lowering for CUDA needs it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
# (what kernels are written in looks like Python, but its types are not)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _decode_word(word: str, scale: str, results: list[str]) -> list[str]:
    """PTX for the 8 codes of a word: four pairs, each of one input and of the next.

    A code's sign and magnitude are moved to where a bfloat16 has its sign and the three bits above
    and below its exponent's last; that number times a power of two is the decoded weight.
    """
    signs_and_magnitudes = "0x81C081C0"
    lines = [
        f"and.b32 n, {word}, {signs_and_magnitudes};",
        f"fma.rn.bf16x2 {results[0]}, n, {scale}, z;",
    ]
    for i, shift in ((1, 3), (2, 6)):
        lines += [
            f"shl.b32 t, {word}, {shift};",
            f"and.b32 n, t, {signs_and_magnitudes};",
            f"fma.rn.bf16x2 {results[i]}, n, {scale}, z;",
        ]
    return lines + [
        f"shl.b32 t, {word}, 1;",
        "and.b32 n, t, 0x80008000;",
        f"shr.b32 t, {word}, 5;",
        "lop3.b32 n, t, 0x01000100, n, 0xEA;",
        f"shr.b32 t, {word}, 4;",
        "lop3.b32 n, t, 0x00C000C0, n, 0xEA;",
        f"fma.rn.bf16x2 {results[3]}, n, {scale}, z;",
    ]


def _decode_lane() -> str:
    """PTX for a lane: words $16 to $19 and scale bytes $20 -> 16 pairs $0 to $15."""
    lines = [
        ".reg .b32 n, t, z, e, o, s0, s1, s2, s3;",
        ".reg .b16 h0, h1, h2, h3;",
        "mov.b32 z, 0x80008000;",
        "and.b32 e, $20, 0x00FF00FF;",
        "shl.b32 e, e, 7;",
        "shr.b32 o, $20, 1;",
        "and.b32 o, o, 0x7F807F80;",
        "mov.b32 {h0, h2}, e;",
        "mov.b32 {h1, h3}, o;",
    ]
    lines += [f"mov.b32 s{i}, {{h{i}, h{i}}};" for i in range(4)]
    for i in range(4):
        lines += _decode_word(f"${16 + i}", f"s{i}", [f"${4 * o + i}" for o in range(4)])
    return "{\n" + "\n".join(lines) + "\n}"


_DECODE = gl.constexpr(_decode_lane())
# Triton hands over 8 elements of 2 bytes as 4 registers, and the scales, of 4 bytes, 8 times
_REGISTERS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 12))


@gluon.jit
def decode(words, scales, OUTPUTS: gl.constexpr, OPERAND: gl.constexpr):
    """words i32 [2 * OUTPUTS, 4], scales i32 [2 * OUTPUTS] -> bf16 [OUTPUTS, 64].

    Row 16 w + 8 r + g of the result is output 16 w + 2 g + r, so that nothing changes lanes. The
    four words of a lane reach the assembly in their order: it knows which scale belongs to which.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [gl.num_warps(), 1], [1, 0])
    halves = gl.join(words.to(gl.int16), (words >> 16).to(gl.int16))
    halves = gl.convert_layout(gl.reshape(halves, [2 * OUTPUTS, 8]), LANES, assert_trivial=True)
    scales = gl.convert_layout(scales, gl.SliceLayout(1, LANES), assert_trivial=True)
    scales, halves = gl.broadcast(scales[:, None], halves)
    o0, o1, o2, o3 = gl.inline_asm_elementwise(
        _DECODE,
        _REGISTERS,
        [halves, scales],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=8,
    )
    codes = gl.join(gl.join(o0, o1), gl.join(o2, o3))
    codes = gl.reshape(codes, [OUTPUTS // 16, 8, 4, 2, 2, 2, 2, 2])  # w g t a r b h p
    codes = gl.permute(codes, [0, 4, 1, 3, 7, 6, 2, 5])  # w r g a p h t b
    return gl.convert_layout(gl.reshape(codes, [OUTPUTS, 64]), OPERAND, assert_trivial=True)


@gluon.jit
def addresses(
    words,
    scales,
    block,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    SPLITS: gl.constexpr,
    OUTPUTS: gl.constexpr,
):
    """Where the words and scales of the first tile of a `schedule.Block`'s inputs are.

    That is words [2 * OUTPUTS, 4] and scales [2 * OUTPUTS], a lane's in its own registers. A tile
    of inputs further they are 128 words and 8 scales further. Where there are no more
    outputs, the last are read again.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [gl.num_warps(), 1], [1, 0])
    ACROSS: gl.constexpr = IN // 64
    DOWN: gl.constexpr = (OUT + 15) // 16
    first = block.expert.to(gl.int64) * (DOWN * ACROSS)
    lane = gl.arange(0, 2 * OUTPUTS, layout=gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
    down = gl.minimum(block.column * (OUTPUTS // 16) + lane // 32, DOWN - 1)
    tile = down * ACROSS + block.split * (ACROSS // SPLITS)
    words_at = words + first * 128 + (tile * 128 + lane % 32 * 4)[:, None] + word[None, :]
    return words_at, scales + first * 8 + (tile * 8 + lane % 32 // 4)


@gluon.jit
def load(words_at, scales_at, TILES: gl.constexpr):
    """The words and the scales of the next TILES tiles of inputs, as tuples."""
    words, scales = (), ()
    for u in gl.static_range(TILES):
        words = words + (gl.load(words_at + u * 128),)
        scales = scales + (gl.load(scales_at + u * 8),)
    return words, scales


@gluon.jit
def advance(packed, exponents, words_at, scales_at, tile):
    """Of the tiles in flight, the first gives way to a last one, that is `tile` tiles further."""
    packed = packed[1:] + (gl.load(words_at + tile * 128),)
    exponents = exponents[1:] + (gl.load(scales_at + tile * 8),)
    return packed, exponents
