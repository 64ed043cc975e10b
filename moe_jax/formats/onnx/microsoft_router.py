"""The router in front of the operators, in standard operators, and back.

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

from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx.graph import Found, data_type, describe, initialiser, node
from moe_jax.formats.onnx.microsoft_matrices import numpy_of
from moe_jax.routing import Router
from moe_jax.tagged import Tagged

_FLOAT32 = np.dtype(np.float32)
_SCORES = ("softmax", "sigmoid")
_PASSING = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


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
        name = _constant(graph, f"{prefix}selection_bias", numpy_of(selection_bias, "expert"))
        name = _as_float32(graph, name, selection_bias.dtype)
        select = _add(graph, "Add", [select, name], f"{prefix}router_selection")
    if cast:
        select = _add(graph, "Cast", [select], f"{prefix}router_probs", to=data_type(float_type))
        name = f"{prefix}router_weights"
        scores = _add(graph, "Cast", [scores], name, to=data_type(float_type))
    return dataclasses.replace(graph, logits=select, weights=scores)


def read_linear(found: Found, name: str) -> RouterLinear:
    """The linear layer that `name` comes from.

    Raises:
        FormatError: it comes from something else, or from weights that are not constants.
    """
    bias = None
    made = found.producers.get(_pass(found, name))
    if made is not None and made.op_type == "Add":
        constants = [found.constant_named(n) for n in made.input]
        if (constants[0] is None) == (constants[1] is None):
            raise FormatError(_no_linear(found, describe(made)))
        bias, rest = (constants[0], 1) if constants[1] is None else (constants[1], 0)
        made = found.producers.get(_pass(found, made.input[rest]))
    if made is None or made.domain or made.op_type not in ("MatMul", "Gemm"):
        raise FormatError(_no_linear(found, "an input" if made is None else describe(made)))
    weight = found.constant_named(made.input[1])
    if weight is None or weight.ndim != 2:
        raise FormatError(_no_linear(found, describe(made)))
    options = {a.name: a for a in made.attribute}
    if any(options[n].f != 1.0 for n in ("alpha", "beta") if n in options):
        raise FormatError(f"{describe(made)}: only alpha = beta = 1 can be read")
    if "transA" in options and options["transA"].i:
        raise FormatError(f"{describe(made)}: transA cannot be read")
    if not ("transB" in options and options["transB"].i):
        weight = weight.T
    if made.op_type == "Gemm" and len(made.input) > 2 and made.input[2]:
        if bias is not None:
            raise FormatError(f"{describe(made)}: two biases cannot be read")
        bias = found.constant_named(made.input[2])
        if bias is None:
            raise FormatError(_no_linear(found, describe(made)))
    if bias is not None:
        bias = bias.reshape(-1)
        if bias.shape != weight.shape[:1]:
            raise FormatError(f"{describe(made)}: the bias must have {weight.shape[0]} entries")
    return RouterLinear(weight, bias, _pass(found, made.input[0]))


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


def _scores(graph: RouterGraph, prefix: str, logits: str, score: str) -> str:
    """The scores of all experts. onnxruntime's Sigmoid is off by 1e-7, all there is at -16."""
    name = f"{prefix}router_scores"
    if score == "softmax":
        return _add(graph, "Softmax", [logits], name)
    one = _constant(graph, f"{prefix}router_one", np.ones(1, np.float32))
    power = _add(graph, "Neg", [logits], f"{name}_negative")
    power = _add(graph, "Exp", [power], f"{name}_exp")
    return _add(graph, "Reciprocal", [_add(graph, "Add", [power, one], f"{name}_inverse")], name)


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
        if value is not None and not np.isfinite(np.asarray(value.array, np.float32)).all():
            raise FormatError(
                f"{name} must be finite: router_weights cannot bar an expert, as -inf does here"
            )


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
    array = numpy_of(weight, "expert", "d")
    shape = _constant(graph, f"{prefix}router_shape", np.array([-1, array.shape[1]], np.int64))
    rows = _add(graph, "Reshape", [x, shape], f"{prefix}router_rows")
    if is_cast:
        rows = _add(graph, "Cast", [rows], f"{prefix}router_input", to=data_type(_FLOAT32))
    inputs = [rows]
    for name, value in (("router_weight", weight), ("router_bias", bias)):
        if value is not None:
            axes = ("expert", "d") if value is weight else ("expert",)
            stored = _constant(graph, f"{prefix}{name}", numpy_of(value, *axes))
            inputs.append(_as_float32(graph, stored, value.dtype))
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
