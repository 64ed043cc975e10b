"""NVFP4: four-bit floats in blocks of 16 with an e4m3 scale, and a float32 scale over those.

An element is an E2M1 code (as in MXFP4), a block's scale s an E4M3 number, and the global scale g
brings the block scales into the range of E4M3. With `amax` the largest magnitude of a block,

    s = e4m3(clip(amax / 6 / g, 2^-6, 448)),    q = e2m1(x / (s g)),    decoded = q s g

all in float32, to the nearest, ties to even, and q saturating at 6. A block with a NaN or an
infinity gets the scale NaN: it decodes to NaN, as in MXFP4.

Sources: the description of NVFP4 in NVIDIA's TensorRT documentation (block scales of type FP8 that
are quantised in turn, "double quantisation"). NVIDIA states no rounding for the scales; that above
is ZML's.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.quantization.codes import pack_codes, unpack_codes
from moe_jax.quantization.division import divide
from moe_jax.quantization.fp8 import LARGEST, to_fp8
from moe_jax.quantization.packed import (
    InBlocks,
    check_blocks,
    check_dtypes,
    check_encodable,
    float_type,
)
from moe_jax.tagged import Tagged, tag

NVFP4_BLOCK_SIZE = 16
"""Elements that share a block scale."""

LEAST_GLOBAL_SCALE = 2.0**-118
"""With less, decoded numbers could be subnormal, which XLA may replace by zero."""

_LARGEST_CODE = 6.0
_LEAST_SCALE = 2.0**-6
_NAN_SCALE = 0x7F
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_HALFWAY = ((0.25, 1), (0.75, 0), (1.25, 1), (1.75, 0), (2.5, 1), (3.5, 0), (5.0, 1))
"""The numbers halfway between magnitudes, and whether each belongs to the one below: to the even
code of the two."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedNVFP4(InBlocks):
    """NVFP4 codes and scales, seen as an array of floats, as `BlockScaled` is for MXFP4.

    With `blocks` {expert, out, block, byte}, the logical axes are (expert, out, in), `in` being
    16 x block. As weight of experts the global scale has the axis {expert}.

    Attributes:
        blocks: uint8 {..., block, byte}, 8 bytes of two codes each, the low four bits first.
        scales: uint8 {..., block}, the bits of E4M3 numbers.
        global_scale: float32 with some of the leading axes, or none; it has no gradient.
        axis: name of the logical axis that is cut into blocks.
    """

    blocks: Tagged
    scales: Tagged
    global_scale: Tagged
    axis: str = dataclasses.field(default="in", metadata={"static": True})

    @property
    def block_size(self) -> int:
        """Elements that share a scale: 16."""
        return NVFP4_BLOCK_SIZE

    def dequantize(self, dtype: Any = jnp.bfloat16) -> Tagged:
        """The decoded floats {..., in}; see `dequantize_nvfp4`."""
        return dequantize_nvfp4(self, dtype)

    def check(self) -> Self:
        """Returns `self` if the leaves have their dtypes and belong together; raises otherwise."""
        blocks, scales = self.blocks, self.scales
        check_dtypes(
            "NVFP4",
            blocks=(blocks, np.uint8),
            scales=(scales, np.uint8),
            global_scale=(self.global_scale, np.float32),
        )
        check_blocks("NVFP4", blocks, scales, NVFP4_BLOCK_SIZE // 2)
        _check_global_scale(self.global_scale, {n: scales.size(n) for n in scales.axes[:-1]})
        return self


def dequantize_nvfp4(packed: PackedNVFP4, dtype: Any = jnp.bfloat16) -> Tagged:
    """Decodes to floats {..., in}: E2M1 value x E4M3 scale x global scale, rounded to float32.

    bfloat16 and float16 are that rounded once more.

    Raises:
        TypeError: `dtype` is not float32, bfloat16 or float16, or a leaf has another dtype.
        ValueError: the leaves do not belong together.
    """
    dtype = float_type(dtype)
    packed.check()
    blocks = jnp.asarray(packed.blocks.array)
    codes = unpack_codes(blocks, 4)
    magnitudes = jnp.asarray(_MAGNITUDES)[(codes & 7).astype(jnp.int32)]
    values = jnp.where(codes & 8 != 0, -magnitudes, magnitudes)
    scales = _from_e4m3_bits(jnp.asarray(packed.scales.array))
    factor = lax.stop_gradient(packed.global_scale).expand_to(packed.scales)
    decoded = values * scales[..., None] * factor[..., None]
    array = decoded.reshape(*blocks.shape[:-2], blocks.shape[-2] * NVFP4_BLOCK_SIZE)
    return tag(array.astype(dtype), *packed.axes)


def quantize_nvfp4(
    w: Tagged,
    axis: str = "in",
    global_scale: Tagged | None = None,
    per: tuple[str, ...] = ("expert",),
) -> PackedNVFP4:
    """Encodes floats {..., in}; the module says how numbers are rounded.

    Args:
        w: float32, bfloat16 or float16 array with the axis `axis`, of a size divisible by 16.
        axis: the axis to cut into blocks; it becomes the last.
        global_scale: float32 with some of the other axes of `w`, at least `LEAST_GLOBAL_SCALE`;
            None for `nvfp4_global_scale(w, per)`.
        per: the axes of `w` that a global scale of its own is chosen along, of those it has.

    Raises:
        TypeError: `w` is not a `Tagged` of one of these dtypes, or `global_scale` not of float32.
        ValueError: no such axis, its size is not divisible by 16, or the axes of `global_scale` are
            not among the others of `w`.
    """
    check_encodable(w, axis, NVFP4_BLOCK_SIZE)
    lead = tuple(n for n in w.axes if n != axis)
    if global_scale is None:
        global_scale = nvfp4_global_scale(w, tuple(n for n in per if n in lead))
    _check_global_scale(global_scale, {n: w.size(n) for n in lead})
    check_dtypes("NVFP4", global_scale=(global_scale, np.float32))
    x = w.untag(*lead, axis).astype(jnp.float32)
    x = x.reshape(*x.shape[:-1], x.shape[-1] // NVFP4_BLOCK_SIZE, NVFP4_BLOCK_SIZE)
    factor = global_scale.expand_to(Tagged(x[..., 0], (*lead, "block")))
    scales = _block_scales(x, factor)
    step = _from_e4m3_bits(scales) * factor
    codes = _nearest_codes(divide(jnp.abs(x), step[..., None]))
    codes |= jnp.signbit(x).astype(jnp.uint8) << 3
    return PackedNVFP4(
        tag(pack_codes(codes, 4), *lead, "block", "byte"),
        tag(scales, *lead, "block"),
        global_scale,
        axis,
    )


def nvfp4_global_scale(w: Tagged, per: tuple[str, ...] = ()) -> Tagged:
    """The global scale float32 {per} that gives the largest magnitude the largest block scale.

    That is the largest finite magnitude / (6 x 448), and at least `LEAST_GLOBAL_SCALE`.
    """
    rest = tuple(n for n in w.axes if n not in per)
    magnitudes = jnp.abs(w.untag(*per, *rest).astype(jnp.float32))
    finite = jnp.where(jnp.isfinite(magnitudes), magnitudes, 0)
    amax = finite.max(tuple(range(len(per), finite.ndim)), initial=0)
    scale = divide(amax, jnp.float32(_LARGEST_CODE * LARGEST))
    return Tagged(jnp.maximum(scale, jnp.float32(LEAST_GLOBAL_SCALE)), per)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 3))
