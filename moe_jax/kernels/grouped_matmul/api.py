"""The grouped matmul and the choice of its backend.

Contract, for every backend:

    rows          {row, in}            floats, sorted by expert
    weight        {expert, out, in}    a float array, or packed: BlockScaled, TiledMXFP4, ...
    group_sizes   {expert}             int32; the first group_sizes[0] rows belong to expert 0, ...
    result        {row, out}           dtype of rows; sums are kept in float32
                                       rows past the sum of group_sizes are zero

Shapes are static, the contents of `group_sizes` are not: experts without rows, all rows with one
expert, and no rows at all are valid. Gradients reach `rows`, and `weight` where it is floats.

The kernels take rows of bfloat16, float16 and float32, those of tiled weights bfloat16. Weights of
other floats than the rows are cast to theirs.
"""

from typing import Literal, get_args

import jax.numpy as jnp

from moe_jax.kernels.grouped_matmul import floats, reference, tiled
from moe_jax.kernels.lowering import vary_together
from moe_jax.quantization.packed import Packed
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.tagged import Tagged

type Implementation = Literal["xla", "triton"]


def grouped_matmul(
    rows: Tagged,
    weight: Tagged | Packed,
    group_sizes: Tagged,
    *,
    implementation: Implementation | None = None,
) -> Tagged:
    """Multiplies each row with the weight of its expert.

    Args:
        rows: {row, in}, sorted by expert.
        weight: {expert, out, in}.
        group_sizes: int32 {expert}, how many rows each expert has.
        implementation: `xla`; `triton`, for NVIDIA GPUs; or None, which decides when the function
            is lowered, by the platform it is lowered for.

    Returns:
        {row, out} with the dtype of `rows`.

    Raises:
        ValueError: axes or sizes do not fit, or the implementation is unknown; on lowering, it is
            `triton` and the platform has no NVIDIA GPU.
        TypeError: a dtype is not supported.
        ImportError: on lowering, the implementation is `triton` and jax-triton is not installed.
    """
    _check(rows, weight, group_sizes, implementation)
    rows, weight, group_sizes = vary_together(rows, weight, group_sizes)
    if implementation == "xla" or not rows.size("row"):
        return reference.grouped_matmul(rows, weight, group_sizes)
    if isinstance(weight, Tagged):
        return _multiply_floats(rows, weight, group_sizes, implementation)
    return _multiply_packed(rows, weight, group_sizes, implementation)


def _multiply_floats(
    rows: Tagged, weight: Tagged, group_sizes: Tagged, implementation: Implementation | None
) -> Tagged:
    if rows.dtype.name not in floats.DTYPES:
        # float64, and whatever else only XLA multiplies
        return reference.grouped_matmul(rows, weight, group_sizes)
    result = floats.multiply(
        rows.untag("row", "in"),
        weight.untag("expert", "out", "in"),
        group_sizes.array.astype(jnp.int32),
        implementation,
    )
    return Tagged(result, ("row", "out"))


def _multiply_packed(
    rows: Tagged, weight: Packed, group_sizes: Tagged, implementation: Implementation | None
) -> Tagged:
    """Tiled weights have a kernel. Forced to one for others, all experts are decoded first."""
    if isinstance(weight, TiledMXFP4) and rows.dtype == jnp.bfloat16:
        result = tiled.multiply(
            rows.untag("row", "in"), weight, group_sizes.array.astype(jnp.int32), implementation
        )
        return Tagged(result, ("row", "out"))
    if implementation is None:
        return reference.grouped_matmul(rows, weight, group_sizes)
    return _multiply_floats(rows, weight.dequantize(rows.dtype), group_sizes, implementation)


def _check(
    rows: Tagged,
    weight: Tagged | Packed,
    group_sizes: Tagged,
    implementation: Implementation | None,
) -> None:
    known = get_args(Implementation.__value__)
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"implementation must be one of {sorted(known)} or None, got {implementation!r}"
        )
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
        raise TypeError(f"weight must be floats or packed, got {weight.dtype} {weight}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes must be integers, got {group_sizes.dtype}")
    if implementation == "triton" and rows.dtype.name not in floats.DTYPES:
        raise TypeError(
            f"implementation='triton' takes rows of {', '.join(floats.DTYPES)}, got {rows.dtype}"
        )
