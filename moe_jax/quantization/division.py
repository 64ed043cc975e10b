"""Division that is rounded once, whatever the compiler knows of the divisor."""

import jax
import jax.numpy as jnp


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y for float32 `x` of the larger or equal shape.

    Where the divisor is a constant, XLA multiplies by its rounded reciprocal, and a quotient next
    to a halfway point may then be rounded to the wrong side of it. A divisor that depends on `x` is
    none. (On GPUs float32 division itself may be off by the last bit.)
    """
    return x / jnp.where(jnp.isnan(x), jnp.float32(1), y)
