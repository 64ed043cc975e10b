"""The weights of all experts as the operators take them: floats, or integers in blocks.

MXFP4 goes exactly into 8-bit integers in blocks of 32: twice an E2M1 value is an integer between
-12 and 12, so q = 128 + 2 x value with the scale 2^(byte - 128). (Four bits cannot hold +-12, and
the operator's own fp4 runs on some GPUs only.) Only the sign of zero is lost.
"""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from moe_jax.formats.arrays import OUT_IN, numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx.graph import finite_cast
from moe_jax.quantization.codes import pack_codes, unpack_codes
from moe_jax.quantization.integer import PackedIntegers
from moe_jax.quantization.mxfp4 import BLOCK_SIZE, BlockScaled
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.tagged import is_tagged, tag

_TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
_ZERO_POINT = 128
_NAN_SCALE = 255


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of all experts.

    Attributes:
        values: floats [expert, out, in], or codes, uint8, one a byte.
        scales: floats [expert, out, group], one group where a row has one; None for floats.
        zero_points: uint8 [expert, out, group], or None for 2^(bits - 1).
        bits: of a code; 0 for floats.
    """

    values: np.ndarray
    scales: np.ndarray | None = None
    zero_points: np.ndarray | None = None
    bits: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, outputs, inputs."""
        return self.values.shape

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return 1 if self.scales is None else self.scales.shape[-1]

    @property
    def group_size(self) -> int:
        """Codes that share a scale."""
        return self.shape[-1] // self.groups

    @property
    def _form(self) -> tuple[Any, ...]:
        return self.values.dtype, self.bits, self.groups, self.zero_points is None

    def rows(self, index: np.ndarray) -> Self:
        """The rows `index` of every expert, in that order."""
        return self._map(lambda array: array[:, index])

    def join(self, other: "Matrix") -> "Matrix":
        """The rows of both. Raises FormatError where they are not of one form."""
        if self._form != other._form:
            raise FormatError(
                f"gate and up must be of one form to be joined in fc1, got {self.describe()} and "
                f"{other.describe()}"
            )
        parts = [
            None if a is None or b is None else np.concatenate([a, b], 1)
            for a, b in zip(self._arrays(), other._arrays(), strict=True)
        ]
        return Matrix(parts[0], *parts[1:], self.bits)  # type: ignore[arg-type]

    def describe(self) -> str:
        """For messages."""
        if not self.bits:
            return f"{self.values.dtype} {list(self.shape)}"
        zero = "without" if self.zero_points is None else "with"
        return (
            f"{self.bits}-bit {list(self.shape)} in groups of {self.group_size} {zero} zero points"
        )

    def _arrays(self) -> tuple[np.ndarray | None, ...]:
        return self.values, self.scales, self.zero_points

    def _map(self, function: Any) -> Self:
        changed = [None if array is None else function(array) for array in self._arrays()]
        names = ("values", "scales", "zero_points")
        return dataclasses.replace(self, **dict(zip(names, changed, strict=True)))


def matrix_of(name: str, weight: Any, float_type: Any) -> Matrix:
    """A weight {expert, out, in} of the library; floats as `float_type`.

    Raises:
        FormatError: a kind of weight, or a scale, that the operators cannot hold.
    """
    if isinstance(weight, TiledMXFP4):
        weight = weight.untile()
    if isinstance(weight, BlockScaled):
        return _from_mxfp4(name, weight)
    if is_tagged(weight):
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise FormatError(f"{name} must be floats or packed, got {weight.dtype} {weight}")
        return Matrix(finite_cast(name, numpy_of(name, weight, OUT_IN), float_type))
    if isinstance(weight, PackedIntegers):
        return _from_integers(name, weight)
    raise FormatError(f"{name} is a {type(weight).__name__}, which QMoE has no form for")


def weight_of(matrix: Matrix, mxfp4: bool) -> Any:
    """The library's weight {expert, out, in}: floats, `PackedIntegers`, or `BlockScaled`.

    Raises:
        FormatError: `mxfp4` is asked for, and the codes or scales are not those of MXFP4; groups
            that are not whole bytes.
    """
    if mxfp4:
        return _to_mxfp4(matrix)
    return _to_integers(matrix) if matrix.bits else tag(matrix.values, *OUT_IN)


