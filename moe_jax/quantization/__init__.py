"""Number formats of weights that take less room than floats."""

from moe_jax.quantization.mxfp4 import (
    BLOCK_SIZE,
    BlockScaled,
    dequantize_mxfp4,
    fake_quantize_mxfp4,
    quantize_mxfp4,
)

__all__ = [
    "BLOCK_SIZE",
    "BlockScaled",
    "dequantize_mxfp4",
    "fake_quantize_mxfp4",
    "quantize_mxfp4",
]
