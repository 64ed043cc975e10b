"""MXFP4 weights in the order in which a GPU's matrix instructions take them.

A warp multiplies tiles of 16 outputs by 64 inputs. Each of its 32 lanes needs certain codes of a
tile, and here they lie side by side: one load of 16 bytes a lane brings a tile in. Within a 16-bit
half the bits of four codes lie where a shift and a mask make bfloat16 numbers of them.

    lane = 4 g + t, word = 2 a + r                 g 0..7, t 0..3, r 0..1, a 0..1
    row of the tile = 2 g + r
    input of the tile = 32 a + 8 o + 2 t + b       code o 0..3 of the half b (0 is the low one)

    bits of a half     15  14  13  12  11  10  9  8 7 6  5 4 3  2 1 0
    code o, S sign     0S  3S  3   1S  3   3   2S 0 0 0  1 1 1  2 2 2

A code moved to where code 0 lies is a bfloat16 number, 2^126 times smaller than what it stands for.
The scales make up for that. They are exponents of floats, scale + 126 - offset, as bytes: byte
2 a + r of the word of g is that of row 2 g + r, block a. `offset` keeps them below 255, the byte
for the scale 255, NaN. It is 0 unless an expert has scales above 128.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.quantization.mxfp4 import BLOCK_SIZE, BlockScaled
from moe_jax.quantization.packed import Packed, check_dtypes
from moe_jax.rules import Rules
from moe_jax.tagged import Tagged, tag

TILE_OUT = 16
"""Outputs of a tile."""

TILE_IN = 64
"""Inputs of a tile."""

_BLOCKS = TILE_IN // BLOCK_SIZE
_WORDS = ("tile_out", "tile_in", "lane", "word")
_SCALES = ("tile_out", "tile_in", "group")
_DTYPES = {"words": np.int32, "scales": np.int32, "offset": np.int32, "factor": np.float32}
_NAN_SCALE = 255
_BIAS = 126
_LARGEST = 128  # the largest scale that needs no offset
_BITS = (((8, 12), (7, 6)), ((8, 9), (7, 3)), ((8, 6), (7, 0)), ((12, 11), (3, 10)))
"""For each of a half's four codes: which of its bits are shifted to the left, by how much."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TiledMXFP4(Packed):
    """MXFP4 weights for NVIDIA GPUs, seen as an array of floats {..., out, in}, as `BlockScaled`.

    Made by `tile_mxfp4`, and `untile` is its inverse: the same numbers, so that every layer takes
    either. Where the sizes are not whole tiles, zeros fill them up. As with `BlockScaled`, the
    constructor checks nothing, and every method raises TypeError for leaves of other dtypes and
    ValueError for leaves that do not belong together.

    Attributes:
        words: int32 {..., tile_out, tile_in, lane, word}, 8 codes each.
        scales: int32 {..., tile_out, tile_in, group}, 4 scales each.
        offset: int32 {...}, what was taken off the scales: max(0, largest scale but 255 - 128).
        factor: float32 {..., out}: 2^offset, by which sums are multiplied; NaN where an output has
            a NaN scale. It follows from the others and has no gradient.
        in_size: size of the inputs, of which the last tile may hold 32 only.
        axis: name of the inputs' axis.
    """

    words: Tagged
    scales: Tagged
    offset: Tagged
    factor: Tagged
    in_size: int = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(default="in", metadata={"static": True})

    @property
    def axes(self) -> tuple[str, ...]:
        """The logical axes, outputs and inputs last."""
        return (*self.factor.axes, self.axis)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each logical axis by name."""
        return {**self.check().factor.sizes, self.axis: self.in_size}

    @property
    def whole(self) -> tuple[str, ...]:
        """The axes before outputs and inputs: to pick among those, `untile` first."""
        return self.offset.axes

    def rules_for_leaves(self, rules: Rules) -> Mapping[str, str | tuple[str, ...] | None]:
        """Sharding rules for the leaves; tiles are never cut."""
        return tile_rules(rules, self.axes[-2], self.axis)

    def untile(self) -> BlockScaled:
        """The `BlockScaled` that was tiled, bit for bit."""
        self.check()
        outputs, blocks = self.size(self.axes[-2]), self.in_size // BLOCK_SIZE
        arrays = _untile(self.words.array, self.scales.array, self.offset.array, outputs, blocks)
        axes = (*self.factor.axes, "block")
        return BlockScaled(tag(arrays[0], *axes, "byte"), tag(arrays[1], *axes), self.axis)

    def dequantize(self, dtype: Any = jnp.bfloat16) -> Tagged:
        """The decoded floats {..., out, in}, those of `BlockScaled.dequantize`."""
        return self.untile().dequantize(dtype)

    def check(self) -> Self:
        """Returns `self` if the leaves have their dtypes and belong together; raises otherwise."""
        leaves = {name: (getattr(self, name), dtype) for name, dtype in _DTYPES.items()}
        check_dtypes("tiled MXFP4", **leaves)
        lead = self.offset.axes
        if (
            self.words.axes != (*lead, *_WORDS)
            or self.scales.axes != (*lead, *_SCALES)
            or self.factor.axes[:-1] != lead
            or len(self.factor.axes) != len(lead) + 1
        ):
            raise ValueError(
                f"tiled MXFP4 needs words {{..., {', '.join(_WORDS)}}}, scales "
                f"{{..., {', '.join(_SCALES)}}}, offset {{...}} and factor {{..., out}} with equal "
                f"leading axes, got {self}"
            )
        sizes = self.offset.sizes
        tiles = {
            **sizes,
            "tile_out": -(-self.factor.shape[-1] // TILE_OUT),
            "tile_in": -(-self.in_size // TILE_IN),
        }
        if (
            self.in_size % BLOCK_SIZE
            or self.words.sizes != {**tiles, "lane": 32, "word": 4}
            or self.scales.sizes != {**tiles, "group": 8}
            or self.factor.shape[:-1] != tuple(sizes.values())
        ):
            raise ValueError(
                f"tiled MXFP4 needs tiles of {TILE_OUT} outputs and {TILE_IN} inputs, 32 lanes of "
                f"4 words each and 8 words of scales, got {self}"
            )
        return self


def tile_rules(
    rules: Rules, out: str = "out", axis: str = "in"
) -> Mapping[str, str | tuple[str, ...] | None]:
    """Sharding rules for the leaves of `TiledMXFP4`, from rules for the logical axes."""
    whole = dict.fromkeys(("lane", "word", "group"))
    return {**rules, "tile_out": rules.get(out), "tile_in": rules.get(axis), **whole}


def tile_mxfp4(packed: BlockScaled) -> TiledMXFP4:
    """Lays MXFP4 weights {..., out, in} out in tiles; nothing is rounded.

    One pass over the bytes, without temporaries of the weight's size. Leading axes may be spread
    over devices, and stay so.

    Raises:
        TypeError, ValueError: as `BlockScaled.check`, or there is no axis besides the inputs'.
    """
    *lead, out = packed.check().scales.axes[:-1] or (None,)
    if out is None:
        raise ValueError(f"tiles need an axis of outputs before {packed.axis!r}, got {packed}")
    words, scales, offset, factor = _tile(packed.blocks.array, packed.scales.array)
    return TiledMXFP4(
        words=tag(words, *lead, *_WORDS),
        scales=tag(scales, *lead, *_SCALES),
        offset=tag(offset, *lead),
        factor=tag(factor, *lead, out),
        in_size=packed.size(packed.axis),
        axis=packed.axis,
    )


@jax.jit
def _tile(blocks: jax.Array, scales: jax.Array) -> tuple[jax.Array, ...]:
    """blocks [..., out, block, byte], scales [..., out, block] -> words, scales, offset, factor."""
    known = jnp.where(scales == _NAN_SCALE, jnp.uint8(0), scales)
    largest = known.max((-2, -1), initial=0).astype(jnp.int32)
    offset = jnp.maximum(largest - _LARGEST, 0)
    power = lax.bitcast_convert_type((offset + 127) << 23, jnp.float32)
    has_nan = (scales == _NAN_SCALE).any(-1)
    factor = jnp.where(has_nan, jnp.float32(jnp.nan), power[..., None])
    return _pack_codes(blocks), _pack_scales(scales, offset), offset, factor


def _pack_codes(blocks: jax.Array) -> jax.Array:
    """uint8 [..., out, block, byte] -> int32 [..., tile_out, tile_in, lane, word].

    The 16 bytes of a row and block are 4 words: byte 4 o + t has the code o of both halves of the
    word of t.
    """
    blocks = _whole_tiles(blocks, -3)
    *lead, rows, columns, _ = blocks.shape
    tiles = rows // TILE_OUT, columns // _BLOCKS
    grid = blocks.reshape(*lead, tiles[0], 8, 2, tiles[1], _BLOCKS, 4, 4)  # g r . a o t
    words: Any = 0
    for o, bits in enumerate(_BITS):
        byte = grid[..., o, :].astype(jnp.uint32)
        halves = (byte & 15) | (byte >> 4) << 16
        for mask, shift in bits:
            words |= (halves & (mask * 0x10001)) << shift
    words = _move_last(words, (0, 3, 1, 5, 4, 2))  # g t a r
    return lax.bitcast_convert_type(words.reshape(*lead, *tiles, 32, 4), jnp.int32)


def _pack_scales(scales: jax.Array, offset: jax.Array) -> jax.Array:
    """uint8 [..., out, block], int32 [...] -> int32 [..., tile_out, tile_in, group]."""
    scales = _whole_tiles(scales, -2)
    *lead, rows, columns = scales.shape
    tiles = rows // TILE_OUT, columns // _BLOCKS
    wide = scales.astype(jnp.int32)
    moved = jnp.where(wide == _NAN_SCALE, _NAN_SCALE, wide + _BIAS - offset[..., None, None])
    grid = moved.astype(jnp.uint32).reshape(*lead, tiles[0], 8, 2, tiles[1], _BLOCKS)
    words: Any = 0
    for r in range(2):
        for a in range(_BLOCKS):
            words |= grid[..., r, :, a] << (8 * (2 * a + r))
    return lax.bitcast_convert_type(jnp.swapaxes(words, -1, -2), jnp.int32)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _untile(
    words: jax.Array, scales: jax.Array, offset: jax.Array, outputs: int, blocks: int
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_tile`: uint8 [..., out, block, byte] and [..., out, block]."""
    codes, scales = _unpack_codes(words), _unpack_scales(scales, offset)
    return codes[..., :outputs, :blocks, :], scales[..., :outputs, :blocks]


