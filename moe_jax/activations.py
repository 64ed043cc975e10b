"""The nonlinearities of experts, with one meaning for their parameters.

The same names mean different things elsewhere: OpenVINO's `expert_alpha` is a clamp and its
`expert_beta` a slope. Here, as in ONNX Runtime and TensorRT-LLM, `alpha` is the slope inside the
sigmoid, `beta` is added to the linear lane, and `limit` clamps both lanes:

    gate, up = lanes of x
    gate = min(gate, limit);  up = clip(up, -limit, limit)
    swiglu = gate * sigmoid(alpha * gate) * (up + beta)
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.tagged import Tagged

type Kind = Literal[
    "identity",
    "relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "swiglu",
    "geglu",
    "geglu_tanh",
    "reglu",
    "bilinear",
]
type Layout = Literal[
    "interleaved", "interleaved_up_first", "concatenated", "concatenated_up_first"
]

_PLAIN = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
_GATED = {
    "geglu": _PLAIN["gelu"],
    "geglu_tanh": _PLAIN["gelu_tanh"],
    "reglu": _PLAIN["relu"],
    "bilinear": _PLAIN["identity"],
}
_KINDS = (*_PLAIN, "swiglu", *_GATED)
_LAYOUTS = ("interleaved", "interleaved_up_first", "concatenated", "concatenated_up_first")


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation as data.

    Attributes:
        kind: `identity`, `relu`, `silu`, `gelu` (erf), `gelu_tanh` act on one lane; `swiglu`,
            `geglu` (erf), `geglu_tanh`, `reglu` multiply an activated gate with a linear lane,
            and `bilinear` one that is not activated.
        alpha: slope inside the sigmoid; `swiglu` only.
        beta: added to the linear lane; gated kinds only.
        limit: clamp of the gate from above and of the linear lane on both sides; None for none;
            gated kinds only.
        layout: where gate and linear lane lie when one matrix makes both. `interleaved`: gate at
            even positions. `interleaved_up_first`: gate at odd positions. `concatenated`: gate in
            the first half. `concatenated_up_first`: gate in the second half.
    """

    kind: Kind = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    layout: Layout = "concatenated"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"activation kind must be one of {_KINDS}, got {self.kind!r}")
        if self.layout not in _LAYOUTS:
            raise ValueError(f"activation layout must be one of {_LAYOUTS}, got {self.layout!r}")
        if self.kind != "swiglu" and self.alpha != 1.0:
            raise ValueError(f"alpha belongs to swiglu, got alpha={self.alpha} with {self.kind!r}")
        if not self.gated and (self.beta != 0.0 or self.limit is not None):
            raise ValueError(
                f"beta and limit belong to gated kinds, got beta={self.beta}, "
                f"limit={self.limit} with {self.kind!r}"
            )
        for name in ("alpha", "beta"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be positive or None, got {self.limit}")

    @property
    def gated(self) -> bool:
        """Whether the activation takes two lanes."""
        return self.kind not in _PLAIN

    def __call__(self, x: Tagged, axis: str = "out") -> Tagged:
        """Activates {..., axis}. A gated kind halves the axis, which holds both lanes."""
        if not self.gated:
            return x.map(_PLAIN[self.kind])
        return self.combine(*self.lanes(x, axis))

    def combine(self, gate: Tagged, up: Tagged) -> Tagged:
        """Activates a gate and multiplies it with the linear lane; both of the same axes."""
        if not self.gated:
            raise ValueError(f"{self.kind!r} has one lane; expected a gated kind")
        if self.limit is not None:
            limit = self.limit
            gate = gate.map(lambda g: jnp.minimum(g, limit))
            up = up.map(lambda u: jnp.clip(u, -limit, limit))
        return gate.map(self._activate) * (up + self.beta)

    def _activate(self, gate: jax.Array) -> jax.Array:
        if self.kind == "swiglu":
            return gate * jax.nn.sigmoid(self.alpha * gate)
        return _GATED[self.kind](gate)

    def lanes(self, x: Tagged, axis: str = "out") -> tuple[Tagged, Tagged]:
        """The gate and the linear lane of {..., axis}, each half as wide."""
        size = x.size(axis)
        if size % 2:
            raise ValueError(f"{self.kind!r} needs an even size of axis {axis!r}, got {size}")
        if _is_interleaved(self.layout):
            lanes = x.split(axis, **{axis: size // 2, "lane": 2})
        else:
            lanes = x.split(axis, **{"lane": 2, axis: size // 2})
        first, second = lanes.take(0, "lane"), lanes.take(1, "lane")
        return (second, first) if _is_up_first(self.layout) else (first, second)

    def join_lanes(self, gate: Tagged, up: Tagged, axis: str = "out") -> Tagged:
        """What `lanes` takes apart: gate and linear lane {..., axis} in one."""
        up = up.order(*gate.axes)
        pair = (up, gate) if _is_up_first(self.layout) else (gate, up)
        position = gate.position(axis)
        interleaved = _is_interleaved(self.layout)
        array = jnp.stack([lane.array for lane in pair], position + interleaved)
        lanes = (axis, "lane") if interleaved else ("lane", axis)
        axes = (*gate.axes[:position], *lanes, *gate.axes[position + 1 :])
        return Tagged(array, axes).merge(lanes, axis)


def lane_positions(layout: Layout, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions, int64 [size / 2], of gate and of linear lane among `size` that hold both.

    For what is not one array, such as codes and their scales; `Activation.lanes` takes arrays
    apart.
    """
    positions, half = np.arange(size), size // 2
    if _is_interleaved(layout):
        first, second = positions[0::2], positions[1::2]
    else:
        first, second = positions[:half], positions[half:]
    return (second, first) if _is_up_first(layout) else (first, second)


def _is_interleaved(layout: Layout) -> bool:
    return layout.startswith("interleaved")


def _is_up_first(layout: Layout) -> bool:
    return layout.endswith("up_first")


GPT_OSS_ACTIVATION = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0, layout="interleaved")
"""The clamped SwiGLU of gpt-oss (swiglu_limit 7.0)."""
