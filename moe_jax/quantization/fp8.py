"""FP8 (e4m3fn) with static scales: quantise and dequantise at once.

The format has 256 codes: sign, four exponent bits (bias 7), three mantissa bits; the largest number
is 448, the smallest 2^-9, there is no infinity, and two codes are NaN. A cast in JAX or ml_dtypes
makes NaN of what lies outside; here it saturates, as in TensorRT and ONNX (`saturate=1`).

Sources: "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433; the ONNX operators
QuantizeLinear and DequantizeLinear.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.quantization.division import divide
from moe_jax.quantization.packed import float_type
from moe_jax.tagged import Tagged

LARGEST = 448.0
"""The largest number of e4m3fn."""


def to_fp8(x: jax.Array) -> jax.Array:
    """float32 -> float8_e4m3fn, to the nearest, ties to even; saturates, and NaN stays NaN."""
    limited = jnp.where(jnp.isnan(x), x, jnp.clip(x, -LARGEST, LARGEST))
    return limited.astype(jnp.float8_e4m3fn)


@jax.custom_jvp
def fake_quantize_fp8(x: Tagged, scale: Tagged) -> Tagged:
    """Rounds floats to what FP8 with a scale can hold, with the gradient of the identity.

    The result is scale x e4m3fn(x / scale), computed in float32 and returned in the dtype of `x`;
    infinities saturate as every number above 448 scales. Cotangents pass through to `x` unchanged
    (straight-through estimator), and none reaches `scale`.

    Args:
        x: float32, bfloat16 or float16 {...}.
        scale: floats with some of the axes of `x`, or with none for one scale for all; positive.

    Raises:
        TypeError: `x` or `scale` is not a `Tagged` of one of these dtypes.
        ValueError: `scale` has an axis that `x` has not, or one of another size.
    """
    for name, value in (("x", x), ("scale", scale)):
        if not isinstance(value, Tagged):
            raise TypeError(f"{name} must be Tagged, got {type(value).__name__}")
        float_type(value.dtype)
    if not set(scale.axes) <= set(x.axes):
        raise ValueError(f"the scale {scale} has axes that x {x} has not")
    factor = scale.expand_to(x).astype(jnp.float32)
    codes = to_fp8(divide(x.array.astype(jnp.float32), factor))
    return Tagged((codes.astype(jnp.float32) * factor).astype(x.dtype), x.axes)


@fake_quantize_fp8.defjvp
def _fake_quantize_jvp(primals: Any, tangents: Any) -> tuple[Tagged, Tagged]:
    return fake_quantize_fp8(*primals), tangents[0]