def is_integer(weight: Any) -> bool:
    """Whether it is a weight that becomes integers."""
    return isinstance(weight, BlockScaled | TiledMXFP4 | PackedIntegers)


def _from_mxfp4(name: str, weight: BlockScaled) -> Matrix:
    weight.check()
    if weight.axis != "in":
        raise FormatError(f"{name} must be in blocks along 'in', got {weight}")
    blocks = numpy_of(name, weight.blocks, ("expert", "out", "block", "byte"))
    scales = numpy_of(name, weight.scales, ("expert", "out", "block"))
    if (scales == _NAN_SCALE).any():
        raise FormatError(f"{name} holds the scale byte 255 (NaN), which fc_scales cannot say")
    codes = unpack_codes(blocks, 4).reshape(*blocks.shape[:2], -1)
    values = (_TWICE_E2M1 + _ZERO_POINT).astype(np.uint8)[codes]
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 128)
    return Matrix(values, powers.astype(np.float32), None, 8)


def _to_mxfp4(matrix: Matrix) -> BlockScaled:
    known = np.isin(matrix.values.astype(np.int32) - _ZERO_POINT, _TWICE_E2M1).all()
    if (matrix.bits, matrix.group_size) != (8, BLOCK_SIZE) or matrix.scales is None or not known:
        raise FormatError(f"not MXFP4 as 8-bit integers in blocks of 32: {matrix.describe()}")
    fractions, exponents = np.frexp(matrix.scales.astype(np.float32))
    bytes_ = exponents + 127  # frexp's fraction of a power of two is 1/2
    if not ((fractions == 0.5) & (bytes_ >= 0) & (bytes_ < _NAN_SCALE)).all():
        raise FormatError("not MXFP4: its scales are powers of two from 2^-128 to 2^126")
    if matrix.zero_points is not None and (matrix.zero_points != _ZERO_POINT).any():
        raise FormatError("not MXFP4: its zero points are 128")
    code_of = np.zeros(25, np.uint8)
    code_of[_TWICE_E2M1[8:] + 12] = np.arange(8, 16)
    code_of[_TWICE_E2M1[:8] + 12] = np.arange(8)
    codes = code_of[matrix.values.astype(np.int32) - _ZERO_POINT + 12]
    codes = codes.reshape(*matrix.scales.shape, BLOCK_SIZE)
    return BlockScaled(
        tag(pack_codes(codes, 4), "expert", "out", "block", "byte"),
        tag(bytes_.astype(np.uint8), "expert", "out", "block"),
    )


def _from_integers(name: str, weight: PackedIntegers) -> Matrix:
    weight.check()
    if weight.axis != "in":
        raise FormatError(f"{name} must be in groups along 'in', got {weight}")
    packed = numpy_of(name, weight.codes, ("expert", "out", "group", "byte"))
    scales = numpy_of(name, weight.scales, ("expert", "out", "group"))
    if scales.dtype.name == "bfloat16":  # the CPU kernels lack it, and float32 holds it
        scales = scales.astype(np.float32)
    zero = weight.zero_points
    if zero is not None:
        zero = numpy_of(name, zero, ("expert", "out", "group"))
        if (zero >> (weight.bits - 1) > 1).any():
            raise FormatError(f"{name}: zero_points must be below 2^{weight.bits}")
    codes = unpack_codes(packed, weight.bits)
    return Matrix(codes.reshape(*codes.shape[:2], -1), scales, zero, weight.bits)


def _to_integers(matrix: Matrix) -> PackedIntegers:
    if matrix.scales is None or matrix.group_size * matrix.bits % 8:
        raise FormatError(f"groups must be whole bytes to be read, got {matrix.describe()}")
    codes = matrix.values.reshape(*matrix.scales.shape, matrix.group_size)
    zero = matrix.zero_points
    return PackedIntegers(
        tag(pack_codes(codes, matrix.bits), "expert", "out", "group", "byte"),
        tag(matrix.scales, "expert", "out", "group"),
        None if zero is None else tag(zero, "expert", "out", "group"),
        matrix.bits,
    )
