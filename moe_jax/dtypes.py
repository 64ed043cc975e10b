"""Which dtype sums are kept in."""

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
    """The dtype for sums of values of `dtype`: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
