"""The sub-layers of the plugin, which are what its experts compute."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_jax.activations import Activation
from moe_jax.experts import Identity, T5FeedForward
from moe_jax.formats.arrays import numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.infmoe.plugin import DTYPES
from moe_jax.norms import Norm
from moe_jax.tagged import tag


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """How the experts of one `expert_sublayer_type` lie in a weight file.

    Attributes:
        kind: the class of the experts.
        shapes: of one expert's arrays by key, given embedding_size and hidden_size.
        make: experts from arrays [expert, ...] by key and the norm. Keys of `optional` that the
            file has not are not among them.
        take: the reverse: arrays from experts. Raises FormatError for what the file cannot say.
        norm: the norm of experts; None where they have none.
        hidden_size: of experts.
        optional: the keys that all experts may lack.
    """

    kind: type
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    make: Callable[[dict[str, np.ndarray], Norm], Any]
    take: Callable[[Any], dict[str, np.ndarray]]
    norm: Callable[[Any], Norm | None] = lambda experts: None
    hidden_size: Callable[[Any], int] = lambda experts: 1
    optional: tuple[str, ...] = ()


def _t5_shapes(embedding_size: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    return {
        "layer_norm_weight": (embedding_size,),
        "layer_norm_bias": (embedding_size,),
        "wi_0_weight": (hidden_size, embedding_size),
        "wi_1_weight": (hidden_size, embedding_size),
        "wo_weight": (embedding_size, hidden_size),
    }


_T5_FIELDS = {
    "layer_norm_weight": ("norm_weight", ("expert", "d")),
    "layer_norm_bias": ("norm_bias", ("expert", "d")),
    "wi_0_weight": ("wi_0", ("expert", "out", "in")),
    "wi_1_weight": ("wi_1", ("expert", "out", "in")),
    "wo_weight": ("wo", ("expert", "out", "in")),
}


def _make_t5(arrays: dict[str, np.ndarray], norm: Norm) -> T5FeedForward:
    fields: dict[str, Any] = {
        field: tag(arrays[key], *axes) for key, (field, axes) in _T5_FIELDS.items() if key in arrays
    }
    return T5FeedForward(**fields, norm=norm)


def _take_t5(experts: T5FeedForward) -> dict[str, np.ndarray]:
    activation = dataclasses.replace(experts.activation, layout="concatenated")
    if activation != Activation("geglu_tanh"):
        raise FormatError(
            f"InfMoE has the activation Activation('geglu_tanh') and no other, "
            f"got activation={experts.activation}"
        )
    return {
        key: numpy_of(field, getattr(experts, field), axes, dtypes=DTYPES)
        for key, (field, axes) in _T5_FIELDS.items()
        if getattr(experts, field) is not None
    }


SUBLAYERS: Mapping[str, Sublayer] = {
    "T5_FF": Sublayer(
        kind=T5FeedForward,
        shapes=_t5_shapes,
        make=_make_t5,
        take=_take_t5,
        norm=lambda experts: experts.norm,
        hidden_size=lambda experts: experts.wi_0.size("out"),
        optional=("layer_norm_bias",),
    ),
    "Identity": Sublayer(
        kind=Identity,
        shapes=lambda embedding_size, hidden_size: {},
        make=lambda arrays, norm: Identity(),
        take=lambda experts: {},
    ),
}
"""The plugin's own sub-layers."""
