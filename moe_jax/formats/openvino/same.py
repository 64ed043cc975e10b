"""Whether two OpenVINO graphs are the same, node by node."""

import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.formats.openvino.nodes import Node


def check_same(found: Node, expected: Node) -> None:
    """Compares all that two nodes are computed from: operations, attributes, constants, inputs.

    Raises:
        FormatError: they differ; names the node and what was expected.
    """
    pairs, seen = [(found, expected)], set()
    while pairs:
        one, other = pairs.pop()
        key = (one.get_friendly_name(), other.get_friendly_name())
        if key in seen:
            continue
        seen.add(key)
        _check_node(one, other)
        for index in range(one.get_input_size()):
            a, b = one.input_value(index), other.input_value(index)
            if a.get_index() != b.get_index():
                _refuse(one, f"output {b.get_index()} at input {index}", f"output {a.get_index()}")
            pairs.append((a.get_node(), b.get_node()))


def _check_node(found: Node, expected: Node) -> None:
    kinds = found.get_type_name(), expected.get_type_name()
    if kinds[0] != kinds[1]:
        _refuse(found, kinds[1], kinds[0])
    if kinds[0] == "Constant":
        _check_constant(found, expected)
        return
    if kinds[0] == "Parameter":
        sides = [
            f"{n.get_element_type().to_string()}{n.get_partial_shape()}" for n in (found, expected)
        ]
        if sides[0] != sides[1]:
            _refuse(found, sides[1], sides[0])
        return
    sizes = found.get_input_size(), expected.get_input_size()
    if sizes[0] != sizes[1]:
        _refuse(found, f"{sizes[1]} inputs", f"{sizes[0]}")
    attributes = found.get_attributes(), expected.get_attributes()
    for name, value in attributes[1].items():
        if attributes[0].get(name) != value:
            _refuse(found, f"{name}={value}", f"{attributes[0].get(name)}")


def _check_constant(found: Node, expected: Node) -> None:
    types = found.get_element_type(), expected.get_element_type()
    if types[0] != types[1]:
        _refuse(found, types[1].to_string(), types[0].to_string())
    arrays = np.asarray(found.data), np.asarray(expected.data)
    bits = [array.reshape(-1).view(np.uint8) for array in arrays]
    if arrays[0].shape != arrays[1].shape or not np.array_equal(bits[0], bits[1]):
        _refuse(found, f"constant {_short(arrays[1])}", _short(arrays[0]))


def _short(array: np.ndarray) -> str:
    return str(array.tolist()) if array.size <= 8 else f"of shape {list(array.shape)}"


def _refuse(node: Node, expected: str, found: str) -> None:
    kind, name = node.get_type_name(), node.get_friendly_name()
    raise FormatError(f"{kind} {name!r}: expected {expected}, found {found}")
