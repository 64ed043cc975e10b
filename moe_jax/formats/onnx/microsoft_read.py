"""`com.microsoft.MoE` and `QMoE` nodes of an ONNX file as layers."""

import dataclasses
import json
import os
from typing import Any

import numpy as np
from onnx import ModelProto

from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx.graph import Found, describe, find, load
from moe_jax.formats.onnx.microsoft_experts import (
    ExpertMatrices,
    Hint,
    Linear,
    activation_of,
    default_hint,
    from_matrices,
)
from moe_jax.formats.onnx.microsoft_matrices import Matrix
from moe_jax.formats.onnx.microsoft_router_read import (
    canonical,
    read_linear,
    read_router,
    same_source,
)
from moe_jax.formats.onnx.microsoft_schema import (
    ATTRIBUTES,
    CPU,
    DOMAIN,
    HINT,
    INPUTS,
    MOE,
    QMOE,
    UNREAD_INPUTS,
    Target,
)
from moe_jax.layer import MoE
from moe_jax.quantization.codes import unpack_codes
from moe_jax.routing import Router
from moe_jax.tagged import Tagged, tag


@dataclasses.dataclass(frozen=True)
class Node:
    """A node without what computes its logits.

    Attributes:
        experts: as the operator's weights say.
        experts_per_token: k.
        router: how logits become weights; without `selection_bias`.
        selection_bias: {expert} or None.
        logits: name of the value that holds the logits.
    """

    experts: Any
    experts_per_token: int
    router: Router
    selection_bias: Tagged | None
    logits: str


def read(source: str | os.PathLike[str] | ModelProto, *, target: Target = CPU) -> dict[str, MoE]:
    """The MoE and QMoE nodes of a file, each with the linear layer that makes its logits.

    Weights must be constants, in the file or its external data. Integers become `PackedIntegers`,
    or `BlockScaled` where `write` made them of MXFP4.

    Weights [expert, in, out], which old exporters wrote, are refused where shapes tell them from
    [expert, out, in]; with equal hidden and intermediate size nothing does.

    Args:
        source: path of a file, or a model.
        target: the runtime whose reading holds where the runtimes differ: QMoE without
            `router_weights` and with `normalize_routing_weights` 0.

    Returns:
        Layers by the name of their node, or of its output where it has none, in the file's order.

    Raises:
        FormatError: not an ONNX file, there is no such node, or one is malformed or beyond what the
            library can say.
        OSError: the file cannot be read.
    """
    layers = {name: _layer(found, target) for name, found in _nodes(load(source)).items()}
    if not layers:
        raise FormatError(f"there is no {DOMAIN} node of {MOE} or {QMOE}")
    return layers


def read_experts(
    source: str | os.PathLike[str] | ModelProto, *, target: Target = CPU
) -> dict[str, Node]:
    """The same without the routers' linear layers, for files that make logits in other ways.

    Where hidden and intermediate size are unknown, weights [expert, in, out] of a plain activation
    cannot be told from [expert, out, in], and are taken for the latter.

    Returns:
        Nodes by name as `read` has them; none where the file has none.

    Raises:
        FormatError: not an ONNX file, or a node is malformed or beyond what the library can say.
        OSError: the file cannot be read.
    """
    return {name: _node(found, target, None) for name, found in _nodes(load(source)).items()}


def _nodes(model: ModelProto) -> dict[str, Found]:
    named: dict[str, Found] = {}
    for found in find(model, DOMAIN, MOE, QMOE):
        name = found.node.name or found.node.output[0]
        if name in named:
            raise FormatError(f"two nodes have the name {name!r}")
        named[name] = found
    return named


def _layer(found: Found, target: Target) -> MoE:
    router, bias, logits = _router(found, target)
    linear = read_linear(found, logits)
    if not same_source(found, linear.source, found.input(0)):
        raise FormatError(
            f"{describe(found.node)}: logits are made of {linear.source!r} and the experts of "
            f"{found.input(0)!r}: read_experts reads the experts alone"
        )
    read_node = _node(found, target, linear.weight.shape)
    return MoE(
        read_node.experts,
        tag(linear.weight, "expert", "d"),
        None if linear.bias is None else tag(linear.bias, "expert"),
        experts_per_token=read_node.experts_per_token,
        router=router,
        selection_bias=None if bias is None else tag(bias, "expert"),
    )


