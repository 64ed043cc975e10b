"""Whole layers in standard operators: every expert on every token, weighed.

Any runtime computes such a graph, at the cost of all experts. A token's weights are scattered into
a matrix [tokens, experts] that is 0 where an expert was not chosen; the routing is that of
`moe_jax.route`, in float32. Weights are [expert, in, out] and biases [expert, out], in their own
dtype, and are cast to that of the tokens.

A file notes its layers in its metadata, so that `import_dense` reads them back bit for bit. It
then writes them anew and compares, so that a file whose nodes were changed since is refused.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
from onnx import ModelProto

from moe_jax.activations import Activation
from moe_jax.experts.layers import MLP, GatedMLP, GptOssMLP, Identity
from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import check_sayable, experts_of
from moe_jax.formats.onnx import graph
from moe_jax.formats.onnx.activation_nodes import add_activation, add_combine
from moe_jax.formats.onnx.common import (
    WEIGHT_AXES,
    array_of,
    hidden_size,
    layers_model,
    weight_of,
)
from moe_jax.formats.onnx.routing_nodes import add_routing
from moe_jax.formats.onnx.writer import Writer, read_notes
from moe_jax.layer import MoE
from moe_jax.routing import Router
from moe_jax.tagged import Tagged
from moe_jax.variables import value

DTYPES = ("float32", "float16")
"""What tokens may be."""

_FLOATS = (*DTYPES, "bfloat16")
_KIND = "dense"


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A matrix of an expert and its bias, by the fields that hold them.

    Attributes:
        weight: {expert, out, in}.
        bias: {expert, out}; the field may be None.
        inputs: the name of the size that `in` has.
        outputs: the name of the size that `out` has; None where it is not one of those.
    """

    weight: str
    bias: str
    inputs: str
    outputs: str | None


_UP = _Linear("up", "up_bias", "d", None)
_DOWN = _Linear("down", "down_bias", "intermediate", "d")
_EXPERTS: Mapping[type, tuple[_Linear, ...]] = {
    Identity: (),
    MLP: (_UP, _DOWN),
    GptOssMLP: (_Linear("gate_up", "gate_up_bias", "d", None), _DOWN),
    GatedMLP: (_Linear("gate", "gate_bias", "d", None), _UP, _DOWN),
}
"""The experts that can be written, and their matrices in the order in which they are applied."""


def export_dense(layers: MoE | Mapping[str, MoE], *, dtype: str = "float32") -> ModelProto:
    """A model with the nodes of each layer, from inputs `NAME.x` to outputs `NAME.y`.

    Args:
        layers: one layer, whose input and output are `x` and `y`, or layers by name, such as
            `moe_layers(model)` finds.
        dtype: of inputs and outputs, `float32` or `float16`.

    Raises:
        FormatError: a layer cannot be said; the message names its field.
    """
    if dtype not in DTYPES:
        raise FormatError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    return layers_model(layers, add_dense, lambda layer: dtype)


def add_dense(writer: Writer, layer: MoE, x: str, name: str) -> str:
    """Adds a layer's nodes to a graph; returns the name of the result [..., D].

    Args:
        writer: the graph.
        layer: the layer.
        x: the name of the tokens [..., D], of the writer's dtype.
        name: what the names of nodes (`NAME/`) and of constants (`NAME.`) begin with.

    Raises:
        FormatError: the layer cannot be said.
    """
    check_sayable(layer, "router", "router_bias", "selection_bias")
    experts = experts_of(layer)
    if type(experts) not in _EXPERTS:
        known = ", ".join(kind.__name__ for kind in _EXPERTS)
        raise FormatError(f"the experts are {type(experts).__name__}: those known are {known}")
    result = f"{name}/y"
    with writer.scope(name):
        rows = writer.op("Reshape", x, writer.integers(-1, hidden_size(layer)))
        weights = add_routing(writer, layer, rows, name)
        outputs = _add_experts(writer, layer, experts, rows, name)
        summed = writer.reshape_like(_add_sum(writer, outputs, weights), x)
        writer.nodes.append(graph.node("Identity", [summed], [result], name=result))
    writer.note(name, kind=_KIND, x=x, dtype=str(writer.dtype), **_description(layer, experts))
    return result


