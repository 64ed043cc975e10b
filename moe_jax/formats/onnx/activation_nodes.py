"""The activations of experts in standard operators; see `moe_jax.Activation` for what they are."""

import math
from collections.abc import Callable, Mapping

from moe_jax.activations import Activation
from moe_jax.formats.onnx.writer import Writer

_END = 2**63 - 1
"""An end of a slice that is beyond every axis."""


def add_activation(writer: Writer, activation: Activation, x: str) -> str:
    """Activates the last axis of `x`; a gated kind halves it, for it holds both lanes."""
    if not activation.gated:
        return _CURVES[activation.kind](writer, x)
    first, second = _SPLITS[activation.layout.split("_")[0]](writer, x)
    if activation.layout.endswith("up_first"):
        first, second = second, first
    return add_combine(writer, activation, first, second)


def add_combine(writer: Writer, activation: Activation, gate: str, up: str) -> str:
    """Activates `gate` and multiplies it with the linear lane `up`, of the same shape."""
    if activation.limit is not None:
        limit = writer.number(activation.limit)
        gate = writer.op("Min", gate, limit)
        up = writer.op("Clip", up, writer.number(-activation.limit), limit)
    if activation.kind == "swiglu":
        gate = _swish(writer, gate, activation.alpha)
    else:
        gate = _CURVES[_GATES[activation.kind]](writer, gate)
    if activation.beta:
        up = writer.op("Add", up, writer.number(activation.beta))
    return writer.op("Mul", gate, up)


def _swish(writer: Writer, x: str, alpha: float = 1.0) -> str:
    slope = x if alpha == 1.0 else writer.op("Mul", x, writer.number(alpha))
    return writer.op("Mul", x, writer.op("Sigmoid", slope))


def _gelu(writer: Writer, x: str) -> str:
    scaled = writer.op("Mul", x, writer.number(math.sqrt(0.5)))
    return _half(writer, x, writer.op("Erf", scaled))


def _gelu_tanh(writer: Writer, x: str) -> str:
    cube = writer.op("Mul", x, writer.op("Mul", x, x))
    inner = writer.op("Add", x, writer.op("Mul", cube, writer.number(0.044715)))
    scaled = writer.op("Mul", inner, writer.number(math.sqrt(2 / math.pi)))
    return _half(writer, x, writer.op("Tanh", scaled))


def _half(writer: Writer, x: str, curve: str) -> str:
    """x / 2 * (1 + curve)."""
    half = writer.op("Mul", x, writer.number(0.5))
    return writer.op("Mul", half, writer.op("Add", curve, writer.number(1.0)))


def _interleaved(writer: Writer, x: str) -> tuple[str, str]:
    end, axis, step = writer.integers(_END), writer.integers(-1), writer.integers(2)
    first, second = (writer.op("Slice", x, writer.integers(i), end, axis, step) for i in (0, 1))
    return first, second


def _concatenated(writer: Writer, x: str) -> tuple[str, str]:
    first, second = writer.ops("Split", 2, x, axis=-1)
    return first, second


_CURVES: Mapping[str, Callable[[Writer, str], str]] = {
    "identity": lambda writer, x: x,
    "relu": lambda writer, x: writer.op("Relu", x),
    "silu": _swish,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
_GATES = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "bilinear": "identity"}
_SPLITS = {"interleaved": _interleaved, "concatenated": _concatenated}
