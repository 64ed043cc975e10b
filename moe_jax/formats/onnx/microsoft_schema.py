"""What `com.microsoft.MoE` and `QMoE` can say, as data.

Names, positions and defaults are those of the operators' schemas (version 1, onnxruntime 1.31).
What a runtime makes of them is a `Target`: `CPU` was measured with onnxruntime 1.31.1, `CUDA` is
read from its schema and sources and has not been run.
"""

import dataclasses
from typing import Any

from moe_jax.activations import Kind, Layout

DOMAIN = "com.microsoft"
VERSION = 1

MOE = "MoE"
QMOE = "QMoE"

INPUTS = {
    MOE: (
        "input",
        "router_probs",
        "fc1_experts_weights",
        "fc1_experts_bias",
        "fc2_experts_weights",
        "fc2_experts_bias",
        "fc3_experts_weights",
        "fc3_experts_bias",
    ),
    QMOE: (
        "input",
        "router_probs",
        "fc1_experts_weights",
        "fc1_scales",
        "fc1_experts_bias",
        "fc2_experts_weights",
        "fc2_scales",
        "fc2_experts_bias",
        "fc3_experts_weights",
        "fc3_scales",
        "fc3_experts_bias",
        "fc1_zero_points",
        "fc2_zero_points",
        "fc3_zero_points",
        "router_weights",
        "fc1_global_scale",
        "fc2_global_scale",
        "fc1_act_scale",
        "fc2_act_scale",
        "fc1_act_block_scale",
        "fc2_act_block_scale",
    ),
}
"""The operators' inputs in order. `router_probs` are logits, whatever the name says."""

UNREAD_INPUTS = INPUTS[QMOE][15:]
"""Inputs of the floating-point weight formats, which are not read."""

_ATTRIBUTES: dict[str, Any] = {
    "k": 1,
    "activation_type": "relu",
    "normalize_routing_weights": 0,
    "use_sparse_mixer": 0,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_limit": None,
    "swiglu_fusion": 0,
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    MOE: _ATTRIBUTES,
    QMOE: _ATTRIBUTES
    | {
        "expert_weight_bits": 4,
        "fc1_expert_weight_bits": None,
        "fc2_expert_weight_bits": None,
        "fc3_expert_weight_bits": None,
        "block_size": 0,
        "quant_type": "int",
        "weights_prepacked": -1,
        "accuracy_level": 0,
    },
}
"""The operators' attributes and their defaults; None for one that may be absent."""

ACTIVATION_TYPES: dict[Kind, str] = {
    "relu": "relu",
    "silu": "silu",
    "identity": "identity",
    "gelu_tanh": "gelu",
    "swiglu": "swiglu",
}
"""`activation_type` by kind. The operator's gelu is the tanh approximation."""

FUSION_LAYOUTS: dict[int, Layout] = {1: "interleaved", 2: "concatenated"}
"""Where gate and linear lane lie in fc1, by `swiglu_fusion`; with 0 the linear lane is fc3."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a runtime can run of the operators.

    Attributes:
        name: for messages.
        float_types: the types of `input` it has kernels for.
        swiglu_fusions: values of `swiglu_fusion`, the best first; 0 needs fc3.
        weight_bits: widths of integer weights.
        mixed_widths: whether fc1 and fc2 may differ in width.
        qmoe_sums_chosen: whether QMoE without `router_weights` normalises over the chosen experts
            even where `normalize_routing_weights` is 0.
    """

    name: str
    float_types: tuple[str, ...]
    swiglu_fusions: tuple[int, ...]
    weight_bits: tuple[int, ...]
    mixed_widths: bool
    qmoe_sums_chosen: bool


CPU = Target(
    "onnxruntime's CPU kernels",
    float_types=("float32", "float16"),
    swiglu_fusions=(1,),
    weight_bits=(2, 4, 8),
    mixed_widths=False,
    qmoe_sums_chosen=True,
)
CUDA = Target(
    "onnxruntime's CUDA kernels",
    float_types=("float32", "float16", "bfloat16"),
    swiglu_fusions=(1, 2, 0),
    weight_bits=(2, 4, 8),
    mixed_widths=True,
    qmoe_sums_chosen=False,
)

HINT = "moe_jax"
"""Key of the node's metadata that says, as JSON, what a node was made of."""
