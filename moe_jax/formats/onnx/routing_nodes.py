"""Routing in standard operators; see `moe_jax.route` for what it computes."""

import numpy as np
import onnx

from moe_jax.formats.arrays import FLOATS, check_finite, numpy_of
from moe_jax.formats.onnx.norm_nodes import add_norm
from moe_jax.formats.onnx.writer import Writer
from moe_jax.layer import MoE
from moe_jax.routing import Router
from moe_jax.tagged import Tagged
from moe_jax.variables import value

_FLOAT32 = np.dtype(np.float32)


def add_routing(writer: Writer, layer: MoE, rows: str, name: str) -> str:
    """The weight that each expert has for each token, 0 for those not chosen.

    Args:
        writer: the graph.
        layer: the layer.
        rows: the name of the tokens [T, D], of the writer's dtype.
        name: what the names of constants begin with.

    Returns:
        The name of float32 [T, E].

    Raises:
        FormatError: the router or its arrays cannot be said.
    """
    router, experts_per_token = layer.config.router, layer.config.experts_per_token
    num_experts = value(layer.router_weight).size("expert")
    logits = _logits(writer, layer, rows, name)
    before = router.order == "before_top_k"
    scores = _score(writer, router, logits) if before else logits
    selecting = scores
    if layer.selection_bias is not None:
        bias = _bias(writer, "selection_bias", value(layer.selection_bias), name)
        selecting = writer.op("Add", selecting, bias)
    if router.num_groups > 1:
        selecting = _limit_groups(writer, router, selecting, num_experts)
    _, ids = writer.ops("TopK", 2, selecting, writer.integers(experts_per_token), axis=-1)
    chosen = writer.op("GatherElements", scores, ids, axis=-1)
    weights = chosen if before else _score(writer, router, chosen)
    weights = _normalize(writer, router, weights)
    nothing = writer.op("ConstantOfShape", writer.op("Shape", logits))
    return writer.op("ScatterElements", nothing, ids, weights, axis=-1)


def _logits(writer: Writer, layer: MoE, rows: str, name: str) -> str:
    """float32 [T, E]."""
    array = numpy_of("router_weight", value(layer.router_weight), ("expert", "d"), dtypes=FLOATS)
    check_finite("router_weight", array)  # of NaN, TopK may make anything
    weight = writer.constant(f"{name}.router_weight", array)
    rows = writer.cast(rows, writer.dtype, _FLOAT32)
    if layer.router_norm_weight is not None:
        tagged = value(layer.router_norm_weight)
        norm = numpy_of("router_norm_weight", tagged, ("d",), dtypes=FLOATS)
        constant = writer.constant(f"{name}.router_norm_weight", norm)
        constant = writer.cast(constant, norm.dtype, _FLOAT32)
        rows = add_norm(writer, layer.config.router_norm, rows, constant)
    inputs = [rows, writer.cast(weight, array.dtype, _FLOAT32)]
    if layer.router_bias is not None:
        inputs.append(_bias(writer, "router_bias", value(layer.router_bias), name))
    return writer.op("Gemm", *inputs, transB=1)


def _bias(writer: Writer, field: str, tagged: Tagged, name: str) -> str:
    """A constant {expert} as float32."""
    array = numpy_of(field, tagged, ("expert",), dtypes=FLOATS)
    check_finite(field, array)
    return writer.cast(writer.constant(f"{name}.{field}", array), array.dtype, _FLOAT32)


def _score(writer: Writer, router: Router, logits: str) -> str:
    if router.score == "linear":
        return logits
    if router.score == "sigmoid":
        # onnxruntime's own Sigmoid is good to 1e-7 of 1, which is all there is of that of -16
        power = writer.op("Exp", writer.op("Neg", logits))
        return writer.op("Reciprocal", writer.op("Add", power, _float(writer, 1.0)))
    return writer.op("Softmax", logits, axis=-1)


def _limit_groups(writer: Writer, router: Router, scores: str, num_experts: int) -> str:
    """Scores [T, E] with -inf outside the best groups of each token."""
    groups, members = router.num_groups, num_experts // router.num_groups
    count = 1 if router.group_score == "max" else min(2, members)
    grouped = writer.op("Reshape", scores, writer.integers(-1, groups, members))
    best, _ = writer.ops("TopK", 2, grouped, writer.integers(count), axis=-1)
    worth = writer.op("ReduceSum", best, writer.integers(-1), keepdims=0)
    # without tokens onnxruntime's ReduceSum keeps the axis
    worth = writer.op("Reshape", worth, writer.integers(-1, groups))
    _, chosen = writer.ops("TopK", 2, worth, writer.integers(router.groups_per_token), axis=-1)
    one = onnx.numpy_helper.from_array(np.ones(1, np.float32))
    barred = writer.op("ConstantOfShape", writer.op("Shape", worth), value=one)
    zeros = writer.op("ConstantOfShape", writer.op("Shape", chosen))
    barred = writer.op("ScatterElements", barred, chosen, zeros, axis=-1)
    barred = writer.op(
        "Unsqueeze", writer.op("Cast", barred, to=onnx.TensorProto.BOOL), writer.integers(-1)
    )
    limited = writer.op("Where", barred, _float(writer, -np.inf), grouped)
    return writer.op("Reshape", limited, writer.integers(-1, num_experts))


def _normalize(writer: Writer, router: Router, weights: str) -> str:
    """The chosen scores [T, K] as weights."""
    zero = _float(writer, 0.0)
    if router.score == "linear":
        negative = writer.op("Less", weights, zero)
        weights = writer.op("Where", negative, _float(writer, np.nan), weights)
    if router.renormalize:
        total = writer.op("ReduceSum", weights, writer.integers(-1), keepdims=1)
        empty = writer.op("Equal", total, zero)
        divisor = writer.op("Where", empty, _float(writer, 1.0), total)
        weights = writer.op("Where", empty, zero, writer.op("Div", weights, divisor))
    if router.scale != 1.0:
        weights = writer.op("Mul", weights, _float(writer, router.scale))
    return weights


def _float(writer: Writer, number: float) -> str:
    """A float32 scalar, whatever the dtype of the tokens."""
    return writer.constant(f"{float(number)!r}:float32", np.float32(number))
