"""The MoE layers of gpt-oss's checkpoints, whose matrices are MXFP4 blocks and scales.

    experts.gate_up_proj_blocks  [E, 2I, D / 32, 16]    experts.gate_up_proj_scales  [E, 2I, D / 32]
    experts.down_proj_blocks     [E, D, I / 32, 16]     experts.down_proj_scales     [E, D, I / 32]

with biases `experts.*_bias` and the router as in `moe_jax.formats.torch.GPT_OSS`, which is the
layout of the same layers with matrices of floats. Blocks and scales stay as they are.

Source: https://huggingface.co/openai/gpt-oss-20b
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.activations import GPT_OSS_ACTIVATION, Activation
from moe_jax.experts.layers import GptOssMLP
from moe_jax.experts.prepare import restore_experts
from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import CHOSEN_SOFTMAX_ROUTERS, check_sayable, experts_of
from moe_jax.formats.torch.layouts import GPT_OSS, Tensor
from moe_jax.formats.torch.tensors import check_names, named_below, to_numpy
from moe_jax.layer import MoE
from moe_jax.quantization.mxfp4 import BlockScaled
from moe_jax.tagged import Tagged, tag
from moe_jax.variables import value

ROUTERS = CHOSEN_SOFTMAX_ROUTERS
"""The routers that may be written."""

_LEAVES = {
    "blocks": ("expert", "out", "block", "byte"),
    "scales": ("expert", "out", "block"),
}
_MATRICES = {"gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}

TENSORS = (
    *(part for part in GPT_OSS.tensors if "in" not in part.axes),
    *(
        Tensor(f"{name}_{leaf}", (f"{field}.{leaf}",), axes)
        for field, name in _MATRICES.items()
        for leaf, axes in _LEAVES.items()
    ),
)
"""What each name of a layer holds."""


def import_state(
    state: Mapping[str, Any],
    *,
    experts_per_token: int,
    prefix: str = "",
    activation: Activation = GPT_OSS_ACTIVATION,
) -> MoE:
    """The layer that tensors hold whose names begin with `prefix`.

    Args:
        state: tensors by name.
        experts_per_token: how many experts a token is sent to.
        prefix: of the layer's names, such as `model.layers.0.mlp.`.
        activation: of the experts; the released models have the default.

    Raises:
        FormatError: names are missing or not known, or shapes or dtypes do not fit.
        ValueError: `experts_per_token` is not between 1 and the number of experts.
    """
    own = named_below(state, prefix)
    check_names(own, [part.name for part in TENSORS], prefix)
    fields: dict[str, Tagged] = {}
    for part in TENSORS:
        array = to_numpy(own[part.name])
        if array.ndim != len(part.axes):
            raise FormatError(
                f"{prefix}{part.name} must have the axes {part.axes}, got {array.shape}"
            )
        fields[part.fields[0]] = tag(array, *part.axes)
    router = fields["router_weight"]
    weights = {
        field: BlockScaled(fields[f"{field}.blocks"], fields[f"{field}.scales"])
        for field in _MATRICES
    }
    _check_sizes(weights, fields, prefix)
    return MoE(
        GptOssMLP(
            gate_up_bias=fields["gate_up_bias"],
            down_bias=fields["down_bias"],
            activation=activation,
            **weights,
        ),
        router,
        fields["router_bias"],
        experts_per_token=experts_per_token,
    )


def export_state(
    layer: MoE, *, prefix: str = "", activation: Activation = GPT_OSS_ACTIVATION
) -> dict[str, np.ndarray]:
    """A layer's tensors by name.

    Args:
        layer: of `GptOssMLP` in MXFP4.
        prefix: of the names.
        activation: what whoever reads the tensors will take for the experts' activation.

    Raises:
        FormatError: it is not a layer of gpt-oss in MXFP4; the message names its field.
    """
    check_sayable(layer, "router", "router_bias")
    experts = restore_experts(experts_of(layer))
    if type(experts) is not GptOssMLP:
        raise FormatError(f"the experts are {type(experts).__name__}, gpt-oss has GptOssMLP")
    if experts.activation != activation:
        raise FormatError(
            f"activation is {experts.activation}, the tensors stand for {activation}: they do not "
            f"hold it, so give activation=... on both sides"
        )
    if layer.config.router not in ROUTERS:
        raise FormatError(f"router is {layer.config.router}, gpt-oss has {ROUTERS[0]}")
    if layer.router_bias is None:
        raise FormatError("router_bias is None: gpt-oss has one, give it zeros")
    fields: dict[str, Tagged] = {
        "router_weight": value(layer.router_weight),
        "router_bias": value(layer.router_bias),
        "gate_up_bias": experts.gate_up_bias,
        "down_bias": experts.down_bias,
    }
    for field in _MATRICES:
        weight = getattr(experts, field)
        if not isinstance(weight, BlockScaled) or weight.axis != "in":
            raise FormatError(
                f"{field} is {weight}: it must be MXFP4 in blocks along `in`, see quantize_mxfp4; "
                f"floats go into the layout torch.GPT_OSS"
            )
        fields |= {f"{field}.blocks": weight.blocks, f"{field}.scales": weight.scales}
    return {
        prefix + part.name: np.array(fields[part.fields[0]].untag(*part.axes)) for part in TENSORS
    }


def _check_sizes(
    weights: Mapping[str, BlockScaled], fields: Mapping[str, Tagged], prefix: str
) -> None:
    """Raises FormatError unless matrices, biases and router fit each other."""
    experts, hidden = (fields["router_weight"].size(axis) for axis in ("expert", "d"))
    try:
        inner = weights["down"].size("in")
        found = {field: weight.sizes for field, weight in weights.items()}
    except (TypeError, ValueError) as error:
        raise FormatError(f"{prefix}*: {error}") from error
    found |= {name: fields[name].sizes for name in ("router_bias", "gate_up_bias", "down_bias")}
    expected = {
        "gate_up": {"expert": experts, "out": 2 * inner, "in": hidden},
        "down": {"expert": experts, "out": hidden, "in": inner},
        "router_bias": {"expert": experts},
        "gate_up_bias": {"expert": experts, "out": 2 * inner},
        "down_bias": {"expert": experts, "out": hidden},
    }
    for name, sizes in expected.items():
        if found[name] != sizes:
            raise FormatError(f"{prefix}*: {name} must have {sizes}, got {found[name]}")
