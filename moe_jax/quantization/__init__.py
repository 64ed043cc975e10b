"""Number formats of weights that take less room than floats."""

from moe_jax.quantization.fp8 import fake_quantize_fp8
from moe_jax.quantization.integer import (
    PackedIntegers,
    dequantize_integers,
    fake_quantize_integers,
    quantize_integers,
)
from moe_jax.quantization.mxfp4 import (
    BLOCK_SIZE,
    BlockScaled,
    dequantize_mxfp4,
    fake_quantize_mxfp4,
    quantize_mxfp4,
)
from moe_jax.quantization.nvfp4 import (
    PackedNVFP4,
    dequantize_nvfp4,
    fake_quantize_nvfp4,
    quantize_nvfp4,
)
from moe_jax.quantization.packed import Packed, is_packed
from moe_jax.quantization.tiled import TiledMXFP4, tile_mxfp4

__all__ = [
    "BLOCK_SIZE",
    "BlockScaled",
    "Packed",
    "PackedIntegers",
    "PackedNVFP4",
    "TiledMXFP4",
    "dequantize_integers",
    "dequantize_mxfp4",
    "dequantize_nvfp4",
    "fake_quantize_fp8",
    "fake_quantize_integers",
    "fake_quantize_mxfp4",
    "fake_quantize_nvfp4",
    "is_packed",
    "quantize_integers",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "tile_mxfp4",
]
