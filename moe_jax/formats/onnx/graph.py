"""ONNX models from nodes and arrays, checked, and what is constant in a model that was read."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.external_data_helper import set_external_data

from moe_jax.formats.errors import FormatError

STANDARD_OPSET = 17
"""Version of the standard operators that exports use, unless they state another."""

IR_VERSION = 10
"""Version of the file format that models are written in; onnxruntime and OpenVINO read it."""

_LARGEST_FILE = 2**31 - 1
"""Bytes of the largest protobuf message."""

type Dimension = int | str | None
"""A size, the name of an unknown size, or None for an unknown size without a name."""


def initialiser(name: str, array: Any) -> TensorProto:
    """A NumPy or JAX array as a named constant, bit for bit.

    float32, float16, bfloat16 (of ml_dtypes), integers and the 8-bit floats keep their types.

    Raises:
        TypeError: ONNX has no such type.
    """
    array = np.asarray(array, order="C")  # which, unlike ascontiguousarray, keeps scalars
    if array.dtype.kind in "OSU":
        raise TypeError(f"{name!r} must be numbers, got {array.dtype}")
    try:
        return onnx.numpy_helper.from_array(array, name)
    except (KeyError, ValueError, TypeError) as error:
        raise TypeError(f"ONNX has no constants of {array.dtype}, asked for {name!r}") from error


def finite_cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Floats in `dtype`. Raises FormatError where numbers that are finite become infinite."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if (np.isfinite(array) & ~np.isfinite(result)).any():
        raise FormatError(f"{name} holds numbers beyond {np.dtype(dtype).name}")
    return result


def data_type(dtype: Any) -> int:
    """The `TensorProto` type of a dtype. Raises TypeError where there is none."""
    try:
        return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    except (KeyError, ValueError) as error:
        raise TypeError(f"ONNX has no tensors of {np.dtype(dtype)}") from error


def value(name: str, dtype: Any, shape: Sequence[Dimension]) -> ValueInfoProto:
    """An input or output of a model."""
    return onnx.helper.make_tensor_value_info(name, data_type(dtype), list(shape))


def node(
    operator: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    domain: str = "",
    name: str = "",
    **attributes: Any,
) -> NodeProto:
    """A node; an input that is not given is the empty name, and an attribute None is left out."""
    given = {key: value for key, value in attributes.items() if value is not None}
    return onnx.helper.make_node(
        operator, list(inputs), list(outputs), name=name or None, domain=domain, **given
    )


def model_of(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    initialisers: Sequence[TensorProto],
    opsets: Mapping[str, int] | None = None,
    *,
    name: str = "moe",
) -> ModelProto:
    """A model of one graph, validated by `onnx.checker` with inference of shapes.

    Args:
        nodes: in the order of execution.
        inputs: what a caller gives.
        outputs: what a caller gets.
        initialisers: constants.
        opsets: version by domain, the standard operators' domain being "" (17 where not given).
        name: the graph's name.

    Raises:
        FormatError: the checker refuses the model, or it is too large for one protobuf.
    """
    versions = {"": STANDARD_OPSET, **(opsets or {})}
    graph = onnx.helper.make_graph(
        list(nodes), name, list(inputs), list(outputs), list(initialisers)
    )
    model = onnx.helper.make_model(
        graph,
        producer_name="moe_jax",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid(*pair) for pair in versions.items()],
    )
    return check(model)


def check(model: ModelProto) -> ModelProto:
    """Returns `model` if `onnx.checker` accepts it. Raises FormatError otherwise."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size > _LARGEST_FILE:
        raise FormatError(
            f"the constants are {size} bytes, and one ONNX message holds {_LARGEST_FILE}: "
            f"write fewer layers to a file"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FormatError(f"not a valid ONNX model: {error}") from error
    return model


def load(source: str | os.PathLike[str] | ModelProto) -> ModelProto:
    """A model from a file, with its external data, or the model given.

    Raises:
        FormatError: the file is not an ONNX model, or its external data is missing.
        OSError: the file cannot be read.
    """
    if isinstance(source, ModelProto):
        return source
    try:
        model = onnx.load_model(source)
    except OSError:
        raise
    except Exception as error:  # protobuf and onnx raise types of their own
        raise FormatError(f"{os.fspath(source)} cannot be read as ONNX: {error}") from error
    if not model.HasField("graph"):
        raise FormatError(f"{os.fspath(source)} holds no ONNX graph")
    if not _is_text(model):
        raise FormatError(f"{os.fspath(source)} holds names that are not UTF-8: it is damaged")
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.DEFAULT:
            tensor.ClearField("data_location")  # which is all that tells external data by now
    return model


def _is_text(message: Any) -> bool:
    """Whether all that should be text is, which protobuf does not check."""
    try:
        for field, found in message.ListFields():
            values = [found] if isinstance(found, str | bytes | Message) else found
            if field.type == field.TYPE_STRING and not all(isinstance(v, str) for v in values):
                return False
            if field.type == field.TYPE_MESSAGE and not all(map(_is_text, values)):
                return False
    except UnicodeDecodeError:
        return False
    return True


def save(
    model: ModelProto, path: str | os.PathLike[str], *, external_data: str | None = None
) -> None:
    """Writes a model; its constants to a file `external_data` beside it where that is named.

    Both files are replaced.

    Raises:
        FormatError: `external_data` is not a file name, or is that of the model.
    """
    if external_data is None:
        onnx.save_model(model, path)
        return
    path = Path(path)
    if Path(external_data).name != external_data or external_data in ("", "..", path.name):
        raise FormatError(
            f"external_data must be the name of a file beside {path.name}, got {external_data!r}"
        )
    (path.parent / external_data).unlink(missing_ok=True)  # onnx adds to a file that is there
    copy = ModelProto()
    copy.CopyFrom(model)  # onnx moves the constants out of the model it is given
    for tensor in copy.graph.initializer:
        if tensor.data_type != TensorProto.INT64:  # shapes, which runtimes need to read the rest
            set_external_data(tensor, external_data)
    onnx.save_model(copy, path)


@dataclasses.dataclass(frozen=True)
class Found:
    """A node of a graph, with what is known of its surroundings.

    Attributes:
        node: the node.
        constants: the constants that it may name, those of outer graphs included.
        producers: the nodes that make its inputs, by the name of what they make.
    """

    node: NodeProto
    constants: Mapping[str, TensorProto]
    producers: Mapping[str, NodeProto]

    def attributes(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The node's attributes, the rest from `defaults`; text as str.

        Raises:
            FormatError: an attribute that is not among `defaults`, or of another type.
        """
        given = {}
        for attribute in self.node.attribute:
            if attribute.name not in defaults:
                raise FormatError(
                    f"{describe(self.node)} has the unknown attribute {attribute.name!r}; "
                    f"known are {sorted(defaults)}"
                )
            found = onnx.helper.get_attribute_value(attribute)
            found = found.decode() if isinstance(found, bytes) else found
            default = defaults[attribute.name]
            if default is not None and type(found) is not type(default):
                raise FormatError(
                    f"{describe(self.node)}: {attribute.name} must be of type "
                    f"{type(default).__name__}, got {found!r}"
                )
            given[attribute.name] = found
        return {**defaults, **given}

    def input(self, position: int) -> str:
        """The name of an input, empty where it is not given."""
        names = self.node.input
        return names[position] if position < len(names) else ""

    def constant_named(self, name: str) -> np.ndarray | None:
        """A constant, also one that is transposed or cast without loss; None for other values."""
        if name in self.constants:
            return onnx.numpy_helper.to_array(self.constants[name])
        made = self.producers.get(name)
        if made is None or made.domain or made.op_type not in ("Cast", "Identity", "Transpose"):
            return None
        array = self.constant_named(made.input[0])
        options = {a.name: onnx.helper.get_attribute_value(a) for a in made.attribute}
        if array is None or made.op_type == "Identity":
            return array
        if made.op_type == "Transpose":
            return array.transpose(options.get("perm"))
        cast = array.astype(onnx.helper.tensor_dtype_to_np_dtype(options["to"]))
        if array.dtype.kind in "iub":
            return cast
        # what a cast of floats keeps is the same number in the smaller type
        kept = (cast.astype(array.dtype) == array) | (array != array)
        return array if kept.all() else cast

    def constant(self, position: int, meaning: str) -> np.ndarray | None:
        """The value of an input, None where the input is not given.

        Raises:
            FormatError: the input is not a constant.
        """
        name = self.input(position)
        if not name:
            return None
        array = self.constant_named(name)
        if array is None:
            raise FormatError(
                f"{describe(self.node)}: input {position} ({meaning}) is {name!r}, which is not "
                f"a constant of the file: only weights that are initialisers can be read"
            )
        return array


def describe(node: NodeProto) -> str:
    """A node for messages: its operator, and its name or its first output."""
    domain = f"{node.domain}." if node.domain else ""
    return f"{domain}{node.op_type} {(node.name or node.output[0])!r}"


def find(model: ModelProto, domain: str, *operators: str) -> Iterator[Found]:
    """The nodes of these operators, in the graph and in the graphs inside its nodes."""
    yield from _find(model.graph, domain, operators, {}, {})


def _find(
    graph: GraphProto,
    domain: str,
    operators: Sequence[str],
    constants: Mapping[str, TensorProto],
    producers: Mapping[str, NodeProto],
) -> Iterator[Found]:
    producers = {**producers, **{name: n for n in graph.node for name in n.output}}
    constants = {**constants, **_constants(graph)}
    for one in graph.node:
        if one.domain == domain and one.op_type in operators:
            yield Found(one, constants, producers)
        for attribute in one.attribute:
            inner = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for subgraph in inner:
                yield from _find(subgraph, domain, operators, constants, producers)


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Initialisers, and the values of Constant nodes that hold a tensor."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for one in graph.node:
        if one.op_type == "Constant" and not one.domain:
            for attribute in one.attribute:
                if attribute.name == "value":
                    found[one.output[0]] = attribute.t
    return found
