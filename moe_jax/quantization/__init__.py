"""Number formats of weights that take less room than floats."""

from moe_jax.quantization.mxfp4 import (
    BLOCK_SIZE,
    BlockScaled,
    dequantize_mxfp4,
    fake_quantize_mxfp4,
    quantize_mxfp4,
)
from moe_jax.quantization.tiled import Packed, TiledMXFP4, is_packed, tile_mxfp4

__all__ = [
    "BLOCK_SIZE",
    "BlockScaled",
    "Packed",
    "TiledMXFP4",
    "dequantize_mxfp4",
    "fake_quantize_mxfp4",
    "is_packed",
    "quantize_mxfp4",
    "tile_mxfp4",
]
