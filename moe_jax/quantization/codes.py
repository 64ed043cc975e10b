"""Codes of 2, 4 or 8 bits in bytes, the lowest bits first; for NumPy and for JAX arrays alike."""

from typing import Any

import jax
import numpy as np


def pack_codes[Array: (np.ndarray, jax.Array)](codes: Array, bits: int) -> Array:
    """uint8 [..., n] of codes below 2^bits -> uint8 [..., ceil(n bits / 8)].

    Zeros fill the last byte up.
    """
    each = 8 // bits
    if missing := -codes.shape[-1] % each:
        library: Any = codes.__array_namespace__()
        codes = library.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    packed: Any = codes[..., 0::each]
    for place in range(1, each):
        packed = packed | codes[..., place::each] << (bits * place)
    return packed


def unpack_codes[Array: (np.ndarray, jax.Array)](packed: Array, bits: int) -> Array:
    """uint8 [..., bytes] -> uint8 [..., bytes x 8 / bits], the codes that fill the bytes."""
    each = 8 // bits
    places = [packed >> (bits * place) & (2**bits - 1) for place in range(each)]
    library: Any = packed.__array_namespace__()
    return library.stack(places, -1).reshape(*packed.shape[:-1], packed.shape[-1] * each)
