"""The attributes of the plugin, and what they may say."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.mixture_of_experts import RemainingWeight
from moe_jax.norms import Norm
from moe_jax.routing import Router

DTYPES = ("float32",)
"""The dtypes of InfMoE's arrays."""

DESCRIBED_NORM = Norm("rms", 1e-6)
"""The norm that InfMoE describes: that of T5."""

KERNEL_NORM = Norm("layer", 1e-6)
"""The norm that InfMoE computes."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a `moe_variant` of the plugin is in this library.

    Attributes:
        router: how the affinity to the nearest centroid becomes the expert's weight.
        remaining_weight: see `moe_jax.mixture_of_experts`.
        router_norm: whether affinities are those of the norm of x, with `layernorm_weight`.
    """

    router: Router
    remaining_weight: RemainingWeight = "unused"
    router_norm: bool = False


VARIANTS: Mapping[str, Variant] = {
    "default": Variant(Router()),
    "base_layer": Variant(Router(score="sigmoid"), remaining_weight="input"),
    "cpm_2": Variant(Router(), router_norm=True),
}
"""The plugin's variants. The softmax over one expert is 1: its result is the layer's."""


@dataclasses.dataclass(frozen=True, eq=False)
class InfMoEPlugin:
    """The attributes of the plugin, under its own names.

    Attributes:
        expert_count: the number of experts.
        embedding_size: d.
        hidden_size: the intermediate size of an expert; not used by `Identity`, but positive.
        expert_centroids: float32 [expert, d].
        expert_weight_file: path of the npz file.
        expert_sublayer_type: a key of the sub-layers, `T5_FF` or `Identity`.
        moe_variant: a key of `VARIANTS`.
        layernorm_weight: float32 [d] for `cpm_2`, else None.
        max_concurrency: how many experts the plugin keeps on the device at a time.

    Raises:
        FormatError: a number is not a positive int, an array is not float32, has another shape or
            holds NaN, or the variant is unknown or lacks its `layernorm_weight`.
    """

    expert_count: int
    embedding_size: int
    hidden_size: int
    expert_centroids: np.ndarray
    expert_weight_file: str
    expert_sublayer_type: str = "T5_FF"
    moe_variant: str = "default"
    layernorm_weight: np.ndarray | None = None
    max_concurrency: int = 2

    def __post_init__(self) -> None:
        for name in ("expert_count", "embedding_size", "hidden_size", "max_concurrency"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise FormatError(f"{name} must be a positive int, got {number!r}")
        size = self.embedding_size
        _check_attribute("expert_centroids", self.expert_centroids, (self.expert_count, size))
        lookup("moe_variant", self.moe_variant, VARIANTS)
        if (self.layernorm_weight is not None) != VARIANTS[self.moe_variant].router_norm:
            raise FormatError(
                f"layernorm_weight belongs to moe_variant 'cpm_2' and to no other, "
                f"got {self.moe_variant!r} {'without' if self.layernorm_weight is None else 'with'}"
                f" it"
            )
        if self.layernorm_weight is not None:
            _check_attribute("layernorm_weight", self.layernorm_weight, (size,))


def check_array(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises FormatError unless `array` is a float32 NumPy array of that shape."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        got = getattr(array, "dtype", type(array).__name__)
        raise FormatError(
            f"{name} must be a float32 array of shape {shape}, got {got} of shape {np.shape(array)}"
        )


def check_norm(name: str, norm: Any) -> None:
    """Raises FormatError unless InfMoE has such a norm."""
    if norm not in (DESCRIBED_NORM, KERNEL_NORM):
        raise FormatError(
            f"{name} must be {DESCRIBED_NORM} (as InfMoE describes it) or {KERNEL_NORM} (as it "
            f"computes it), got {norm!r}"
        )


def lookup[T](name: str, key: str, table: Mapping[str, T]) -> T:
    """table[key]. Raises FormatError where there is no such entry."""
    if key not in table:
        raise FormatError(f"{name} must be one of {tuple(table)}, got {key!r}")
    return table[key]


def _check_attribute(name: str, array: Any, shape: tuple[int, ...]) -> None:
    check_array(name, array, shape)
    if np.isnan(array).any():
        raise FormatError(f"{name} holds NaN at {np.argwhere(np.isnan(array))[0].tolist()}")
