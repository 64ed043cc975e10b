"""MXFP4: four-bit floats in blocks of 32 that share a power-of-two scale.

An element is an E2M1 code (sign, two exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6),
a scale is an E8M0 byte b that stands for 2^(b - 127), with 255 for NaN. Both directions are built
from integer operations on the bits of floats, so that they are exact on every backend: float
arithmetic in XLA may replace subnormal numbers by zero, and the products of scales 0 and 1 are such
numbers. (What is computed from the decoded weights is subject to that again.)

Source: OCP Microscaling Formats (MX) Specification, version 1.0, sections 5.3, 5.4 and 6.3.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.quantization.codes import pack_codes, unpack_codes
from moe_jax.quantization.packed import (
    InBlocks,
    check_blocks,
    check_dtypes,
    check_encodable,
    float_type,
)
from moe_jax.tagged import Tagged, tag

BLOCK_SIZE = 32
"""Elements that share a scale."""

_NAN_SCALE = 255


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockScaled(InBlocks):
    """MXFP4 codes and scales, seen as an array of floats.

    The two leaves are all that the pytree holds, and `axis` is the logical axis cut into blocks:
    with `blocks` {expert, out, block, byte}, `axes` is (expert, out, in) and `in` is 32 x block.
    The constructor checks nothing, because JAX puts all sorts of things in the place of leaves;
    every method does, and raises TypeError for bytes that are not uint8 and ValueError for blocks
    and scales that do not belong together.

    Attributes:
        blocks: uint8 {..., block, byte}, 16 bytes of two codes each, the low four bits first.
        scales: uint8 {..., block}, E8M0.
        axis: name of the logical axis that is cut into blocks.
    """

    blocks: Tagged
    scales: Tagged
    axis: str = dataclasses.field(default="in", metadata={"static": True})

    @property
    def block_size(self) -> int:
        """Elements that share a scale: 32."""
        return BLOCK_SIZE

    def dequantize(self, dtype: Any = jnp.bfloat16) -> Tagged:
        """The decoded floats {..., in}; see `dequantize_mxfp4`."""
        return dequantize_mxfp4(self, dtype)

    def check(self) -> Self:
        """Returns `self` if blocks and scales are uint8 and belong together; raises otherwise."""
        blocks, scales = self.blocks, self.scales
        check_dtypes("MXFP4", blocks=(blocks, np.uint8), scales=(scales, np.uint8))
        check_blocks("MXFP4", blocks, scales, BLOCK_SIZE // 2)
        return self


def dequantize_mxfp4(packed: BlockScaled, dtype: Any = jnp.bfloat16) -> Tagged:
    """Decodes to floats {..., in}: E2M1 value x 2^(scale - 127), NaN where the scale is 255.

    float32 and bfloat16 hold every value down to the smallest (2^-128, a subnormal number) and give
    infinity where the product passes the largest float (codes of 4 and 6 at scale 253, of 2 and
    more at scale 254). float16 is float32 rounded once, at the end.

    Raises:
        TypeError: `dtype` is not float32, bfloat16 or float16, or the bytes are not uint8.
        ValueError: blocks and scales do not belong together.
    """
    dtype = float_type(dtype)
    packed.check()
    blocks = jnp.asarray(packed.blocks.array)
    scales = jnp.asarray(packed.scales.array)[..., None]
    bits = _bfloat16_bits(unpack_codes(blocks, 4).astype(jnp.uint16), scales.astype(jnp.uint16))
    bits = bits.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK_SIZE)
    return tag(_from_bfloat16_bits(bits, dtype), *packed.axes)


def _bfloat16_bits(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The bits of the bfloat16 of each code (its low four bits) and scale, all uint16.

    For magnitudes m >= 2 the code's exponent and mantissa bits lie as in a bfloat16, so they are
    added to the scale's exponent. m = 1 is E2M1's own subnormal number, 0.5.
    """
    magnitude = codes & 7
    base = (scales - 1) << 7
    half = jnp.where(scales == 1, jnp.uint16(1 << 6), base)
    bits = jnp.where(magnitude == 1, half, base + (magnitude << 6))
    bits = jnp.where((scales == 0) & (magnitude < 4), magnitude << 5, bits)
    bits = jnp.where(magnitude == 0, jnp.uint16(0), jnp.minimum(bits, jnp.uint16(0x7F80)))
    bits = jnp.where(scales == _NAN_SCALE, jnp.uint16(0x7FC0), bits)
    return bits | ((codes & 8) << 12)


