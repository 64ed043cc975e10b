"""Routers as graphs of OpenVINO's public operations.

    logits = tokens x router_weight^T (+ router_bias)
    before_top_k:  scores = softmax or sigmoid of logits; TopK of scores (+ selection_bias)
    after_top_k:   TopK of logits (+ selection_bias); softmax or sigmoid of the chosen logits
    then, where asked for, division by the sum, and the scale

Of equal scores the expert with the lowest index wins, as in the library. A graph cannot be told
that an expert is barred, so all parameters must be finite.
"""

import numpy as np

from moe_jax.formats.arrays import FLOATS, check_finite, numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import check_sayable
from moe_jax.formats.openvino.nodes import Node, floats, integers, op, scalar, single
from moe_jax.layer import MoE
from moe_jax.routing import Router
from moe_jax.variables import value

SCORES = ("softmax", "sigmoid")
"""Scores that a graph can say."""

_CAN_SUM_TO_ZERO = ("sigmoid",)


def routed(layer: MoE, flat: Node, hidden_size: int) -> tuple[Node, Node]:
    """Ids (int64) and weights (float32) [T, topk] of tokens [T, d].

    Raises:
        FormatError: the graph cannot say it; names the field.
    """
    router, topk = layer.config.router, layer.config.experts_per_token
    _check(layer)
    weight = _finite("router_weight", layer, "expert", "d")
    if weight.shape[1] != hidden_size:
        raise FormatError(
            f"router_weight takes tokens of size {weight.shape[1]}, the experts of {hidden_size}"
        )
    logits = op.matmul(flat, floats(weight), False, True)
    if layer.router_bias is not None:
        logits = op.add(logits, floats(_finite("router_bias", layer, "expert")))
    before = router.order == "before_top_k"
    source = _scored(logits, router) if before else logits
    selecting = source
    if layer.selection_bias is not None:
        selecting = op.add(source, floats(_finite("selection_bias", layer, "expert")))
    best = op.topk(selecting, integers(topk), -1, "max", "value", "i64", stable=True)
    ids, chosen = best.output(1), best.output(0)
    if layer.selection_bias is not None:
        chosen = op.gather_elements(source, ids, -1)
    weights = chosen if before else _scored(chosen, router)
    if router.renormalize:
        weights = op.divide(weights, _total(weights, router))
    if single(router.scale) != 1.0:
        weights = op.multiply(weights, scalar(router.scale))
    return ids, weights


def _check(layer: MoE) -> None:
    check_sayable(layer, "router", "router_bias", "selection_bias")
    router = layer.config.router
    if router.score not in SCORES:
        raise FormatError(f"router.score={router.score!r}: the graph knows {SCORES}")
    if router.num_groups != 1:
        raise FormatError(
            f"router.num_groups={router.num_groups}: the graph has no groups of experts, use 1"
        )


def _finite(name: str, layer: MoE, *axes: str) -> np.ndarray:
    array = numpy_of(name, value(getattr(layer, name)), axes, dtypes=FLOATS)
    check_finite(name, array)
    return array


def _scored(logits: Node, router: Router) -> Node:
    return op.softmax(logits, -1) if router.score == "softmax" else op.sigmoid(logits)


def _total(weights: Node, router: Router) -> Node:
    """The sum over the chosen; 1 in place of 0, so that weights that are all 0 stay so."""
    total = op.reduce_sum(weights, integers([-1]), True)
    if router.score not in _CAN_SUM_TO_ZERO:
        return total
    return op.select(op.equal(total, scalar(0.0)), scalar(1.0), total)