def import_dense(source: str | os.PathLike[str] | ModelProto) -> dict[str, MoE]:
    """The layers that `export_dense` or `add_dense` wrote into a file, by name.

    Raises:
        FormatError: there is none, or the nodes are not those that would be written for it.
    """
    model = graph.load(source)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = {}
    for name, note in read_notes(model).items():
        if note.get("kind") != _KIND:
            continue
        try:
            layers[name] = _layer(name, note, constants)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"layer {name!r} cannot be read: {error}") from error
        _check_nodes(model, name, note, layers[name])
    if not layers:
        raise FormatError("the file notes no dense layers: only files of moe_jax can be read")
    return layers


def _add_experts(writer: Writer, layer: MoE, experts: Any, rows: str, name: str) -> str:
    """What every expert makes of rows [T, D]: [E, T, D], or [1, T, D] where all do the same."""
    shape = dict(value(layer.router_weight).sizes)
    constants = _constants(writer, experts, shape, name)

    def linear(x: str, part: _Linear) -> str:
        y = writer.op("MatMul", x, constants[part.weight])
        if part.bias not in constants:
            return y
        return writer.op("Add", y, writer.op("Unsqueeze", constants[part.bias], writer.integers(1)))

    # not left to the MatMul: OpenVINO does not broadcast where the number of tokens is unknown
    copies = writer.integers(shape["expert"] if constants else 1, 1, 1)
    rows = writer.op("Tile", writer.op("Unsqueeze", rows, writer.integers(0)), copies)
    *first, last = _EXPERTS[type(experts)] or (None,)
    if last is None:
        return rows
    lanes = [linear(rows, part) for part in first]
    if len(lanes) == 2:
        hidden = add_combine(writer, experts.activation, *lanes)
    else:
        hidden = add_activation(writer, experts.activation, lanes[0])
    return linear(hidden, last)


def _constants(writer: Writer, experts: Any, shape: dict[str, int], name: str) -> dict[str, str]:
    """The experts' arrays as constants of the writer's dtype, by field."""
    parts = _EXPERTS[type(experts)]
    _check_biases(experts, parts)
    result = {}
    for part in parts:
        tagged = getattr(experts, part.weight)
        sizes = {"expert": shape["expert"], "in": shape[part.inputs]}
        if part.outputs:
            sizes["out"] = shape[part.outputs]
        array = array_of(part.weight, tagged, WEIGHT_AXES, sizes, _FLOATS)
        outputs = array.shape[2]
        if part.outputs is None:
            shape["intermediate"] = _width(part, experts, shape, outputs)
        given = {part.weight: array}
        if getattr(experts, part.bias) is not None:
            given[part.bias] = array_of(
                part.bias,
                getattr(experts, part.bias),
                ("expert", "out"),
                {"expert": shape["expert"], "out": outputs},
                _FLOATS,
            )
        for field, array in given.items():
            constant = writer.constant(f"{name}.experts.{field}", array)
            result[field] = writer.cast(constant, array.dtype, writer.dtype)
    return result


def _check_biases(experts: Any, parts: tuple[_Linear, ...]) -> None:
    """Raises FormatError unless all biases are given or none."""
    missing = [part.bias for part in parts if getattr(experts, part.bias) is None]
    given = [part.bias for part in parts if part.bias not in missing]
    if missing and given:
        raise FormatError(
            f"{', '.join(missing)} is None and {', '.join(given)} is not: give all or none"
        )


