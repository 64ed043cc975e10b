"""Whole layers in standard operators: every expert on every token, weighed.

Any runtime computes such a graph, at the cost of all experts. A token's weights are scattered into
a matrix [tokens, experts] that is 0 where an expert was not chosen; the routing is that of
`moe_jax.route`, in float32. Weights are [expert, in, out] and biases [expert, out], in their own
dtype, and are cast to that of the tokens.

    write("layer.onnx", layer)      # an MoE, several by name, or a Flax model that holds some
    read("layer.onnx")              # {"moe": MoE}

A file notes its layers in its metadata, so that `read` reads them back bit for bit. It
then writes them anew and compares, so that a file whose nodes were changed since is refused.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from moe_jax.activations import Activation
from moe_jax.formats.arrays import IN_OUT, weight_from_in_out
from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import Layers, check_sayable, experts_of
from moe_jax.formats.onnx import graph
from moe_jax.formats.onnx.common import layers_model
from moe_jax.formats.onnx.expert_nodes import EXPERTS, add_experts
from moe_jax.formats.onnx.routing_nodes import add_routing
from moe_jax.formats.onnx.writer import Writer, read_notes
from moe_jax.layer import MoE
from moe_jax.norms import Norm
from moe_jax.routing import Router
from moe_jax.tagged import Tagged, tag
from moe_jax.variables import value

DTYPES = ("float32", "float16")
"""What tokens may be."""

_KIND = "dense"
_FLOAT32 = np.dtype(np.float32)
_STATIC: Mapping[str, Any] = {"activation": Activation, "norm": Norm}
"""The options of experts, by field."""
_PARTS = (
    "router",
    "router_bias",
    "selection_bias",
    "router_norm",
    "router_norm_weight",
    "remaining_weight",
)


def write(
    path: str | os.PathLike[str],
    layers: Layers,
    *,
    dtype: str = "float32",
    external_data: str | None = None,
) -> None:
    """Writes layers to an ONNX file; constants to a file `external_data` beside it, if named.

    The other arguments and the errors are those of `to_model`.
    """
    graph.save(to_model(layers, dtype=dtype), path, external_data=external_data)


def to_model(layers: Layers, *, dtype: str = "float32") -> ModelProto:
    """A model with the nodes of each layer, from inputs `NAME.x` to outputs `NAME.y`.

    Args:
        layers: one layer, whose input and output are `x` and `y`, several by name, or a Flax
            model, of which the `MoE` inside are taken.
        dtype: of inputs and outputs, `float32` or `float16`.

    Raises:
        FormatError: a layer cannot be said; the message names its field.
        TypeError: `layers` holds something else than `MoE`.
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
    check_sayable(layer, *_PARTS)
    experts, sizes = experts_of(layer), value(layer.router_weight).sizes
    result = f"{name}/y"
    with writer.scope(name):
        rows = writer.op("Reshape", x, writer.integers(-1, sizes["d"]))
        weights = add_routing(writer, layer, rows, name)
        outputs = add_experts(writer, experts, rows, sizes, name)
        summed = _add_sum(writer, outputs, weights)
        if layer.config.remaining_weight == "input":
            summed = _add_remaining(writer, summed, rows, weights, sizes["expert"])
        summed = writer.reshape_like(writer.cast(summed, _FLOAT32, writer.dtype), x)
        writer.nodes.append(graph.node("Identity", [summed], [result], name=result))
    writer.note(name, kind=_KIND, x=x, dtype=str(writer.dtype), **_description(layer, experts))
    return result


def read(source: str | os.PathLike[str] | ModelProto) -> dict[str, MoE]:
    """The layers that `to_model` or `add_dense` wrote into a file, by name.

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


def _add_sum(writer: Writer, outputs: str, weights: str) -> str:
    """The sum over experts of outputs [E, T, D], weighed by [T, E], in float32: [T, D].

    What an expert that was not chosen makes of a token counts as 0, even if it overflowed.
    """
    zero = writer.constant("0.0:float32", np.float32(0))
    columns = writer.op(
        "Unsqueeze", writer.op("Transpose", weights, perm=[1, 0]), writer.integers(2)
    )
    outputs = writer.cast(outputs, writer.dtype, _FLOAT32)
    weighted = writer.op(
        "Where",
        writer.op("Equal", columns, zero),
        zero,
        writer.op("Mul", outputs, columns),
    )
    return writer.op("ReduceSum", weighted, writer.integers(0), keepdims=0)


def _add_remaining(writer: Writer, y: str, rows: str, weights: str, num_experts: int) -> str:
    """y and as much of each row as the weights leave of 1, in float32."""
    ones = writer.constant(f"ones [{num_experts}, 1]", np.ones((num_experts, 1), np.float32))
    used = writer.op("MatMul", weights, ones)
    left = writer.op("Sub", writer.constant("1.0:float32", np.float32(1)), used)
    rows = writer.cast(rows, writer.dtype, _FLOAT32)
    return writer.op("Add", y, writer.op("Mul", left, rows))


def _description(layer: MoE, experts: Any) -> dict[str, Any]:
    """What of a layer is not in its arrays, as JSON."""
    config = layer.config
    static = {name: getattr(experts, name) for name in _STATIC if hasattr(experts, name)}
    return {
        "experts": type(experts).__name__,
        "static": {name: dataclasses.asdict(option) for name, option in static.items()},
        "router": dataclasses.asdict(config.router),
        "router_norm": dataclasses.asdict(config.router_norm),
        "remaining_weight": config.remaining_weight,
        "experts_per_token": config.experts_per_token,
    }


def _layer(name: str, note: Mapping[str, Any], constants: Mapping[str, onnx.TensorProto]) -> MoE:
    """The layer that a note describes."""

    def optional(field: str, *axes: str) -> Tagged | None:
        tensor = constants.get(f"{name}.{field}")
        if tensor is None:
            return None
        array = onnx.numpy_helper.to_array(tensor)
        return weight_from_in_out(array) if "in" in axes else tag(array, *axes)

    def needed(field: str, *axes: str) -> Tagged:
        found = optional(field, *axes)
        if found is None:
            raise KeyError(f"there is no constant {name}.{field}")
        return found

    kind = {kind.__name__: kind for kind in EXPERTS}[note["experts"]]
    fields: dict[str, Any] = {
        key: _STATIC[key](**options) for key, options in note["static"].items()
    }
    for part in EXPERTS[kind].matrices:
        fields[part.weight] = needed(f"experts.{part.weight}", *IN_OUT)
        if part.bias is not None:
            fields[part.bias] = optional(f"experts.{part.bias}", "expert", "out")
    for field in EXPERTS[kind].norm or ():
        fields[field] = optional(f"experts.{field}", "expert", "d")
    return MoE(
        kind(**fields),
        needed("router_weight", "expert", "d"),
        optional("router_bias", "expert"),
        experts_per_token=note["experts_per_token"],
        router=Router(**note["router"]),
        selection_bias=optional("selection_bias", "expert"),
        router_norm_weight=optional("router_norm_weight", "d"),
        router_norm=Norm(**note["router_norm"]),
        remaining_weight=note["remaining_weight"],
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
