"""The library's experts as such a layer, and back."""

import dataclasses
from typing import Any

from moe_jax.experts.layers import MLP, GatedMLP, GptOssMLP
from moe_jax.experts.quantized import QuantizedGatedMLP
from moe_jax.formats.arrays import check_unpacked
from moe_jax.formats.errors import FormatError
from moe_jax.formats.tensorrt.layer import MoELayer
from moe_jax.formats.tensorrt.settings import MoEActType, Quantization, Swiglu
from moe_jax.tagged import Tagged


def from_experts(experts: Any) -> MoELayer:
    """The layer that computes what experts compute.

    `MoELayer.experts` gives a `GatedMLP` (or `QuantizedGatedMLP`) back, bit for bit, and
    `to_gpt_oss` a `GptOssMLP`.

    Args:
        experts: `GatedMLP`, `GptOssMLP`, `MLP` with a gated activation, or `QuantizedGatedMLP`,
            with weights of floats.

    Raises:
        FormatError: they are others, or TensorRT cannot say their weights, biases, activation or
            quantiser.
    """
    quantization = Quantization()
    if isinstance(experts, QuantizedGatedMLP):
        quantization = Quantization.of(experts.quantizer)
        experts = experts.layer
    if isinstance(experts, GptOssMLP):
        experts = _split(experts, experts.gate_up, experts.gate_up_bias)
    elif isinstance(experts, MLP) and experts.activation.gated:
        experts = _split(experts, experts.up, experts.up_bias)
    if not isinstance(experts, GatedMLP):
        raise FormatError(
            f"set_gated_weights takes gated experts (GatedMLP, GptOssMLP, MLP with a gated "
            f"activation, QuantizedGatedMLP), got {type(experts).__name__}"
        )
    layer = MoELayer()
    kind, layer.swiglu = Swiglu.of(experts.activation)
    gate, up, down = (_floats(weight, name) for name, weight in _matrices(experts))
    layer.set_gated_weights(gate, up, down, kind)
    biases = experts.gate_bias, experts.up_bias, experts.down_bias
    if any(bias is not None for bias in biases):
        layer.set_gated_biases(*biases)
    layer.quantization = quantization
    layer.experts()  # whether all of it fits together
    return layer


def to_gpt_oss(layer: MoELayer) -> GptOssMLP:
    """The layer's experts as gpt-oss has them: gate and up in one matrix, interleaved.

    Raises:
        FormatError: as `MoELayer.experts`, or the layer has no biases, no SiLU, or quantisation.
    """
    experts = layer.experts()
    if isinstance(experts, QuantizedGatedMLP):
        raise FormatError(
            f"GptOssMLP has no quantisation, quantization_to_type is "
            f"{layer.quantization_to_type.name}"
        )
    if layer.biases is None:
        raise FormatError("GptOssMLP needs biases: call set_gated_biases")
    if layer.activation_type is not MoEActType.SILU:
        raise FormatError(f"GptOssMLP is SwiGLU, activation_type is {layer.activation_type.name}")
    gate_bias, up_bias, down_bias = layer.biases
    gate, up, down = (_floats(w, name) for name, w in _matrices(experts))
    activation = dataclasses.replace(experts.activation, layout="interleaved")
    return GptOssMLP(
        gate_up=activation.join_lanes(gate, up),
        gate_up_bias=activation.join_lanes(gate_bias, up_bias),
        down=down,
        down_bias=down_bias,
        activation=activation,
    )


def _split(experts: GptOssMLP | MLP, both: Any, bias: Tagged | None) -> GatedMLP:
    """Experts whose gate and up are one matrix, with one for each."""
    activation = experts.activation
    gate, up = activation.lanes(_floats(both, "gate and up"))
    gate_bias, up_bias = (None, None) if bias is None else activation.lanes(bias)
    return GatedMLP(
        gate, up, experts.down, gate_bias, up_bias, experts.down_bias, activation=activation
    )


def _matrices(experts: GatedMLP) -> list[tuple[str, Any]]:
    return [(name, getattr(experts, name)) for name in ("gate", "up", "down")]


def _floats(weight: Any, name: str) -> Tagged:
    """The weight. Raises FormatError where it is packed."""
    check_unpacked(name, weight)
    return weight