def fake_quantize_nvfp4(
    w: Tagged,
    axis: str = "in",
    global_scale: Tagged | None = None,
    per: tuple[str, ...] = ("expert",),
) -> Tagged:
    """Rounds floats to what NVFP4 can hold, with the gradient of the identity.

    The result is that of encoding and decoding, in the dtype and the axis order of `w`, and
    cotangents pass through to `w` unchanged (straight-through estimator); none reaches the global
    scale. Arguments and errors are those of `quantize_nvfp4`.
    """
    return dequantize_nvfp4(quantize_nvfp4(w, axis, global_scale, per), w.dtype).order(*w.axes)


@fake_quantize_nvfp4.defjvp
def _fake_quantize_jvp(
    axis: str, per: tuple[str, ...], primals: Any, tangents: Any
) -> tuple[Tagged, Tagged]:
    w, global_scale = primals
    return fake_quantize_nvfp4(w, axis, global_scale, per), tangents[0]


def _block_scales(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The bits of the E4M3 scales, uint8 {..., block}, of float32 {..., block, element}."""
    scales = divide(divide(jnp.abs(x).max(-1), jnp.float32(_LARGEST_CODE)), factor)
    bits = lax.bitcast_convert_type(to_fp8(jnp.maximum(scales, _LEAST_SCALE)), jnp.uint8)
    # asked of the elements: XLA's maximum need not be NaN where one of them is
    return jnp.where(jnp.isfinite(x).all(-1), bits, jnp.uint8(_NAN_SCALE))


def _from_e4m3_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


def _nearest_codes(ratios: jax.Array) -> jax.Array:
    """How many of the halfway numbers each non-negative ratio has passed, as uint8; NaN none."""
    codes = jnp.zeros(ratios.shape, jnp.uint8)
    for halfway, belongs_below in _HALFWAY:
        passed = ratios > halfway if belongs_below else ratios >= halfway
        codes += passed.astype(jnp.uint8)
    return codes


def _check_global_scale(global_scale: Tagged, lead: dict[str, int]) -> None:
    if not isinstance(global_scale, Tagged):
        raise TypeError(f"the global scale must be Tagged, got {type(global_scale).__name__}")
    sizes = global_scale.sizes
    if not sizes.items() <= lead.items():
        raise ValueError(
            f"the global scale of NVFP4 must have some of the axes {lead}, or none, "
            f"got {global_scale}"
        )
