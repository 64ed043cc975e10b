"""Constants of OpenVINO graphs: written, and read back bit for bit."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.formats.openvino.package import load_openvino

type Node = Any
"""A node or an output of an OpenVINO graph."""

ov = load_openvino()
op = ov.opset15


def integers(values: int | list[int]) -> Node:
    """An int64 constant."""
    return op.constant(np.array(values, np.int64))


def single(value: float) -> float:
    """The shortest decimal that is the same float32 number.

    A layer's numbers take effect in float32, and the graph holds them so.

    Raises:
        FormatError: as float32 it is infinite, or 0 where it was not.
    """
    with np.errstate(over="ignore", under="ignore"):
        stored = np.float32(value)
    if not np.isfinite(stored) or (stored == 0) != (value == 0):
        raise FormatError(f"{value} is outside the range of float32")
    return float(str(stored))


def scalar(value: float) -> Node:
    """A float32 constant without axes. Raises FormatError as `single` does."""
    return op.constant(np.array(single(value), np.float32))


def floats(array: np.ndarray) -> Node:
    """A float32 value from a constant of the array's own dtype: float32, float16 or bfloat16."""
    if array.dtype != jnp.bfloat16:
        constant = op.constant(np.ascontiguousarray(array))
    else:
        # NumPy has no bfloat16: OpenVINO shows such a tensor's bytes as float16
        tensor = ov.Tensor(ov.Type.bf16, ov.Shape(list(array.shape)))
        tensor.data[...] = array.view(np.float16)
        constant = op.constant(tensor)
    if array.dtype == np.float32:
        return constant
    return op.convert(constant, "f32")


def array_of(node: Node) -> np.ndarray:
    """The array of a constant, or of a constant that is converted; a copy.

    Raises:
        FormatError: the node is something else.
    """
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        raise FormatError(
            f"expected a constant at {node.get_friendly_name()!r}, found {node.get_type_name()}"
        )
    data = np.array(node.data)
    is_bfloat16 = node.get_element_type() == ov.Type.bf16
    return data.view(ml_dtypes.bfloat16) if is_bfloat16 else data
