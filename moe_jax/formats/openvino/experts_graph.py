"""Experts as the graph of public operations that OpenVINO fuses.

All experts are applied to all tokens, in the form known as a tiled block:

    tokens [T, d] -> Tile -> [E, T, d] -> MatMul with [E, out, in] -> ... -> [E, T, d]
    times a weight for each expert and token (0 where it was not chosen), summed over E

OpenVINO recognises it by its nodes, one by one, and computes the chosen experts only (operation
`GatherMatmul`, one for each matrix). What it must look like was found in OpenVINO 2026: weights are
[E, out, in] with `transpose_b`; tokens come from a Reshape that changes the shape, so that a graph
whose input is [tokens, d] already is not recognised; SiLU of three matrices is x * Sigmoid(x). A
single expert is not recognised either, for its Tile does nothing. Such graphs compute the same.
"""

import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.formats.openvino.attributes import GELU_MODES, UP_OFFSET, MoeAttributes
from moe_jax.formats.openvino.nodes import Node, floats, integers, op, scalar, single
from moe_jax.formats.openvino.operation import MoeOperation

_END = int(np.iinfo(np.int64).max)


def combined_experts(operation: MoeOperation, flat: Node, ids: Node, weights: Node) -> Node:
    """The weighted sum [T, d] of what experts make of tokens.

    Args:
        operation: the experts.
        flat: tokens, float32 [T, d], a Reshape.
        ids: int [T, topk].
        weights: float32 [T, topk].

    Raises:
        FormatError: OpenVINO would not fuse the graph; names the field.
    """
    num_experts, hidden_size = operation.num_experts, operation.hidden_size
    tiled = op.tile(flat, integers([num_experts, 1]))
    tiled = op.reshape(tiled, integers([num_experts, -1, hidden_size]), False)
    apply = _two_matrices if operation.attributes.two_matrices else _three_matrices
    results = apply(tiled, operation.attributes, *operation.parameters)
    results = op.reshape(results, integers([num_experts, -1, hidden_size]), False)
    by_expert = _by_expert(ids, weights, num_experts)
    return op.reduce_sum(op.multiply(results, by_expert), integers([0]), False)


def _two_matrices(
    x: Node,
    attributes: MoeAttributes,
    weight_0: np.ndarray,
    bias_0: np.ndarray,
    weight_1: np.ndarray,
    bias_1: np.ndarray,
) -> Node:
    both = op.add(_linear(x, weight_0), floats(bias_0))

    def lane(start: int) -> Node:
        return op.slice(both, integers([start]), integers([_END]), integers([2]), integers([2]))

    up, gate = lane(1 - attributes.gate_idx), lane(attributes.gate_idx)
    limit = single(attributes.limit)
    up = op.add(op.clamp(up, -limit, limit), scalar(UP_OFFSET))
    gate = op.swish(op.minimum(gate, scalar(limit)), scalar(attributes.slope))
    return op.add(_linear(op.multiply(up, gate), weight_1), floats(bias_1))


def _three_matrices(
    x: Node,
    attributes: MoeAttributes,
    weight_0: np.ndarray,
    weight_1: np.ndarray,
    weight_2: np.ndarray,
) -> Node:
    gate = _activated(_linear(x, weight_0), attributes)
    return _linear(op.multiply(gate, _linear(x, weight_1)), weight_2)


def _activated(gate: Node, attributes: MoeAttributes) -> Node:
    if attributes.activation_type in GELU_MODES:
        return op.gelu(gate, GELU_MODES[attributes.activation_type])
    if attributes.slope != 1.0:
        raise FormatError(
            f"activation.alpha={attributes.slope}: OpenVINO fuses three matrices with the slope 1 "
            f"only; GptOssMLP can be exported with any slope"
        )
    return op.multiply(gate, op.sigmoid(gate))


def _linear(x: Node, weight: np.ndarray) -> Node:
    """x [E, T, in] with [E, in, out] -> [E, T, out]; the graph holds [E, out, in]."""
    return op.matmul(x, floats(weight.swapaxes(1, 2)), False, True)


def _by_expert(ids: Node, weights: Node, num_experts: int) -> Node:
    """Weights [T, topk] as [E, T, 1]; those of an expert that is named twice are added up."""
    count = op.gather(op.shape_of(ids), integers([0]), integers(0))
    zeros = op.broadcast(scalar(0.0), op.concat([count, integers([num_experts])], 0))
    scattered = op.scatter_elements_update(zeros, ids, weights, integers(1), reduction="sum")
    turned = op.transpose(scattered, integers([1, 0]))
    return op.unsqueeze(op.reshape(turned, integers([num_experts, -1]), False), integers(-1))
