"""Layers as one OpenVINO model, and back.

A model holds any number of layers side by side. A layer called NAME has the input
`NAME.hidden_states` and the output `NAME.output`, both float32 [batch, seq, d]. Experts without a
router have the inputs `NAME.selected_experts`, int64 [batch, seq, topk], and `NAME.scores`, float32
[batch, seq, topk], too. The ids of a token must be within the experts and differ: OpenVINO checks
neither, and where an expert is named more often than there are tokens, its CPU device (2026.4.1)
writes past the end of an array. `run_model` checks them.

Reading takes the constants out of a graph by the way that leads to them, builds the graph of what
was found, and compares the two node by node: what is not exactly such a graph is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.experts.base import Expert
from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import check_layer_names, experts_of, moe_layers
from moe_jax.formats.openvino import parse
from moe_jax.formats.openvino.experts_graph import combined_experts
from moe_jax.formats.openvino.nodes import Node, integers, op, ov
from moe_jax.formats.openvino.operation import from_experts
from moe_jax.formats.openvino.router_graph import routed
from moe_jax.formats.openvino.same import check_same
from moe_jax.layer import MoE

OUTPUT = ".output"
CPU_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""Compile for the CPU with these properties: by default it may compute in bfloat16."""


def to_model(layers: MoE | Expert | Mapping[str, MoE | Expert] | nnx.Module) -> Any:
    """An `openvino.Model` of layers by name.

    A layer is an `MoE`, or experts alone. A single one is named `moe`; of a Flax model the `MoE`
    inside are taken, by their paths.

    Raises:
        FormatError: there is no layer, or the graph cannot say one; names the field.
    """
    named = _by_name(layers)
    parameters, results = [], []
    for name, layer in named.items():
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
        layers[name] = _read_layer(name, result)
    if not layers:
        raise FormatError("the model has no outputs, so no layers")
    return layers


def run_model(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name of a model that `to_model` made, on OpenVINO's CPU device in float32.

    Raises:
        FormatError: `selected_experts` name what is no expert, or one twice for a token.
    """
    for result in model.get_results():
        ids = inputs.get(f"{_name(result)}.selected_experts")
        if ids is not None:
            _check_ids(_name(result), np.asarray(ids), _num_experts(result))
    compiled = ov.Core().compile_model(model, "CPU", CPU_FLOAT32)
    outputs = compiled(dict(inputs))
    return {port.get_any_name(): np.array(array) for port, array in outputs.items()}


def _by_name(layers: Any) -> Mapping[str, MoE | Expert]:
    if isinstance(layers, nnx.Module):
        return moe_layers(layers)
    named = layers if isinstance(layers, Mapping) else {"moe": layers}
    check_layer_names(named)
    return named


def _num_experts(result: Node) -> int:
    return parse.results_of_experts(result).get_output_partial_shape(0)[0].get_length()


def _check_ids(name: str, ids: np.ndarray, num_experts: int) -> None:
    if ((ids < 0) | (ids >= num_experts)).any():
        raise FormatError(
            f"{name}.selected_experts must be 0 to {num_experts - 1}, "
            f"got {ids.min()} to {ids.max()}"
        )
    ordered = np.sort(ids, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise FormatError(
            f"{name}.selected_experts name an expert twice for one token: OpenVINO's CPU device "
            f"goes wrong there. Add the scores up, and give another expert with score 0"
        )


def _read_layer(name: str, result: Node) -> MoE | Expert:
    try:
        layer = parse.layer_of(result, parse.experts_of(result))
        check_same(result, _layer_graph(name, layer)[1])
    except (ValueError, RuntimeError) as error:
        # errors of the library and of OpenVINO, too: parts that do not fit together
        raise FormatError(f"layer {name!r} is not as moe_jax writes it: {error}") from error
    return layer


def _layer_graph(name: str, layer: MoE | Expert) -> tuple[list[Node], Node]:
    """The parameters and the result of one layer."""
    experts = experts_of(layer) if isinstance(layer, MoE) else layer
    operation = from_experts(experts, order="alpha_is_limit")
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
            f"expected an output named NAME{OUTPUT}, found {sorted(names)}: moe_jax did not write "
            f"this model"
        )
    return found[0].removesuffix(OUTPUT)