def _from_bfloat16_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(bits, jnp.bfloat16)
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)


def quantize_mxfp4(w: Tagged, axis: str = "in") -> BlockScaled:
    """Encodes floats {..., in} by the rules of the OCP specification.

    A block's scale is 2^(floor(log2(largest magnitude)) - 2), limited to 2^-127; elements are
    rounded to the nearest code, ties to the even one, and magnitudes above 6 scales saturate. A
    block of zeros has scale byte 0. A block with a NaN or an infinity has scale byte 255, all NaN:
    the format has no infinity, and a finite number in its place would be wrong without notice.

    Args:
        w: float32, bfloat16 or float16 array with the axis `axis`, of a size divisible by 32.
        axis: the axis to cut into blocks; it becomes the last.

    Raises:
        TypeError: `w` is not a `Tagged` of one of these dtypes.
        ValueError: no such axis, or its size is not divisible by 32.
    """
    check_encodable(w, axis, BLOCK_SIZE)
    lead = tuple(n for n in w.axes if n != axis)
    bits = _float32_bits(w.untag(*lead, axis))
    bits = bits.reshape(*bits.shape[:-1], bits.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    magnitudes = bits & 0x7FFFFFFF
    exponents = (magnitudes.max(-1) >> 23).astype(jnp.int32)
    scales = jnp.where(exponents == 255, _NAN_SCALE, jnp.maximum(exponents - 2, 0))
    codes = _nearest_codes(magnitudes, scales) | (bits >> 31 << 3).astype(jnp.uint8)
    return BlockScaled(
        tag(pack_codes(codes, 4), *lead, "block", "byte"),
        tag(scales.astype(jnp.uint8), *lead, "block"),
        axis,
    )


def _nearest_codes(magnitudes: jax.Array, scales: jax.Array) -> jax.Array:
    """How many code boundaries of its block each magnitude has passed, as uint8.

    Non-negative floats are ordered as their bits are, so this is a comparison of integers.

    Args:
        magnitudes: bits of non-negative float32, uint32 {..., block, 32}.
        scales: int32 {..., block}.
    """
    boundaries = jnp.asarray(_boundary_bits())[scales]
    codes = jnp.zeros(magnitudes.shape, jnp.uint8)
    for n in range(boundaries.shape[-1]):
        codes += (magnitudes >= boundaries[..., n, None]).astype(jnp.uint8)
    return jnp.where(scales[..., None] == _NAN_SCALE, jnp.uint8(0), codes)


@functools.cache
def _boundary_bits() -> np.ndarray:
    """Bits of the least float32 that rounds to codes 1 to 7, by scale byte: uint32 [256, 7].

    A boundary lies halfway between neighbours and belongs to the even one of them.
    """
    halfway = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    belongs_below = np.array([1, 0, 1, 0, 1, 0, 1], np.uint32)
    with np.errstate(over="ignore"):
        values = np.ldexp(halfway, np.arange(256)[:, None] - 127).astype(np.float32)
    return values.view(np.uint32) + belongs_below


def _float32_bits(array: jax.Array) -> jax.Array:
    array = jnp.asarray(array)
    if array.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(array, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quantize_mxfp4(w: Tagged, axis: str = "in") -> Tagged:
    """Rounds floats to what MXFP4 can hold, with the gradient of the identity.

    For training with the rounding in place: the result is that of encoding and decoding, in the
    dtype and the axis order of `w`, and cotangents pass through unchanged (straight-through
    estimator, Bengio et al., arXiv:1308.3432). Arguments and errors are those of `quantize_mxfp4`.
    """
    return dequantize_mxfp4(quantize_mxfp4(w, axis), w.dtype).order(*w.axes)


@fake_quantize_mxfp4.defjvp
def _fake_quantize_jvp(axis: str, primals: Any, tangents: Any) -> tuple[Tagged, Tagged]:
    return fake_quantize_mxfp4(primals[0], axis), tangents[0]
