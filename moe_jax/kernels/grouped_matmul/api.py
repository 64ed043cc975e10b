"""The grouped matmul and the choice of its backend.

Contract, for every backend:

    rows          {row, in}            float32 or bfloat16, sorted by expert
    weight        {expert, out, in}    a float array, or BlockScaled (MXFP4)
    group_sizes   {expert}             int32; the first group_sizes[0] rows belong to expert 0, ...
    result        {row, out}           dtype of rows; sums are kept in float32
                                       rows past the sum of group_sizes are zero

Shapes are static, the contents of `group_sizes` are not: experts without rows, all rows with one
expert, and no rows at all are valid. Gradients reach `rows`, and `weight` where it is floats.
"""

from typing import Literal

import jax.numpy as jnp

from moe_jax.kernels.grouped_matmul import reference
from moe_jax.quantization.mxfp4 import BlockScaled
from moe_jax.tagged import Tagged

type Implementation = Literal["xla"]

_IMPLEMENTATIONS = {"xla": reference.grouped_matmul}


def grouped_matmul(
    rows: Tagged,
    weight: Tagged | BlockScaled,
    group_sizes: Tagged,
    *,
    implementation: Implementation | None = None,
) -> Tagged:
    """Multiplies each row with the weight of its expert.

    Args:
        rows: {row, in}, sorted by expert.
        weight: {expert, out, in}.
        group_sizes: int32 {expert}, how many rows each expert has.
        implementation: `xla`, or None to choose; `xla` is the only one so far.

    Returns:
        {row, out} with the dtype of `rows`.

    Raises:
        ValueError: axes or sizes do not fit, or the implementation is unknown.
        TypeError: a dtype is not supported.
    """
    _check(rows, weight, group_sizes)
    name = "xla" if implementation is None else implementation
    if name not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {sorted(_IMPLEMENTATIONS)} or None, got {name!r}"
        )
    return _IMPLEMENTATIONS[name](rows, weight, group_sizes)


def _check(rows: Tagged, weight: Tagged | BlockScaled, group_sizes: Tagged) -> None:
    if set(rows.axes) != {"row", "in"}:
        raise ValueError(f"rows must have the axes {{row, in}}, got {rows}")
    if set(weight.axes) != {"expert", "out", "in"}:
        raise ValueError(f"weight must have the axes {{expert, out, in}}, got {weight}")
    if group_sizes.axes != ("expert",):
        raise ValueError(f"group_sizes must have the axis {{expert}}, got {group_sizes}")
    if rows.size("in") != weight.size("in"):
        raise ValueError(f"axis 'in' has different sizes in rows {rows} and weight {weight}")
    if weight.size("expert") != group_sizes.size("expert"):
        raise ValueError(
            f"axis 'expert' has different sizes in weight {weight} and group_sizes {group_sizes}"
        )
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise TypeError(f"rows must be floats, got {rows.dtype}")
    if isinstance(weight, Tagged) and not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"weight must be floats or BlockScaled, got {weight.dtype} {weight}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes must be integers, got {group_sizes.dtype}")
