"""Layers as `com.microsoft.MoE` and `QMoE` nodes in a model of their own."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import Layers, as_layers, check_sayable, experts_of
from moe_jax.formats.onnx.graph import (
    Dimension,
    finite_cast,
    initialiser,
    model_of,
    node,
    save,
    value,
)
from moe_jax.formats.onnx.microsoft_experts import (
    ExpertMatrices,
    Linear,
    attribute_floats,
    to_matrices,
)
from moe_jax.formats.onnx.microsoft_matrices import is_integer
from moe_jax.formats.onnx.microsoft_router import export_router
from moe_jax.formats.onnx.microsoft_schema import (
    ACTIVATION_TYPES,
    CPU,
    DOMAIN,
    HINT,
    INPUTS,
    MOE,
    QMOE,
    VERSION,
    Target,
)
from moe_jax.layer import MoE
from moe_jax.quantization.codes import pack_codes
from moe_jax.tagged import Tagged, is_tagged
from moe_jax.variables import value as tagged_value


def write(
    path: str | os.PathLike[str],
    layers: Layers,
    *,
    target: Target = CPU,
    token_axes: Sequence[Dimension] = ("tokens",),
    float_type: Any = None,
    external_data: str | None = None,
) -> None:
    """Writes layers to an ONNX file; constants to a file `external_data` beside it, if named.

    The other arguments and the errors are those of `to_model`.
    """
    model = to_model(layers, target=target, token_axes=token_axes, float_type=float_type)
    save(model, path, external_data=external_data)


def to_model(
    layers: Layers,
    *,
    target: Target = CPU,
    token_axes: Sequence[Dimension] = ("tokens",),
    float_type: Any = None,
) -> ModelProto:
    """Layers as one ONNX model.

    A single layer has the input `x` [*token_axes, d] and the output `y` of the same shape; of
    several, or of a model's, each has `NAME.x` and `NAME.y`. How a layer dispatches and lies on
    devices (`algorithm`, `sharding`) is not part of the model.

    Args:
        layers: an `MoE`, several by name, or a Flax module, of which the `MoE` inside are taken.
        target: the runtime that shall run it.
        token_axes: one or two sizes, or names of sizes.
        float_type: what the operator computes with; None for the type of the experts' floats,
            float32 where they have none. What is of another type is rounded to it, except the
            router, which computes logits in float32 and only then rounds them.

    Raises:
        FormatError: what the operators or the target cannot say, naming the attribute.
        TypeError: `layers` holds something else than `MoE`.
    """
    if len(token_axes) not in (1, 2):
        raise FormatError(f"input has one or two token axes, got {len(token_axes)}")
    whole = LayerGraph([], [], [], [])
    for name, layer in as_layers(layers).items():
        prefix = "" if isinstance(layers, MoE) else f"{name}."
        whole.extend(_layer(name, prefix, layer, target, [*token_axes], float_type))
    return model_of(whole.nodes, whole.inputs, whole.outputs, whole.constants, {DOMAIN: VERSION})


@dataclasses.dataclass(frozen=True)
class LayerGraph:
    """What layers add to a model.

    Attributes:
        nodes: in order.
        inputs: of the model.
        outputs: of the model.
        constants: what nodes name.
    """

    nodes: list[NodeProto]
    inputs: list[ValueInfoProto]
    outputs: list[ValueInfoProto]
    constants: list[TensorProto]

    def extend(self, other: "LayerGraph") -> None:
        """Adds what another layer adds, behind the rest."""
        self.nodes.extend(other.nodes)
        self.inputs.extend(other.inputs)
        self.outputs.extend(other.outputs)
        self.constants.extend(other.constants)


def _layer(
    name: str,
    prefix: str,
    layer: MoE,
    target: Target,
    token_axes: list[Dimension],
    float_type: Any,
) -> LayerGraph:
    check_sayable(layer, "router", "router_bias", "selection_bias")
    experts = experts_of(layer)
    weight = tagged_value(layer.router_weight)
    num_experts, hidden_size = weight.size("expert"), weight.size("d")
    dtype = _float_type(experts, float_type, target)
    matrices = to_matrices(experts, num_experts, hidden_size, dtype, target)
    quantized = matrices.bits > 0
    _check_widths(matrices, target)
    router = layer.config.router
    graph = export_router(
        prefix,
        f"{prefix}x",
        weight,
        None if layer.router_bias is None else tagged_value(layer.router_bias),
        None if layer.selection_bias is None else tagged_value(layer.selection_bias),
        router,
        float_type=dtype,
        quantized=quantized,
        always_apart=quantized,
    )
    attributes, tensors = _attributes(matrices), _tensors(matrices)
    inputs = {"input": f"{prefix}x", "router_probs": graph.logits, "router_weights": graph.weights}
    inputs |= {key: f"{prefix}{key}" for key in tensors}
    output = f"{prefix}y" if router.scale == 1.0 else f"{prefix}unscaled"
    one = node(
        QMOE if quantized else MOE,
        _positions(QMOE if quantized else MOE, inputs),
        [output],
        domain=DOMAIN,
        name=name,
        k=layer.config.experts_per_token,
        normalize_routing_weights=graph.normalize,
        **attributes,
    )
    _set_hint(one, layer, matrices)
    constants = [initialiser(f"{prefix}{key}", array) for key, array in tensors.items()]
    nodes = [*graph.nodes, one]
    if router.scale != 1.0:
        _scale(prefix, router.scale, dtype, nodes, constants)
    shape = [*token_axes, hidden_size]
    ends = [value(f"{prefix}{end}", dtype, shape) for end in "xy"]
    return LayerGraph(nodes, ends[:1], ends[1:], [*graph.constants, *constants])


def _float_type(experts: Any, wanted: Any, target: Target) -> np.dtype[Any]:
    """What the operator computes with. Raises FormatError where the target does not."""
    if wanted is None:
        leaves = jax.tree.leaves(experts, is_leaf=lambda n: is_integer(n) or is_tagged(n))
        types = sorted({str(n.dtype) for n in leaves if isinstance(n, Tagged)})
        floats = [t for t in types if "float" in t]
        if len(floats) > 1:
            raise FormatError(f"input has one float_type, the experts have {', '.join(floats)}")
        wanted = floats[0] if floats else "float32"
    dtype = np.dtype(wanted)
    if dtype.name not in target.float_types:
        raise FormatError(
            f"{target.name} have no float_type {dtype.name}: they have "
            f"{', '.join(target.float_types)}; name one of them as float_type"
        )
    return dtype


def _check_widths(matrices: ExpertMatrices, target: Target) -> None:
    """Raises FormatError where integers, if any, are not what the target multiplies."""
    first, second = matrices.fc1.weight, matrices.fc2.weight
    if not first.bits and not second.bits:
        return
    if not first.bits or not second.bits:
        raise FormatError(
            f"QMoE needs all weights as integers, got fc1 {first.describe()} and fc2 "
            f"{second.describe()}"
        )
    size = _block_size(matrices)
    if first.bits != second.bits and not target.mixed_widths:
        raise FormatError(
            f"{target.name} need one expert_weight_bits, got {first.bits} in fc1 and "
            f"{second.bits} in fc2"
        )
    if size and (size < 16 or size & (size - 1)):
        raise FormatError(f"block_size must be a power of two and at least 16, got {size}")
    for name, matrix in (("fc1", first), ("fc2", second)):
        if matrix.bits not in target.weight_bits:
            raise FormatError(
                f"expert_weight_bits must be one of {target.weight_bits} for {target.name}, got "
                f"{matrix.bits} in {name}"
            )
        if matrix.shape[-1] * matrix.bits % 8:
            raise FormatError(
                f"expert_weight_bits={matrix.bits}: rows of {name} must be whole bytes, got "
                f"{matrix.shape[-1]} inputs"
            )


def _block_size(matrices: ExpertMatrices) -> int:
    """`block_size`, 0 where each row has one scale. Raises FormatError where there is not one."""
    first, second = matrices.fc1.weight, matrices.fc2.weight
    if first.groups == second.groups == 1:
        return 0
    if first.group_size != second.group_size:
        raise FormatError(
            f"QMoE has one block_size, got {first.group_size} in fc1 and {second.group_size} in fc2"
        )
    return first.group_size


def _attributes(matrices: ExpertMatrices) -> dict[str, Any]:
    activation = matrices.activation
    attributes: dict[str, Any] = {"activation_type": ACTIVATION_TYPES[activation.kind]}
    attributes |= attribute_floats(activation)
    if activation.gated:
        attributes["swiglu_fusion"] = matrices.fusion
    first, second = matrices.fc1.weight, matrices.fc2.weight
    if first.bits:
        attributes["expert_weight_bits"] = first.bits
        if second.bits != first.bits:
            attributes["fc2_expert_weight_bits"] = second.bits
        attributes["block_size"] = _block_size(matrices) or None
    return attributes


def _tensors(matrices: ExpertMatrices) -> dict[str, np.ndarray]:
    """The constants by the names of the operators' inputs."""
    parts = {"fc1": matrices.fc1, "fc2": matrices.fc2, "fc3": matrices.fc3}
    return {
        key: array
        for name, part in parts.items()
        if part is not None
        for key, array in _linear_tensors(name, part, not _block_size(matrices)).items()
    }


