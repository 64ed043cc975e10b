"""The arrays of layers as NumPy arrays that a format can hold, or a refusal that names them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.quantization.packed import is_packed
from moe_jax.tagged import Tagged, tag

FLOATS = ("float32", "float16", "bfloat16")
"""The dtypes of weights that most formats hold."""

OUT_IN = ("expert", "out", "in")
"""The axes of weights of experts as the library and PyTorch's Linear have them."""

IN_OUT = ("expert", "in", "out")
"""The axes of weights of experts as a matmul of rows takes them, from the right."""


def check_unpacked(name: str, value: Any) -> None:
    """Raises FormatError where a weight is packed and a format holds floats alone."""
    if is_packed(value):
        raise FormatError(
            f"{name} is {type(value).__name__}: this format holds floats, decode it with its "
            f"method dequantize"
        )


def numpy_of(
    name: str,
    value: Any,
    axes: Sequence[str],
    *,
    sizes: Mapping[str, int] | None = None,
    dtypes: Sequence[str] | None = None,
) -> np.ndarray:
    """A layer's array {*axes} as [*axes], with its own dtype and without rounding.

    Args:
        name: of the field that holds it, for messages.
        value: a `Tagged`.
        axes: all of its axes, in the order that the result is to have.
        sizes: what axes must measure, as far as that is known.
        dtypes: names of the dtypes that the format holds; None for every dtype.

    Raises:
        FormatError: it is packed, or has other axes, sizes or another dtype.
    """
    check_unpacked(name, value)
    if not isinstance(value, Tagged) or set(value.axes) != set(axes):
        raise FormatError(f"{name} must have the axes {{{', '.join(axes)}}}, got {value}")
    wrong = {axis: n for axis, n in (sizes or {}).items() if value.sizes.get(axis, n) != n}
    if wrong:
        raise FormatError(f"{name} must have {wrong}, got {value}")
    if dtypes is not None and str(value.dtype) not in dtypes:
        raise FormatError(f"{name} is {value.dtype}: expected {' or '.join(dtypes)}, cast it")
    return np.asarray(value.untag(*axes))


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises FormatError where a router's array holds infinity or NaN."""
    if not np.isfinite(array.astype(np.float32)).all():
        raise FormatError(
            f"{name} must be finite: this format cannot say that an expert is barred, leave it out"
        )


def check_all_or_none(arrays: Mapping[str, Any]) -> None:
    """Raises FormatError where some of the biases, by name, are None and others are not."""
    missing = [name for name, array in arrays.items() if array is None]
    if missing and len(missing) < len(arrays):
        given = [name for name in arrays if name not in missing]
        raise FormatError(
            f"{', '.join(missing)} is None and {', '.join(given)} is not: give all or none"
        )


def weight_from_in_out(array: np.ndarray) -> Tagged:
    """[E, in, out] as {expert, out, in}, the order that the library's own weights have."""
    return tag(jnp.asarray(array.swapaxes(1, 2)), *OUT_IN)
