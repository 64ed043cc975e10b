"""Layers as one OpenVINO model, and back.

A model holds any number of layers side by side. A layer called NAME has the input
`NAME.hidden_states` and the output `NAME.output`, both float32 [batch, seq, d]. Experts without a
router have the inputs `NAME.selected_experts`, int64 [batch, seq, topk], and `NAME.scores`, float32
[batch, seq, topk], too; an expert that a token names twice counts twice there, and ids must be
within the experts, for OpenVINO does not check them.

Reading takes the constants out of a graph by the way that leads to them, builds the graph of what
was found, and compares the two node by node: what is not exactly such a graph is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.experts.base import Expert
from moe_jax.formats.errors import FormatError
from moe_jax.formats.openvino.experts_graph import combined_experts
from moe_jax.formats.openvino.nodes import Node, integers, op, ov
from moe_jax.formats.openvino.operation import from_experts
from moe_jax.formats.openvino.parse import experts_of, layer_of
from moe_jax.formats.openvino.router_graph import routed
from moe_jax.formats.openvino.same import check_same
from moe_jax.layer import MoE
from moe_jax.variables import Variables

OUTPUT = ".output"
CPU_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""Compile for the CPU with these properties: by default it may compute in bfloat16."""


def to_model(layers: Mapping[str, MoE | Expert]) -> Any:
    """An `openvino.Model` of layers by name.

    Raises:
        FormatError: there is no layer, or the graph cannot say one; names the field.
    """
    if not layers:
        raise FormatError("expected at least one layer, got none")
    parameters, results = [], []
    for name, layer in layers.items():
        try:
            inputs, result = _layer_graph(name, layer)
        except FormatError as error:
            raise FormatError(f"layer {name!r}: {error}") from error
        parameters += inputs
        results.append(result)
    return ov.Model(results, parameters, "moe_jax")


def from_model(model: Any) -> dict[str, MoE | Expert]:
    """The layers of an `openvino.Model` that `to_model` made.

    Raises:
        FormatError: something in it is not of that form; names the node.
    """
    layers: dict[str, MoE | Expert] = {}
    for result in model.get_results():
        name = _name(result)
        layers[name] = layer = layer_of(result, experts_of(result))
        try:
            _, expected = _layer_graph(name, layer)
        except RuntimeError as error:
            raise FormatError(
                f"layer {name!r} is of no form that can be written: {error}"
            ) from error
        check_same(result, expected)
    if not layers:
        raise FormatError("the model has no outputs, so no layers")
    return layers


def run_model(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name of a model on OpenVINO's CPU device, computed in float32."""
    compiled = ov.Core().compile_model(model, "CPU", CPU_FLOAT32)
    outputs = compiled(dict(inputs))
    return {port.get_any_name(): np.array(array) for port, array in outputs.items()}


def _layer_graph(name: str, layer: MoE | Expert) -> tuple[list[Node], Node]:
    """The parameters and the result of one layer."""
    operation = from_experts(_experts(layer), order="alpha_is_limit")
    hidden_size = operation.hidden_size
    x = _parameter(f"{name}.hidden_states", np.float32, hidden_size)
    flat = op.reshape(x, integers([-1, hidden_size]), False)
    inputs = [x]
    if isinstance(layer, MoE):
        ids, weights = routed(layer, flat, hidden_size)
    else:
        selected = _parameter(f"{name}.selected_experts", np.int64, -1)
        scores = _parameter(f"{name}.scores", np.float32, -1)
        inputs += [selected, scores]
        ids, weights = (_rows(node) for node in (selected, scores))
    y = op.reshape(combined_experts(operation, flat, ids, weights), op.shape_of(x), False)
    y.output(0).set_names({name + OUTPUT})
    return inputs, op.result(y)


def _experts(layer: MoE | Expert) -> Any:
    if not isinstance(layer, MoE):
        return layer
    return layer.experts.tree() if isinstance(layer.experts, Variables) else layer.experts


def _parameter(name: str, dtype: Any, last: int) -> Node:
    node = op.parameter([-1, -1, last], dtype, name=name)
    node.output(0).set_names({name})
    return node


def _rows(node: Node) -> Node:
    """[batch, seq, topk] -> [T, topk]."""
    last = op.gather(op.shape_of(node), integers([2]), integers(0))
    return op.reshape(node, op.concat([integers([-1]), last], 0), False)


def _name(result: Node) -> str:
    names = result.input_value(0).get_names()
    found = [name for name in names if name.endswith(OUTPUT)]
    if len(found) != 1:
        raise FormatError(
            f"expected an output named NAME{OUTPUT}, found {sorted(names)}: only models that "
            f"moe_jax wrote can be read"
        )
    return found[0].removesuffix(OUTPUT)
