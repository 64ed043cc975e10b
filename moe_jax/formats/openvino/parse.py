"""Layers from the nodes of an OpenVINO graph.

Nothing is checked here but that the way leads somewhere: whoever reads a graph compares it with
the graph of what was read.
"""

from typing import Literal

import numpy as np

from moe_jax.activations import Activation, Kind
from moe_jax.experts import GatedMLP, GptOssMLP
from moe_jax.formats.errors import FormatError
from moe_jax.formats.openvino.attributes import GELU_MODES, KINDS, LANES, UP_OFFSET
from moe_jax.formats.openvino.nodes import Node, array_of, single
from moe_jax.layer import MoE
from moe_jax.routing import Router
from moe_jax.tagged import Tagged, tag

_GELU_KINDS: dict[str, Kind] = {mode: KINDS[name] for name, mode in GELU_MODES.items()}
_SCORES: dict[str, Literal["softmax", "sigmoid"]] = {"Softmax": "softmax", "Sigmoid": "sigmoid"}


def follow(node: Node, *inputs: int) -> Node:
    """The node reached by going from each node to this input of it.

    Raises:
        FormatError: there is no such input.
    """
    for index in inputs:
        if index >= node.get_input_size():
            raise FormatError(
                f"{node.get_type_name()} {node.get_friendly_name()!r} has no input {index}"
            )
        node = node.input_value(index).get_node()
    return node


def results_of_experts(result: Node) -> Node:
    """The node that makes [E, T, d], what all experts make of all tokens."""
    # Result <- Reshape <- ReduceSum <- Multiply <- Reshape
    return follow(result, 0, 0, 0, 0, 0)


def experts_of(result: Node) -> GptOssMLP | GatedMLP:
    """The experts that a layer's result is computed by."""
    last = results_of_experts(result)
    kind = last.get_type_name()
    if kind not in _EXPERTS:
        raise _unknown(last, tuple(_EXPERTS))
    return _EXPERTS[kind](last)


def layer_of(result: Node, experts: GptOssMLP | GatedMLP) -> MoE | GptOssMLP | GatedMLP:
    """The experts with their router, or without where the graph is given ids and scores."""
    # ... Multiply <- Unsqueeze <- Reshape <- Transpose <- ScatterElementsUpdate
    scatter = follow(result, 0, 0, 0, 1, 0, 0, 0)
    top, weights = follow(scatter, 1), follow(scatter, 2)
    if top.get_type_name() == "Reshape":
        return experts
    scale = 1.0
    if weights.get_type_name() == "Multiply":
        scale, weights = _number(follow(weights, 1)), follow(weights, 0)
    renormalize = weights.get_type_name() == "Divide"
    if renormalize:
        weights = follow(weights, 0)
    before = weights.get_type_name() not in _SCORES
    chosen = weights if before else follow(weights, 0)
    # without a bias for the selection, TopK gives the chosen values itself
    unbiased = chosen.get_type_name() == "TopK"
    source = follow(chosen, 0)
    scored = source if before else weights
    if scored.get_type_name() not in _SCORES:
        raise _unknown(scored, tuple(_SCORES))
    router = Router(
        score=_SCORES[scored.get_type_name()],
        order="before_top_k" if before else "after_top_k",
        renormalize=renormalize,
        scale=scale,
    )
    logits = follow(source, 0) if before else source
    with_bias = logits.get_type_name() == "Add"
    product = follow(logits, 0) if with_bias else logits
    return MoE(
        experts,
        _tagged(follow(product, 1), "expert", "d"),
        _tagged(follow(logits, 1), "expert") if with_bias else None,
        experts_per_token=int(_number(follow(top, 1))),
        router=router,
        selection_bias=None if unbiased else _tagged(follow(top, 0, 1), "expert"),
    )


def _two_matrices(last: Node) -> GptOssMLP:
    down, product = follow(last, 0), follow(last, 0, 0)
    swish = follow(product, 1)
    minimum = follow(swish, 0)
    gate = follow(minimum, 0)
    both = follow(gate, 0)
    lane = _number(follow(gate, 1))
    activation = Activation(
        "swiglu",
        alpha=_number(follow(swish, 1)),
        beta=UP_OFFSET,
        limit=_number(follow(minimum, 1)),
        layout=LANES[lane != 0],
    )
    return GptOssMLP(
        gate_up=_tagged(follow(both, 0, 1), "expert", "out", "in"),
        gate_up_bias=_bias(follow(both, 1)),
        down=_tagged(follow(down, 1), "expert", "out", "in"),
        down_bias=_bias(follow(last, 1)),
        activation=activation,
    )


def _three_matrices(last: Node) -> GatedMLP:
    product = follow(last, 0)
    activated = follow(product, 0)
    kind: Kind = "swiglu"
    if activated.get_type_name() == "Gelu":
        kind = _GELU_KINDS[activated.get_attributes()["approximation_mode"].upper()]
    weights = follow(activated, 0, 1), follow(product, 1, 1), follow(last, 1)
    gate, up, down = (_tagged(node, "expert", "out", "in") for node in weights)
    return GatedMLP(gate, up, down, activation=Activation(kind))


_EXPERTS = {"Add": _two_matrices, "MatMul": _three_matrices}


def _tagged(node: Node, *axes: str) -> Tagged:
    return tag(_shaped(node, len(axes)), *axes)


def _bias(node: Node) -> Tagged:
    """[E, 1, out] as {expert, out}."""
    return tag(_shaped(node, 3)[:, 0], "expert", "out")


def _shaped(node: Node, ndim: int) -> np.ndarray:
    array = array_of(node)
    if array.ndim != ndim or 0 in array.shape:
        raise FormatError(
            f"Constant {node.get_friendly_name()!r}: expected {ndim} axes, none empty, found "
            f"the shape {list(array.shape)}"
        )
    return array


def _number(node: Node) -> float:
    array = array_of(node)
    if array.size != 1:
        raise FormatError(
            f"expected one number at {node.get_friendly_name()!r}, found {list(array.shape)}"
        )
    value = np.ravel(array)[0]
    return single(float(value)) if array.dtype == np.float32 else float(value)


def _unknown(node: Node, expected: tuple[str, ...]) -> FormatError:
    kind, name = node.get_type_name(), node.get_friendly_name()
    return FormatError(f"{kind} {name!r}: expected one of {expected}")
