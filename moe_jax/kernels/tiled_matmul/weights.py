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

import triton
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


def _tile_scales(scales: str) -> list[str]:
    """PTX for s0 to s3: each of the four exponents where both halves of a pair have theirs."""
    lines = [
        ".reg .b32 e, o;",
        ".reg .b16 h<4>;",
        f"and.b32 e, {scales}, 0x00FF00FF;",
        "shl.b32 e, e, 7;",
        f"shr.b32 o, {scales}, 1;",
        "and.b32 o, o, 0x7F807F80;",
        "mov.b32 {h0, h2}, e;",
        "mov.b32 {h1, h3}, o;",
    ]
    return lines + [f"mov.b32 s{i}, {{h{i}, h{i}}};" for i in range(4)]


def _scale(scales: str, i: int) -> list[str]:
    """PTX for one of them; for a half this takes fewer registers."""
    return [f"prmt.b32 s{i}, {scales}, 0, 0x4{i}4{i};", f"shl.b32 s{i}, s{i}, 7;"]


def _decode_lane(count: int, first: int) -> str:
    """PTX for `count` words of a lane, of which the first is the `first` of its tile.

    $0 on are 4 * count pairs of weights; then come the words, then the scale bytes.
    """
    scales = f"${5 * count}"
    lines = [".reg .b32 n, t, z, s<4>;", "mov.b32 z, 0x80008000;"]
    lines += _tile_scales(scales) if count == 4 else []
    for i in range(count):
        own = first + i
        lines += [] if count == 4 else _scale(scales, own)
        results = [f"${count * o + i}" for o in range(4)]
        lines += _decode_word(f"${4 * count + i}", f"s{own}", results)
    return "{\n" + "\n".join(lines) + "\n}"


_DECODE_TILE = gl.constexpr(_decode_lane(4, 0))
_DECODE_HALVES = gl.constexpr((_decode_lane(2, 0), _decode_lane(2, 2)))


@triton.constexpr_function
def _registers(count):
    """Constraints of the assembly.

    Triton hands over 2 * count elements of 2 bytes as `count` registers, and the scales, of 4 bytes
    each, once for each element.
    """
    return ",".join(["=&r"] * (4 * count) + ["r"] * (3 * count))


@gluon.jit
def decode(words, scales, FIRST: gl.constexpr, OUTPUTS: gl.constexpr, OPERAND: gl.constexpr):
    """words i32 [2 * OUTPUTS, n], scales i32 [2 * OUTPUTS] -> bf16 [OUTPUTS, 16 * n].

    Row 16 w + 8 r + g of the result is output 16 w + 2 g + r, so that nothing changes lanes. A
    lane's words are 4, a tile's, or a half from `split`, from the tile's FIRST on; they reach the
    assembly in their order, as it knows which scale belongs to which.
    """
    COUNT: gl.constexpr = words.shape[1]
    LANES: gl.constexpr = gl.BlockedLayout([1, 2 * COUNT], [32, 1], [gl.num_warps(), 1], [1, 0])
    halves = gl.join(words.to(gl.int16), (words >> 16).to(gl.int16))
    halves = gl.reshape(halves, [2 * OUTPUTS, 2 * COUNT])
    halves = gl.convert_layout(halves, LANES, assert_trivial=True)
    scales = gl.convert_layout(scales, gl.SliceLayout(1, LANES), assert_trivial=True)
    scales, halves = gl.broadcast(scales[:, None], halves)
    o0, o1, o2, o3 = gl.inline_asm_elementwise(
        _DECODE_TILE if COUNT == 4 else _DECODE_HALVES[FIRST // 2],
        _registers(COUNT),
        [halves, scales],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2 * COUNT,
    )
    codes = gl.join(gl.join(o0, o1), gl.join(o2, o3))
    codes = gl.reshape(codes, [OUTPUTS // 16, 8, 4, COUNT // 2, 2, 2, 2, 2])  # w g t a r b h p
    codes = gl.permute(codes, [0, 4, 1, 3, 7, 6, 2, 5])  # w r g a p h t b
    codes = gl.reshape(codes, [OUTPUTS, 16 * COUNT])
    return gl.convert_layout(codes, OPERAND, assert_trivial=True)


@gluon.jit
def split(words):
    """words i32 [lanes, 4] of 64 inputs -> two of i32 [lanes, 2], of 32 inputs each."""
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [gl.num_warps(), 1], [1, 0])
    first, second = gl.split(gl.permute(gl.reshape(words, [words.shape[0], 2, 2]), [0, 2, 1]))
    first = gl.convert_layout(first, PAIRS, assert_trivial=True)
    return first, gl.convert_layout(second, PAIRS, assert_trivial=True)


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