def _node(found: Found, target: Target, linear_shape: tuple[int, ...] | None) -> Node:
    attributes = _attributes(found)
    matrices = _matrices(found, attributes, linear_shape)
    k, num_experts = attributes["k"], matrices.fc1.weight.shape[0]
    if not 1 <= k <= num_experts:
        raise FormatError(f"{describe(found.node)}: k must be 1 to {num_experts}, got {k}")
    router, bias, logits = _router(found, target)
    selection_bias = None if bias is None else tag(bias, "expert")
    return Node(from_matrices(matrices), k, router, selection_bias, logits)


def _attributes(found: Found) -> dict[str, Any]:
    """The node's attributes. Raises FormatError for what cannot be read."""
    operator = found.node.op_type
    if operator not in (MOE, QMOE) or len(found.node.input) > len(INPUTS[operator]):
        raise FormatError(f"{describe(found.node)} has too many inputs")
    attributes = found.attributes(ATTRIBUTES[operator])
    readable = {
        "use_sparse_mixer": (0,),
        "normalize_routing_weights": (0, 1),
        "swiglu_fusion": (0, 1, 2),
        "quant_type": ("int",),
        "weights_prepacked": (-1, 0),
    }
    for name, choices in readable.items():
        if name in attributes and attributes[name] not in choices:
            raise FormatError(
                f"{describe(found.node)}: {name} must be one of {choices} to be read, got "
                f"{attributes[name]!r}"
            )
    for name in UNREAD_INPUTS:
        if operator == QMOE and _input(found, name):
            raise FormatError(f"{describe(found.node)}: {name} cannot be read")
    return attributes


def _router(found: Found, target: Target) -> tuple[Router, np.ndarray | None, str]:
    """The router, its selection bias, and the value of the logits."""
    normalize = bool(found.attributes(ATTRIBUTES[found.node.op_type])["normalize_routing_weights"])
    weights = _input(found, "router_weights") if found.node.op_type == QMOE else ""
    if found.node.op_type == QMOE and not weights:
        normalize = normalize or target.qmoe_sums_chosen
    router, bias, logits = read_router(found, _input(found, "router_probs"), weights, normalize)
    hint = _hint(found)
    if hint is None:
        return router, bias, logits
    scale = hint.get("scale", 1.0)
    hinted = {key: hint[key] for key in ("order", "renormalize", "scale") if key in hint}
    try:
        wanted = dataclasses.replace(router, **hinted)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{describe(found.node)}: {error}") from error
    expected = dataclasses.replace(router, scale=scale)
    if canonical(wanted, bias is not None) != canonical(expected, bias is not None):
        raise FormatError(
            f"{describe(found.node)}: its metadata say {hinted}, its inputs and attributes {router}"
        )
    if scale != 1.0 and not _is_scaled(found, scale):
        raise FormatError(
            f"{describe(found.node)}: its metadata say scale={scale}, but no Mul does it"
        )
    return wanted, bias, logits


def _is_scaled(found: Found, scale: float) -> bool:
    """Whether a Mul with the constant `scale` takes the node's output."""
    for user in found.producers.values():
        if user.op_type == "Mul" and found.node.output[0] in user.input:
            others = [n for n in user.input if n != found.node.output[0]]
            factor = found.constant_named(others[0]) if others else None
            if factor is not None and (factor == np.asarray(scale, factor.dtype)).all():
                return True
    return False


def _hint(found: Found) -> dict[str, Any] | None:
    for entry in found.node.metadata_props:
        if entry.key == HINT:
            try:
                hint = json.loads(entry.value)
            except ValueError as error:
                raise FormatError(f"{describe(found.node)}: metadata {HINT!r}: {error}") from error
            if not isinstance(hint, dict):
                raise FormatError(f"{describe(found.node)}: metadata {HINT!r} is no JSON object")
            return hint
    return None


def _matrices(
    found: Found, attributes: dict[str, Any], linear_shape: tuple[int, ...] | None
) -> ExpertMatrices:
    fc1, fc2, fc3 = (_linear(found, attributes, name) for name in ("fc1", "fc2", "fc3"))
    if fc1 is None or fc2 is None:
        raise FormatError(f"{describe(found.node)} must have fc1 and fc2 weights")
    fusion = attributes["swiglu_fusion"]
    is_swiglu = attributes["activation_type"] == "swiglu"
    if is_swiglu and fusion == 0 and fc3 is None:
        fusion = 1  # as the CUDA kernels read exports from before there was swiglu_fusion
    if fc3 is not None and fusion:
        raise FormatError(
            f"{describe(found.node)}: fc3 with swiglu_fusion={fusion}, which has none"
        )
    activation = activation_of(attributes, fusion, fc3 is not None)
    wide = 2 if is_swiglu and fc3 is None else 1
    _check_shapes(found, (fc1, fc2, fc3), wide, linear_shape)
    matrices = ExpertMatrices(fc1, fc2, fc3, activation, fusion, Hint("MLP", activation.layout))
    return dataclasses.replace(matrices, hint=_experts_hint(found, matrices))