def _unpack_codes(words: jax.Array) -> jax.Array:
    """int32 [..., tile_out, tile_in, lane, word] -> uint8 [..., out, block, byte]."""
    *lead, tile_out, tile_in, _, _ = words.shape
    grid = lax.bitcast_convert_type(words, jnp.uint32)
    grid = grid.reshape(*lead, tile_out, tile_in, 8, 4, _BLOCKS, 2)  # g t a r
    grid = _move_last(grid, (0, 2, 5, 1, 4, 3))  # g r . a t
    codes = []
    for bits in _BITS:
        halves: Any = 0
        for mask, shift in bits:
            halves |= (grid >> shift) & (mask * 0x10001)
        codes.append(((halves & 15) | (halves >> 12 & 0xF0)).astype(jnp.uint8))
    rows, columns = tile_out * TILE_OUT, tile_in * _BLOCKS
    return jnp.stack(codes, -2).reshape(*lead, rows, columns, BLOCK_SIZE // 2)


def _unpack_scales(scales: jax.Array, offset: jax.Array) -> jax.Array:
    """int32 [..., tile_out, tile_in, group], [...] -> uint8 [..., out, block]."""
    *lead, tile_out, tile_in, _ = scales.shape
    grid = lax.bitcast_convert_type(jnp.swapaxes(scales, -1, -2), jnp.uint32)
    four = [(grid >> (8 * n) & 255).astype(jnp.int32) for n in range(4)]
    rows = [jnp.stack(four[r::2], -1) for r in range(2)]
    moved = jnp.stack(rows, -3).reshape(*lead, tile_out * TILE_OUT, tile_in * _BLOCKS)
    known = moved - _BIAS + offset[..., None, None]
    return jnp.where(moved == _NAN_SCALE, _NAN_SCALE, known).astype(jnp.uint8)


def _whole_tiles(array: jax.Array, out: int) -> jax.Array:
    """Fills the axes `out` and `out` + 1, of outputs and blocks, up with zeros."""
    widths = [(0, 0)] * array.ndim
    widths[out] = (0, -array.shape[out] % TILE_OUT)
    widths[out + 1] = (0, -array.shape[out + 1] % _BLOCKS)
    return jnp.pad(array, widths)


def _move_last(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """Transposes the last axes."""
    lead = array.ndim - len(order)
    return jnp.transpose(array, (*range(lead), *(lead + n for n in order)))
