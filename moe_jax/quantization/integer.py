"""Integers of 2, 4 or 8 bits in groups that share a scale and, if need be, a zero point.

    decoded = (q - zero point) x scale,    0 <= q < 2^bits

Without zero points that of all groups is 2^(bits - 1): the integers then are the signed ones moved
up. Codes fill bytes from the lowest bits on. This is what ONNX Runtime's QMoE reads: the bytes of
its weights are those of `codes`, its scales are `scales` (without the axis of groups where there is
one group), and its zero points are `zero_points`, packed along groups.
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
from moe_jax.quantization.packed import InBlocks, check_dtypes, check_encodable, float_type
from moe_jax.tagged import Tagged, tag

_BITS = (2, 4, 8)
_LEAST_SCALE = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedIntegers(InBlocks):
    """Integer codes, scales and zero points, seen as an array of floats.

    With `codes` {expert, out, group, byte}, the logical axes are (expert, out, in), and `in` is
    group x byte x 8 / bits. A scale for each row is one group.

    Attributes:
        codes: uint8 {..., group, byte}, 8 / bits codes a byte, the lowest bits first.
        scales: float32, bfloat16 or float16 {..., group}; they have no gradient.
        zero_points: uint8 {..., group}, one a byte, or None for 2^(bits - 1) everywhere.
        bits: 2, 4 or 8.
        axis: name of the logical axis that is cut into groups.
    """

    block = "group"

    codes: Tagged
    scales: Tagged
    zero_points: Tagged | None = None
    bits: int = dataclasses.field(default=4, metadata={"static": True})
    axis: str = dataclasses.field(default="in", metadata={"static": True})

    @property
    def group_size(self) -> int:
        """Elements that share a scale."""
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def block_size(self) -> int:
        """The same, by the name that all formats in blocks have for it."""
        return self.group_size

    def dequantize(self, dtype: Any = jnp.bfloat16) -> Tagged:
        """The decoded floats {..., in}; see `dequantize_integers`."""
        return dequantize_integers(self, dtype)

    def check(self) -> Self:
        """Returns `self` if the leaves have their dtypes and belong together; raises otherwise."""
        codes, scales, zero_points = self.codes, self.scales, self.zero_points
        _check_bits(self.bits)
        check_dtypes("integer", codes=(codes, np.uint8))
        float_type(scales.dtype)
        if scales.axes[-1:] != ("group",) or codes.axes != (*scales.axes, "byte"):
            raise ValueError(
                f"integers need codes {{..., group, byte}} and scales {{..., group}} with equal "
                f"leading axes, got codes {codes} and scales {scales}"
            )
        if codes.shape[:-1] != scales.shape:
            raise ValueError(f"integers need a scale a group, got codes {codes}, scales {scales}")
        if zero_points is not None:
            check_dtypes("integer", zero_points=(zero_points, np.uint8))
            if (zero_points.axes, zero_points.shape) != (scales.axes, scales.shape):
                raise ValueError(
                    f"integers need a zero point a group, got zero_points {zero_points} and "
                    f"scales {scales}"
                )
        return self


def dequantize_integers(packed: PackedIntegers, dtype: Any = jnp.bfloat16) -> Tagged:
    """Decodes to floats {..., in}: (code - zero point) x scale, rounded to float32.

    bfloat16 and float16 are that rounded once more.

    Raises:
        TypeError: `dtype` is not float32, bfloat16 or float16, or a leaf has another dtype.
        ValueError: `bits` is not 2, 4 or 8, or the leaves do not belong together.
    """
    dtype = float_type(dtype)
    packed.check()
    codes = unpack_codes(jnp.asarray(packed.codes.array), packed.bits).astype(jnp.int32)
    if packed.zero_points is None:
        offset: Any = 1 << (packed.bits - 1)
    else:
        offset = packed.zero_points.array.astype(jnp.int32)[..., None]
    scales = lax.stop_gradient(packed.scales.array).astype(jnp.float32)
    decoded = (codes - offset).astype(jnp.float32) * scales[..., None]
    *lead, groups, size = decoded.shape
    return tag(decoded.reshape(*lead, groups * size).astype(dtype), *packed.axes)


def quantize_integers(
    w: Tagged,
    bits: int = 4,
    group_size: int | None = None,
    axis: str = "in",
    zero_points: bool = False,
) -> PackedIntegers:
    """Encodes floats {..., in} as round(x / scale) + zero point, ties to even, within the codes.

    Without zero points a group's scale is the largest magnitude / (2^(bits - 1) - 1). With them it
    is (largest - least) / (2^bits - 1), of the numbers and zero, so that zero is always exact. A
    scale that would be subnormal is 0, and its group all zeros. A group with a NaN or an infinity
    gets the scale NaN: it decodes to NaN.

    Args:
        w: float32, bfloat16 or float16 array with the axis `axis`.
        bits: 2, 4 or 8.
        group_size: elements that share a scale; they fill whole bytes, and `in` is a multiple of
            it. None for the whole of `in`, a scale for each row.
        axis: the axis to cut into groups; it becomes the last.
        zero_points: whether groups have zero points.

    Raises:
        TypeError: `w` is not a `Tagged` of one of these dtypes.
        ValueError: `bits` is not 2, 4 or 8, or `w` does not divide into such groups.
    """
    _check_bits(bits)
    check_encodable(w, axis, 1)
    size = w.size(axis) if group_size is None else group_size
    if size < 1 or size * bits % 8:
        raise ValueError(f"a group of {size} codes of {bits} bits does not fill whole bytes")
    check_encodable(w, axis, size)
    lead = tuple(n for n in w.axes if n != axis)
    x = w.untag(*lead, axis).astype(jnp.float32)
    x = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    scales, zeros = _ranges(x, bits, zero_points)
    steps = jnp.round(divide(x, jnp.where(scales > 0, scales, 1)[..., None]))
    levels = jnp.clip(steps + zeros[..., None], 0, 2**bits - 1)
    levels = jnp.where((scales > 0)[..., None], levels, zeros[..., None])
    codes = pack_codes(levels.astype(jnp.uint8), bits)
    return PackedIntegers(
        codes=tag(codes, *lead, "group", "byte"),
        scales=tag(scales, *lead, "group"),
        zero_points=tag(zeros.astype(jnp.uint8), *lead, "group") if zero_points else None,
        bits=bits,
        axis=axis,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def fake_quantize_integers(
    w: Tagged,
    bits: int = 4,
    group_size: int | None = None,
    axis: str = "in",
    zero_points: bool = False,
) -> Tagged:
    """Rounds floats to what such integers can hold, with the gradient of the identity.

    The result is that of encoding and decoding, in the dtype and the axis order of `w`, and
    cotangents pass through unchanged (straight-through estimator). Arguments and errors are those
    of `quantize_integers`.
    """
    packed = quantize_integers(w, bits, group_size, axis, zero_points)
    return dequantize_integers(packed, w.dtype).order(*w.axes)


@fake_quantize_integers.defjvp
def _fake_quantize_jvp(
    bits: int, group_size: int | None, axis: str, zero_points: bool, primals: Any, tangents: Any
) -> tuple[Tagged, Tagged]:
    return fake_quantize_integers(primals[0], bits, group_size, axis, zero_points), tangents[0]


def _ranges(x: jax.Array, bits: int, zero_points: bool) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points, float32 {..., group}, of float32 {..., group, element}."""
    if zero_points:
        least, largest = jnp.minimum(x.min(-1), 0), jnp.maximum(x.max(-1), 0)
        half = largest * 0.5 - least * 0.5  # the whole may be more than float32 can hold
        scales = divide(half, jnp.float32((2**bits - 1) / 2))
    else:
        least, largest = x.min(-1), jnp.abs(x).max(-1)
        scales = divide(largest, jnp.float32(2 ** (bits - 1) - 1))
    known = jnp.isfinite(x).all(-1)  # XLA's maximum need not be NaN where an element is
    scales = jnp.where(known, jnp.where(scales >= _LEAST_SCALE, scales, 0), jnp.nan)
    if not zero_points:
        return scales, jnp.full_like(scales, 2 ** (bits - 1))
    zeros = jnp.round(divide(-least, jnp.where(scales > 0, scales, 1)))
    return scales, jnp.where(scales > 0, jnp.clip(zeros, 0, 2**bits - 1), 0)


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise ValueError(f"bits must be one of {_BITS}, got {bits!r}")
