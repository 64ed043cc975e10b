"""Normalization of rows, as data.

    rms     x / sqrt(mean(x^2) + eps)
    layer   (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)

Either is then multiplied with a weight and, where there is one, moved by a bias.

References:
    RMS norm: https://arxiv.org/abs/1910.07467. Layer norm: https://arxiv.org/abs/1607.06450
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.tagged import Tagged


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalization.

    Attributes:
        kind: `rms`, or `layer`, which subtracts the mean first.
        eps: what is added under the square root.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"kind of norm must be 'rms' or 'layer', got {self.kind!r}")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ValueError(f"eps must be positive, got {self.eps}")

    def __call__(
        self, x: Tagged, weight: Tagged, bias: Tagged | None = None, axis: str = "d"
    ) -> Tagged:
        """Normalizes x {..., axis} over `axis`, in float32.

        Args:
            x: floats.
            weight: {axis}, or with more axes. Those that x lacks come in front of the result's.
            bias: with the axes of `weight`, or None.
            axis: what the mean is taken over.

        Returns:
            With the dtype of x.
        """
        position = x.position(axis)
        weight.position(axis)  # refuses a weight without the axis
        rows = x.astype(jnp.float32).map(lambda array: self._normalize(array, position))
        rows = _spread(rows, weight) * weight.astype(jnp.float32)
        if bias is not None:
            rows = rows + bias.astype(jnp.float32)
        return rows.astype(x.dtype)

    def _normalize(self, array: jax.Array, position: int) -> jax.Array:
        if self.kind == "layer":
            array = array - array.mean(position, keepdims=True)
        return array * jax.lax.rsqrt(jnp.square(array).mean(position, keepdims=True) + self.eps)


def _spread(x: Tagged, parameter: Tagged) -> Tagged:
    """x with the axes of `parameter` that it lacks in front."""
    missing = {axis: size for axis, size in parameter.sizes.items() if axis not in x.axes}
    return Tagged(
        jnp.broadcast_to(
            x.array.reshape([1] * len(missing) + list(x.shape)), (*missing.values(), *x.shape)
        ),
        (*missing, *x.axes),
    )
