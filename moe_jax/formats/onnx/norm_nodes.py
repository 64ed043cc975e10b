"""Normalization in standard operators; see `moe_jax.Norm` for what it is."""

import numpy as np

from moe_jax.formats.onnx.writer import Writer
from moe_jax.norms import Norm


def add_norm(writer: Writer, norm: Norm, x: str, weight: str, bias: str | None = None) -> str:
    """Normalizes the last axis of float32 `x`; weight and bias broadcast against it."""
    if norm.kind == "layer":
        x = writer.op("Sub", x, writer.op("ReduceMean", x, axes=[-1], keepdims=1))
    squares = writer.op("ReduceMean", writer.op("Mul", x, x), axes=[-1], keepdims=1)
    eps = writer.constant(f"{norm.eps!r}:float32", np.float32(norm.eps))
    deviation = writer.op("Sqrt", writer.op("Add", squares, eps))
    normed = writer.op("Mul", writer.op("Div", x, deviation), weight)
    return normed if bias is None else writer.op("Add", normed, bias)
