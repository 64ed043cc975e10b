"""MXFP4 by the types of ml_dtypes."""

import ml_dtypes
import numpy as np


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] -> uint8 [..., 2 n], of each byte the low four bits first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(
        *packed.shape[:-1], 2 * packed.shape[-1]
    )


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers that MXFP4 stands for; NaN where a scale is 255.

    Args:
        blocks: uint8 [..., block, 16], two E2M1 codes a byte, the even element in the low half.
        scales: uint8 [..., block], E8M0: the power of two 2**(byte - 127).

    Returns:
        float64 [..., 32 * block].
    """
    values = nibbles(blocks).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return (values * powers[..., None]).reshape(*blocks.shape[:-2], blocks.shape[-2] * 32)