def _experts_hint(found: Found, matrices: ExpertMatrices) -> Hint:
    default, hint = default_hint(matrices), _hint(found) or {}
    names = {f.name for f in dataclasses.fields(Hint)}
    return dataclasses.replace(default, **{key: hint[key] for key in names & set(hint)})


def _check_shapes(
    found: Found,
    parts: tuple[Linear, Linear, Linear | None],
    wide: int,
    linear_shape: tuple[int, ...] | None,
) -> None:
    """Raises FormatError unless weights are [expert, out, in] and fit each other and the router."""
    fc1, fc2, fc3 = parts
    num_experts, hidden_size = linear_shape or (fc1.weight.shape[0], fc1.weight.shape[2])
    inner = fc2.weight.shape[2]
    expected = {
        "fc1": (num_experts, wide * inner, hidden_size),
        "fc2": (num_experts, hidden_size, inner),
        "fc3": (num_experts, inner, hidden_size),
    }
    for (name, shape), part in zip(expected.items(), (fc1, fc2, fc3), strict=True):
        if part is None:
            continue
        if part.weight.shape != shape:
            raise FormatError(
                f"{describe(found.node)}: {name} weights must be [expert, out, in] = "
                f"{list(shape)}, got {list(part.weight.shape)}; weights [expert, in, out] of old "
                f"exporters are not read: transpose them"
            )
        if part.bias is not None and part.bias.shape != shape[:2]:
            raise FormatError(
                f"{describe(found.node)}: {name} bias must be {list(shape[:2])}, got "
                f"{list(part.bias.shape)}"
            )


def _linear(found: Found, attributes: dict[str, Any], name: str) -> Linear | None:
    weight = _constant(found, f"{name}_experts_weights")
    if weight is None:
        return None
    if weight.ndim != 3:
        raise FormatError(
            f"{describe(found.node)}: {name} weights must be [expert, out, in], got "
            f"{list(weight.shape)}"
        )
    bias = _constant(found, f"{name}_experts_bias")
    if found.node.op_type == MOE:
        return Linear(Matrix(weight), bias)
    return Linear(_integers(found, attributes, name, weight), bias)


def _integers(found: Found, attributes: dict[str, Any], name: str, packed: np.ndarray) -> Matrix:
    own = attributes[f"{name}_expert_weight_bits"]
    bits, size = attributes["expert_weight_bits"] if own is None else own, attributes["block_size"]
    if bits not in (2, 4, 8) or packed.dtype != np.uint8:
        raise FormatError(
            f"{describe(found.node)}: {name} must be uint8 with 2, 4 or 8 bits a weight, got "
            f"{packed.dtype} with {bits}"
        )
    outputs, inputs = packed.shape[1], packed.shape[2] * 8 // bits
    scales, zero = _constant(found, f"{name}_scales"), _constant(found, f"{name}_zero_points")
    if size < 0 or (size and inputs % size):
        raise FormatError(
            f"{describe(found.node)}: block_size={size} does not divide the {inputs} inputs of "
            f"{name}"
        )
    blocks = inputs // size if size else 1
    lead = packed.shape[:2]
    expected = (*lead, blocks) if size else lead
    if scales is None or scales.shape != expected:
        raise FormatError(
            f"{describe(found.node)}: {name}_scales must be {list(expected)}, got "
            f"{None if scales is None else list(scales.shape)}"
        )
    if zero is not None:
        row = blocks if size else outputs
        expected = (*(lead if size else lead[:1]), -(-row * bits // 8))
        if zero.shape != expected or zero.dtype != np.uint8:
            raise FormatError(
                f"{describe(found.node)}: {name}_zero_points must be uint8 {list(expected)}, got "
                f"{zero.dtype} {list(zero.shape)}"
            )
        zero = unpack_codes(zero, bits)[..., :row].reshape(*lead, blocks)
    scales = scales.reshape(*lead, blocks)
    return Matrix(unpack_codes(packed, bits), scales, zero, bits)


def _input(found: Found, name: str) -> str:
    return found.input(INPUTS[found.node.op_type].index(name))


def _constant(found: Found, name: str) -> np.ndarray | None:
    return found.constant(INPUTS[found.node.op_type].index(name), name)
