"""The router that stands in front of a node, from its standard operators.

What is read: a Gemm, or MatMul and Add, of constants; behind it, for `router_weights`, a Softmax or
a sigmoid, and an Add of what only selects. Casts and changes of shape between them are passed over.
"""

import dataclasses
from typing import Any

import numpy as np
from onnx import NodeProto

from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx.graph import Found, describe
from moe_jax.routing import Router

_PASSING = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclasses.dataclass(frozen=True)
class RouterLinear:
    """The linear layer that makes logits.

    Attributes:
        weight: [expert, d], as stored.
        bias: [expert], or None.
        source: the value it is applied to.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    source: str


def read_linear(found: Found, name: str) -> RouterLinear:
    """The linear layer that `name` comes from.

    Raises:
        FormatError: it comes from something else, or from weights that are not constants.
    """
    made = found.producers.get(_pass(found, name))
    added = None
    if made is not None and made.op_type == "Add":
        constants = [found.constant_named(n) for n in made.input]
        place = 0 if constants[1] is None else 1
        added = constants[place]
        made = found.producers.get(_pass(found, made.input[1 - place]))
    if made is None or made.domain or made.op_type not in ("MatMul", "Gemm"):
        raise FormatError(_no_linear(found, "an input" if made is None else describe(made)))
    weight, bias = _matmul(found, made)
    if added is not None and bias is not None:
        raise FormatError(f"{describe(made)}: two biases cannot be read")
    bias = added if bias is None else bias
    if bias is not None:
        bias = bias.reshape(-1)
        if bias.shape != weight.shape[:1]:
            raise FormatError(f"{describe(made)}: the bias must have {weight.shape[0]} entries")
    return RouterLinear(weight, bias, _pass(found, made.input[0]))


def _matmul(found: Found, made: NodeProto) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight [expert, d] and bias of a MatMul or Gemm."""
    options = {a.name: a for a in made.attribute}
    if any(options[n].f != 1.0 for n in ("alpha", "beta") if n in options):
        raise FormatError(f"{describe(made)}: only alpha = beta = 1 can be read")
    if "transA" in options and options["transA"].i:
        raise FormatError(f"{describe(made)}: transA cannot be read")
    weight = found.constant_named(made.input[1])
    if weight is None or weight.ndim != 2:
        raise FormatError(_no_linear(found, describe(made)))
    is_transposed = "transB" in options and options["transB"].i
    name = made.input[2] if len(made.input) > 2 else ""
    bias = found.constant_named(name) if name else None
    if name and bias is None:
        raise FormatError(_no_linear(found, describe(made)))
    return weight if is_transposed else weight.T, bias


def read_router(
    found: Found, logits: str, weights: str, normalize: bool
) -> tuple[Router, np.ndarray | None, str]:
    """The router, its selection bias [expert] or None, and the value that holds the logits.

    Args:
        found: the operator.
        logits: the value of `router_probs`.
        weights: the value of `router_weights`, or empty.
        normalize: whether weights are divided by their sum.

    Raises:
        FormatError: `router_weights` that are not scores of the same logits.
    """
    if not weights:
        if normalize:
            return Router(), None, logits
        return Router(order="before_top_k"), None, logits
    score, source, scores = _read_scores(found, _pass(found, weights))
    selection, bias = _without_bias(found, _pass(found, logits), (source, scores))
    if selection not in (source, scores):
        raise FormatError(
            f"{describe(found.node)}: router_probs must be the logits of router_weights, or their "
            f"scores, with or without a constant bias"
        )
    return _named(found, score, selection == scores, bias, normalize), bias, source


def canonical(router: Router, biased: bool) -> Router:
    """One router for all that do the same; `biased` where there is a selection bias."""
    scale = router.scale
    if router.score == "softmax" and router.order == "after_top_k":
        return Router(scale=scale)
    if router.score == "softmax" and router.renormalize and not biased:
        return Router(scale=scale)
    if router.score == "sigmoid" and not biased:
        return dataclasses.replace(router, order="before_top_k")
    return router


def _read_scores(found: Found, weights: str) -> tuple[str, str, str]:
    """Score, the value of the logits and that of the scores, of which `weights` are made."""
    made = found.producers.get(weights)
    if made is not None and made.op_type == "Softmax" and _is_over_experts(made):
        return "softmax", _pass(found, made.input[0]), weights
    if made is not None and made.op_type == "Sigmoid":
        return "sigmoid", _pass(found, made.input[0]), weights
    inverse = found.producers.get(made.input[0]) if made is not None else None
    if made is not None and made.op_type == "Reciprocal" and inverse is not None:
        chain = [inverse, *_chain(found, inverse, ("Exp", "Neg"))]
        one = [found.constant_named(n) for n in inverse.input]
        if (
            inverse.op_type == "Add"
            and len(chain) == 3
            and any(v is not None and (v == 1).all() for v in one)
        ):
            return "sigmoid", _pass(found, chain[-1].input[0]), weights
    raise FormatError(
        f"{describe(found.node)}: router_weights must be a sigmoid or Softmax of logits"
    )


def _chain(found: Found, start: NodeProto, operators: tuple[str, ...]) -> list[NodeProto]:
    """The nodes of these operators that lead to `start`, the last first, as far as they go."""
    nodes = []
    for operator in operators:
        makers = [found.producers.get(name) for name in start.input]
        start = next((m for m in makers if m is not None and m.op_type == operator), start)
        if start.op_type != operator:
            break
        nodes.append(start)
    return nodes


def _is_over_experts(scorer: NodeProto) -> bool:
    """Whether a Softmax is over the last axis; of [tokens, expert] that is axis 1."""
    return all(a.i in (-1, 1) for a in scorer.attribute if a.name == "axis")


def _without_bias(
    found: Found, selection: str, known: tuple[str, str]
) -> tuple[str, np.ndarray | None]:
    """The value that selects without its bias [expert], and the bias."""
    made = found.producers.get(selection)
    if selection in known or made is None or made.op_type != "Add":
        return selection, None
    for value, other in (tuple(made.input), tuple(reversed(made.input))):
        bias = found.constant_named(other)
        if _pass(found, value) in known and bias is not None:
            return _pass(found, value), bias.reshape(-1)
    return selection, None


def _named(
    found: Found, score: Any, before: bool, bias: np.ndarray | None, normalize: bool
) -> Router:
    if score == "softmax" and not before and bias is not None and not normalize:
        raise FormatError(
            f"{describe(found.node)}: selection by logits with a bias, and weights of a softmax "
            f"over all experts without normalize_routing_weights, is no router of this library"
        )
    order = "before_top_k" if before or bias is None else "after_top_k"
    return canonical(Router(score, order, renormalize=normalize), bias is not None)


def _pass(found: Found, name: str) -> str:
    """The value that `name` is but for its shape and type."""
    while name in found.producers and found.producers[name].op_type in _PASSING:
        name = found.producers[name].input[0]
    return name


def same_source(found: Found, name: str, other: str) -> bool:
    """Whether two values are the same but for their shape and type."""
    return _pass(found, name) == _pass(found, other)


def _no_linear(found: Found, what: str) -> str:
    return (
        f"{describe(found.node)}: router_probs come from {what}, which is not a linear layer of "
        f"constants: read_experts reads the experts alone"
    )