def _width(part: _Linear, experts: Any, shape: dict[str, int], outputs: int) -> int:
    """The intermediate size that a matrix of `outputs` rows leads to."""
    lanes = 2 if experts.activation.gated and not isinstance(experts, GatedMLP) else 1
    width = outputs // lanes
    if outputs % lanes or shape.get("intermediate", width) != width:
        raise FormatError(
            f"{part.weight} has {outputs} outputs, which do not fit "
            f"{experts.activation.kind!r} and the other matrices"
        )
    if isinstance(experts, GatedMLP) and not experts.activation.gated:
        raise FormatError(f"activation={experts.activation}: GatedMLP needs a gated kind")
    return width


def _add_sum(writer: Writer, outputs: str, weights: str) -> str:
    """The sum over experts of outputs [E, T, D], weighed by [T, E], in float32: [T, D].

    What an expert that was not chosen makes of a token counts as 0, even if it overflowed.
    """
    float32 = np.dtype(np.float32)
    zero = writer.constant("0.0:float32", np.float32(0))
    columns = writer.op(
        "Unsqueeze", writer.op("Transpose", weights, perm=[1, 0]), writer.integers(2)
    )
    outputs = writer.cast(outputs, writer.dtype, float32)
    weighted = writer.op(
        "Where",
        writer.op("Equal", columns, zero),
        zero,
        writer.op("Mul", outputs, columns),
    )
    summed = writer.op("ReduceSum", weighted, writer.integers(0), keepdims=0)
    return writer.cast(summed, float32, writer.dtype)


def _description(layer: MoE, experts: Any) -> dict[str, Any]:
    """What of a layer is not in its arrays, as JSON."""
    activation = getattr(experts, "activation", None)
    return {
        "experts": type(experts).__name__,
        "activation": None if activation is None else dataclasses.asdict(activation),
        "router": dataclasses.asdict(layer.config.router),
        "experts_per_token": layer.config.experts_per_token,
    }


def _layer(name: str, note: Mapping[str, Any], constants: Mapping[str, onnx.TensorProto]) -> MoE:
    """The layer that a note describes."""

    def read(field: str) -> np.ndarray | None:
        tensor = constants.get(f"{name}.{field}")
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def tagged(field: str, *axes: str) -> Tagged | None:
        array = read(field)
        return None if array is None else Tagged(jnp.asarray(array), axes)

    def weight(field: str) -> Tagged:
        array = read(field)
        if array is None:
            raise KeyError(f"there is no constant {name}.{field}")
        return weight_of(array)

    kinds = {kind.__name__: kind for kind in _EXPERTS}
    kind = kinds[note["experts"]]
    fields: dict[str, Any] = {}
    for part in _EXPERTS[kind]:
        fields[part.weight] = weight(f"experts.{part.weight}")
        fields[part.bias] = tagged(f"experts.{part.bias}", "expert", "out")
    if note["activation"] is not None:
        fields["activation"] = Activation(**note["activation"])
    router_weight = tagged("router_weight", "expert", "d")
    if router_weight is None:
        raise KeyError(f"there is no constant {name}.router_weight")
    return MoE(
        kind(**fields),
        router_weight,
        tagged("router_bias", "expert"),
        experts_per_token=note["experts_per_token"],
        router=Router(**note["router"]),
        selection_bias=tagged("selection_bias", "expert"),
    )


def _check_nodes(model: ModelProto, name: str, note: Mapping[str, Any], layer: MoE) -> None:
    """Raises FormatError unless the model's nodes are those that `layer` is written as."""
    anew = Writer(np.dtype(note["dtype"]))
    add_dense(anew, layer, note["x"], name)
    expected = [node.SerializeToString(deterministic=True) for node in anew.nodes]
    found = [
        node.SerializeToString(deterministic=True)
        for node in model.graph.node
        if node.name.rpartition("/")[0] == name
    ]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    same = all(constants.get(key) == tensor for key, tensor in anew.constants.items())
    if expected != found or not same:
        raise FormatError(
            f"the nodes of layer {name!r} are not those that moe_jax writes for it: the file was "
            f"changed since"
        )
