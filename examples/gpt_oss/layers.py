"""The two plain layers of gpt-oss: normalisation and linear maps, on tagged arrays."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.tagged import Tagged
from moe_jax.variables import param, value


class RMSNorm(nnx.Module):
    """Divides by the root mean square, in float32; the result has the dtype of the input.

    Attributes:
        weight: Param of {d}.
        epsilon: added to the mean square.
    """

    def __init__(self, weight: Tagged, epsilon: float) -> None:
        self.weight = param(weight)
        self.epsilon = epsilon

    def __call__(self, x: Tagged) -> Tagged:
        """{..., d} -> {..., d}."""
        wide = x.astype(jnp.float32)
        square = (wide * wide).sum("d") * (1.0 / x.size("d"))
        scale = square.map(lambda s: lax.rsqrt(s + self.epsilon))
        return (wide * scale * value(self.weight).astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """x w^T + bias.

    Attributes:
        weight: Param of {out, in}, whatever the two axes are called.
        bias: Param of {out}, or None.
    """

    def __init__(self, weight: Tagged, bias: Tagged | None = None) -> None:
        self.weight = param(weight)
        self.bias = None if bias is None else param(bias)

    def __call__(self, x: Tagged, over: str, preferred_element_type: Any = None) -> Tagged:
        """Multiplies over the axis `over`; the result has the dtype of x unless one is named."""
        y = x.dot(
            value(self.weight).astype(x.dtype),
            over,
            preferred_element_type=preferred_element_type,
            precision=lax.Precision.HIGHEST,
        )
        return y if self.bias is None else y + value(self.bias).astype(y.dtype)
