"""The router in front of the operators, in standard operators.

The operators take logits and do the softmax and the top-k themselves:

    x -> Reshape [tokens, d] -> Cast float32 -> Gemm -> Cast -> router_probs

Two things go beyond that, and need `router_weights`, which QMoE alone has: scores that are not a
softmax, and a bias that selects and does not weigh. Then one tensor selects and another weighs:

    logits -> score -> Add selection_bias -> router_probs
    logits -> score -> router_weights

onnxruntime gives equal scores to the expert with the highest index, and `moe_jax.route` to the one
with the lowest. MoE selects by the softmax in float32, in which logits may be equal that are not.
"""

import dataclasses
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from moe_jax.formats.arrays import check_finite, numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx.graph import data_type, initialiser, node
from moe_jax.routing import Router
from moe_jax.tagged import Tagged

_FLOAT32 = np.dtype(np.float32)
_SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class RouterGraph:
    """A router as nodes.

    Attributes:
        nodes: in order.
        constants: what they name.
        logits: the value for `router_probs`.
        weights: the value for `router_weights`, empty for none.
        normalize: `normalize_routing_weights`.
    """

    nodes: list[NodeProto]
    constants: list[TensorProto]
    logits: str
    weights: str
    normalize: int


def export_router(
    prefix: str,
    x: str,
    weight: Tagged,
    bias: Tagged | None,
    selection_bias: Tagged | None,
    router: Router,
    *,
    float_type: Any,
    quantized: bool,
    always_apart: bool,
) -> RouterGraph:
    """The nodes that make `router_probs` and `router_weights` of `x`.

    Args:
        prefix: of the names of all values.
        x: the layer's input, of `float_type`.
        weight: {expert, d}.
        bias: {expert} or None.
        selection_bias: {expert} or None.
        router: how logits become weights.
        float_type: what the operator computes with.
        quantized: whether the operator is QMoE.
        always_apart: whether a softmax that is not renormalised needs `router_weights`.

    Raises:
        FormatError: a router that the operators cannot say.
    """
    renormalizes = router.renormalize or (router.score, router.order) == ("softmax", "after_top_k")
    apart = _needs_weights(router, selection_bias) or (always_apart and not renormalizes)
    _check(router, bias, selection_bias, apart, quantized)
    graph = RouterGraph([], [], f"{prefix}router_probs", "", int(renormalizes))
    cast = float_type != _FLOAT32
    if not apart:
        output = f"{prefix}router_logits" if cast else graph.logits
        logits = _logits(graph, prefix, x, weight, bias, is_cast=cast, output=output)
        if cast:
            _add(graph, "Cast", [logits], graph.logits, to=data_type(float_type))
        return graph
    output = f"{prefix}router_logits"
    logits = _logits(graph, prefix, x, weight, bias, is_cast=cast, output=output)
    scores = _scores(graph, prefix, logits, router.score)
    # the order of logits is that of their scores, and has fewer ties
    by_score = router.order == "before_top_k" and selection_bias is not None
    select = scores if by_score else logits
    if selection_bias is not None:
        array = numpy_of("selection_bias", selection_bias, ("expert",))
        name = _constant(graph, f"{prefix}selection_bias", array)
        name = _as_float32(graph, name, array.dtype)
        select = _add(graph, "Add", [select, name], f"{prefix}router_selection")
    if cast:
        select = _add(graph, "Cast", [select], f"{prefix}router_probs", to=data_type(float_type))
        name = f"{prefix}router_weights"
        scores = _add(graph, "Cast", [scores], name, to=data_type(float_type))
    return dataclasses.replace(graph, logits=select, weights=scores)


def _scores(graph: RouterGraph, prefix: str, logits: str, score: str) -> str:
    """The scores of all experts.

    A sigmoid is spelt out: onnxruntime's own is good to 1e-7 of 1, which is all there is of the
    sigmoid of -16, and scores are divided by their sum.
    """
    name = f"{prefix}router_scores"
    if score == "softmax":
        return _add(graph, "Softmax", [logits], name)
    one = _constant(graph, f"{prefix}router_one", np.ones(1, np.float32))
    power = _add(graph, "Neg", [logits], f"{name}_negative")
    power = _add(graph, "Exp", [power], f"{name}_exp")
    return _add(graph, "Reciprocal", [_add(graph, "Add", [power, one], f"{name}_inverse")], name)


def _needs_weights(router: Router, selection_bias: Tagged | None) -> bool:
    return router.score != "softmax" or selection_bias is not None


def _check(
    router: Router, bias: Tagged | None, selection_bias: Tagged | None, apart: bool, quantized: bool
) -> None:
    if router.score not in _SCORES:
        raise FormatError(f"the operators have no router score {router.score!r}")
    if router.num_groups > 1:
        raise FormatError(
            f"the operators have no groups of experts: num_groups must be 1, got "
            f"{router.num_groups}"
        )
    if apart and not quantized:
        raise FormatError(
            f"router_weights is an input of QMoE alone: MoE cannot say score={router.score!r} "
            f"{'with' if selection_bias is not None else 'without'} selection_bias"
        )
    if not apart:
        return
    for name, value in (("router_bias", bias), ("selection_bias", selection_bias)):
        if value is not None:  # router_weights cannot bar an expert, as -inf does here
            check_finite(name, np.asarray(value.array))


def _logits(
    graph: RouterGraph,
    prefix: str,
    x: str,
    weight: Tagged,
    bias: Tagged | None,
    *,
    is_cast: bool,
    output: str,
) -> str:
    """The logits [tokens, expert] in float32."""
    array = numpy_of("router_weight", weight, ("expert", "d"))
    check_finite("router_weight", array)  # the operators make zeros of NaN
    shape = _constant(graph, f"{prefix}router_shape", np.array([-1, array.shape[1]], np.int64))
    rows = _add(graph, "Reshape", [x, shape], f"{prefix}router_rows")
    if is_cast:
        rows = _add(graph, "Cast", [rows], f"{prefix}router_input", to=data_type(_FLOAT32))
    stored = _constant(graph, f"{prefix}router_weight", array)
    inputs = [rows, _as_float32(graph, stored, array.dtype)]
    if bias is not None:
        array = numpy_of("router_bias", bias, ("expert",))
        stored = _constant(graph, f"{prefix}router_bias", array)
        inputs.append(_as_float32(graph, stored, array.dtype))
    return _add(graph, "Gemm", inputs, output, transB=1)


def _as_float32(graph: RouterGraph, name: str, dtype: Any) -> str:
    if np.dtype(dtype) == _FLOAT32:
        return name
    return _add(graph, "Cast", [name], f"{name}_float32", to=data_type(_FLOAT32))


def _constant(graph: RouterGraph, name: str, array: np.ndarray) -> str:
    graph.constants.append(initialiser(name, array))
    return name


def _add(
    graph: RouterGraph, operator: str, inputs: list[str], output: str, **attributes: Any
) -> str:
    graph.nodes.append(node(operator, inputs, [output], name=output, **attributes))
    return output