def _linear_tensors(name: str, part: Linear, row_wise: bool) -> dict[str, np.ndarray]:
    weight = part.weight
    found = {} if part.bias is None else {f"{name}_experts_bias": part.bias}
    if weight.scales is None:
        return {f"{name}_experts_weights": weight.values, **found}
    found[f"{name}_experts_weights"] = pack_codes(weight.values, weight.bits)
    found[f"{name}_scales"] = weight.scales[..., 0] if row_wise else weight.scales
    if weight.zero_points is not None:
        zero = weight.zero_points[..., 0] if row_wise else weight.zero_points
        found[f"{name}_zero_points"] = pack_codes(zero, weight.bits)
    return found


def _positions(operator: str, inputs: Mapping[str, str]) -> list[str]:
    """Names of values in the order of the operator's inputs, without empty ones at the end."""
    names = [inputs.get(name, "") for name in INPUTS[operator]]
    last = max(i for i, name in enumerate(names) if name)
    return names[: last + 1]


def _scale(
    prefix: str, scale: float, dtype: Any, nodes: list[NodeProto], constants: list[TensorProto]
) -> None:
    """The router's factor, which the operators lack, on the output."""
    factor = finite_cast("the router's scale", np.asarray(scale), dtype)
    constants.append(initialiser(f"{prefix}router_scale", factor))
    names = [f"{prefix}unscaled", f"{prefix}router_scale"]
    nodes.append(node("Mul", names, [f"{prefix}y"], name=f"{prefix}router_scaling"))


def _set_hint(one: NodeProto, layer: MoE, matrices: ExpertMatrices) -> None:
    router = layer.config.router
    hint = {
        "experts": matrices.hint.experts,
        "layout": matrices.hint.layout,
        "mxfp4": matrices.hint.mxfp4,
        "order": router.order,
        "renormalize": router.renormalize,
        "scale": router.scale,
    }
    entry = one.metadata_props.add()
    entry.key, entry.value = HINT, json.dumps(hint)
