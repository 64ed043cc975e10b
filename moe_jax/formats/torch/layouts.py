"""Which tensor of a state dict holds what, as data, for kinds of modules."""

import dataclasses

from moe_jax.activations import GPT_OSS_ACTIVATION, Activation
from moe_jax.experts.layers import MLP, GatedMLP, GptOssMLP
from moe_jax.formats.arrays import IN_OUT, OUT_IN
from moe_jax.routing import Router


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What one name of a state dict holds.

    Attributes:
        name: the name; where each expert has a tensor of its own, `{}` stands for its number.
        fields: `router_weight`, `router_bias`, or the experts' field; several fields lie one
            after the other along `out`, equally long.
        axes: the tensor's axes, without `expert` where each expert has a tensor of its own.
    """

    name: str
    fields: tuple[str, ...]
    axes: tuple[str, ...]

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{}" in self.name


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of a kind of module, and what they do not say of the layer.

    Attributes:
        experts: the class of the experts.
        activation: of the experts.
        router: how the module routes.
        tensors: what each name holds.
    """

    experts: type
    activation: Activation
    router: Router
    tensors: tuple[Tensor, ...]


_NORMALIZED = Router(order="before_top_k", renormalize=True)
_ROUTER = ("expert", "d")
_BIAS = ("expert", "out")

DROPLESS = Layout(
    MLP,
    Activation("gelu"),
    _NORMALIZED,
    (
        Tensor("router.weight", ("router_weight",), _ROUTER),
        Tensor("w1", ("up",), IN_OUT),
        Tensor("b1", ("up_bias",), _BIAS),
        Tensor("w2", ("down",), IN_OUT),
        Tensor("b2", ("down_bias",), _BIAS),
    ),
)
"""A dropless layer of gelu MLPs around `torch.nn.functional.grouped_mm`, as a Swin model has."""

GPT_OSS = Layout(
    GptOssMLP,
    GPT_OSS_ACTIVATION,
    Router(),
    (
        Tensor("router.weight", ("router_weight",), _ROUTER),
        Tensor("router.bias", ("router_bias",), ("expert",)),
        Tensor("experts.gate_up_proj", ("gate_up",), IN_OUT),
        Tensor("experts.gate_up_proj_bias", ("gate_up_bias",), _BIAS),
        Tensor("experts.down_proj", ("down",), IN_OUT),
        Tensor("experts.down_proj_bias", ("down_bias",), _BIAS),
    ),
)
"""`GptOssMLP` of transformers. (The checkpoints of gpt-oss hold MXFP4 blocks [E, out, in].)"""

_SILU = Activation("swiglu")
_GATE = Tensor("gate.weight", ("router_weight",), _ROUTER)

MIXTRAL = Layout(
    GatedMLP,
    _SILU,
    _NORMALIZED,
    (
        _GATE,
        Tensor("experts.gate_up_proj", ("gate", "up"), OUT_IN),
        Tensor("experts.down_proj", ("down",), OUT_IN),
    ),
)
"""`MixtralSparseMoeBlock` of transformers 5: one tensor for all experts."""

MIXTRAL_CHECKPOINT = Layout(
    GatedMLP,
    _SILU,
    _NORMALIZED,
    (
        _GATE,
        Tensor("experts.{}.w1.weight", ("gate",), ("out", "in")),
        Tensor("experts.{}.w3.weight", ("up",), ("out", "in")),
        Tensor("experts.{}.w2.weight", ("down",), ("out", "in")),
    ),
)
"""Mixtral's checkpoints, and the block of transformers 4: tensors for each expert."""
