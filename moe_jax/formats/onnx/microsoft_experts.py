"""Experts as the matrices fc1, fc2 and fc3, and back.

Gate and linear lane lie in one matrix, in four layouts, or in two. Rows are moved to where the
target wants them, which changes no number; a hint in the node says where they were.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from moe_jax.activations import Activation, Kind, Layout, lane_positions
from moe_jax.experts.layers import MLP, GatedMLP, GptOssMLP
from moe_jax.formats.arrays import check_all_or_none, numpy_of
from moe_jax.formats.errors import FormatError
from moe_jax.formats.onnx.graph import finite_cast
from moe_jax.formats.onnx.microsoft_matrices import (
    Matrix,
    matrix_of,
    weight_of,
)
from moe_jax.formats.onnx.microsoft_schema import ACTIVATION_TYPES, FUSION_LAYOUTS, Target
from moe_jax.quantization.mxfp4 import BlockScaled
from moe_jax.quantization.tiled import TiledMXFP4
from moe_jax.tagged import Tagged, tag

type ExpertKind = Literal["MLP", "GatedMLP", "GptOssMLP"]

_FIELDS: dict[ExpertKind, tuple[str, ...]] = {
    "MLP": ("up",),
    "GptOssMLP": ("gate_up",),
    "GatedMLP": ("gate", "up"),
}
"""The fields that make fc1 by kind of expert; each has a bias of its name and `_bias`."""

_CLASSES: dict[ExpertKind, Any] = {"MLP": MLP, "GptOssMLP": GptOssMLP, "GatedMLP": GatedMLP}
_PREFERRED_FUSION = {"interleaved": 1, "interleaved_up_first": 1}
_KINDS: dict[str, Kind] = {operator: kind for kind, operator in ACTIVATION_TYPES.items()}


@dataclasses.dataclass(frozen=True)
class Hint:
    """What the operator does not say of experts.

    Attributes:
        experts: the class.
        layout: where gate and linear lane lie in the class's matrix.
        mxfp4: whether 8-bit integers stand for MXFP4, in all matrices.
    """

    experts: ExpertKind
    layout: Layout
    mxfp4: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer of all experts.

    Attributes:
        weight: [expert, out, in].
        bias: floats [expert, out], or None.
    """

    weight: Matrix
    bias: np.ndarray | None

    def rows(self, index: np.ndarray) -> "Linear":
        """The rows `index`, int [n], of every expert, in that order."""
        return Linear(self.weight.rows(index), None if self.bias is None else self.bias[:, index])

    def join(self, other: "Linear") -> "Linear":
        """The rows of both; without a bias where one has none. Raises FormatError as `Matrix`."""
        bias = None
        if self.bias is not None and other.bias is not None:
            bias = np.concatenate([self.bias, other.bias], 1)
        return Linear(self.weight.join(other.weight), bias)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertMatrices:
    """Experts as the operators take them.

    Attributes:
        fc1: what makes the activation's input.
        fc2: what makes the output.
        fc3: the linear lane, where fc1 makes the gate alone.
        activation: `layout` is that of fc1.
        fusion: `swiglu_fusion`.
        hint: what the experts were.
    """

    fc1: Linear
    fc2: Linear
    fc3: Linear | None
    activation: Activation
    fusion: int
    hint: Hint

    @property
    def bits(self) -> int:
        """Of the codes of fc1; 0 for floats."""
        return self.fc1.weight.bits


def to_matrices(
    experts: Any, num_experts: int, hidden_size: int, float_type: Any, target: Target
) -> ExpertMatrices:
    """Experts of the library as matrices of `float_type`, or of integers.

    Raises:
        FormatError: what the operators or the target cannot say; weights that do not fit together.
    """
    kind = _kind_of(experts)
    activation = experts.activation
    check_activation(activation)
    first, *others = _FIELDS[kind]
    if kind == "GatedMLP" and not activation.gated:
        raise FormatError(f"GatedMLP needs a gated activation, got kind {activation.kind!r}")
    names = first, *others, "down"
    check_all_or_none({f"{name}_bias": getattr(experts, f"{name}_bias") for name in names})
    parts = [_linear(experts, name, float_type) for name in (first, *others)]
    down = _linear(experts, "down", float_type)
    outputs = parts[0].weight.shape[1]
    inner = outputs // 2 if activation.gated and len(parts) == 1 else outputs
    wide = inner * (3 - len(parts)) if activation.gated else inner
    for name, part in zip((first, *others), parts, strict=True):
        _check_shape(name, part, (num_experts, wide, hidden_size))
    _check_shape("down", down, (num_experts, hidden_size, inner))
    mxfp4 = all(_is_mxfp4(experts, name) for name in names)
    hint = Hint(kind, activation.layout, mxfp4)
    if not activation.gated:
        return ExpertMatrices(parts[0], down, None, activation, 0, hint)
    gate, up = parts if others else _split(parts[0], activation.layout)
    wanted = 0 if others else _PREFERRED_FUSION.get(activation.layout, 2)
    fusion = wanted if wanted in target.swiglu_fusions else target.swiglu_fusions[0]
    if fusion == 0:
        return ExpertMatrices(gate, down, up, activation, 0, hint)
    layout = FUSION_LAYOUTS[fusion]
    stored = dataclasses.replace(activation, layout=layout)
    return ExpertMatrices(_fuse(gate, up, layout), down, None, stored, fusion, hint)


def from_matrices(matrices: ExpertMatrices) -> Any:
    """The experts that `matrices.hint` names.

    Raises:
        FormatError: the hint contradicts the matrices.
    """
    hint, activation = matrices.hint, matrices.activation
    if hint.experts not in _FIELDS:
        raise FormatError(f"the hint names unknown experts {hint.experts!r}")
    names = _FIELDS[hint.experts]
    if len(names) == 2 and not activation.gated:
        raise FormatError(f"the hint says {hint.experts}, the operator {activation.kind!r}")
    matrices = _complete_biases(matrices)
    fc1, fc2, fc3 = matrices.fc1, matrices.fc2, matrices.fc3
    parts = (fc1,)
    if activation.gated:
        gate, up = _split(fc1, activation.layout) if fc3 is None else (fc1, fc3)
        parts = (gate, up) if len(names) == 2 else (_fuse(gate, up, hint.layout),)
    if hint.experts == "GptOssMLP" and fc1.bias is None:
        raise FormatError("the hint says GptOssMLP, which has biases; the node has none")
    fields: dict[str, Any] = {"activation": dataclasses.replace(activation, layout=hint.layout)}
    for name, part in zip((*names, "down"), (*parts, fc2), strict=True):
        fields[name] = weight_of(part.weight, hint.mxfp4)
        fields[f"{name}_bias"] = None if part.bias is None else tag(part.bias, "expert", "out")
    return _CLASSES[hint.experts](**fields)


def default_hint(matrices: ExpertMatrices) -> Hint:
    """What experts are where no hint says it."""
    return Hint("MLP" if matrices.fc3 is None else "GatedMLP", matrices.activation.layout)


def check_activation(activation: Activation) -> None:
    """Raises FormatError, naming the attribute, where the operators lack an activation."""
    if activation.kind not in ACTIVATION_TYPES:
        raise FormatError(
            f"activation_type cannot say {activation.kind!r}: it has {sorted(ACTIVATION_TYPES)} "
            f"(its 'gelu' is the tanh approximation, and only swiglu multiplies two lanes)"
        )
    for name, number in attribute_floats(activation).items():
        with np.errstate(over="ignore"):
            single = np.float32(number)
        if not (single > 0 if name == "swiglu_limit" else np.isfinite(single)):
            raise FormatError(f"{name} is a float32, which cannot say {number}")


def attribute_floats(activation: Activation) -> dict[str, float]:
    """The attributes that say the numbers of a SwiGLU."""
    if activation.kind != "swiglu":
        return {}
    floats = {"activation_alpha": activation.alpha, "activation_beta": activation.beta}
    return floats if activation.limit is None else {**floats, "swiglu_limit": activation.limit}


def activation_of(attributes: dict[str, Any], fusion: int, separate: bool) -> Activation:
    """The activation that attributes say; `separate` where there is an fc3.

    Raises:
        FormatError: an unknown one, or fc3 with an activation that has one lane.
    """
    operator = attributes["activation_type"]
    if operator not in _KINDS:
        raise FormatError(f"activation_type must be one of {sorted(_KINDS)}, got {operator!r}")
    # the CUDA kernels take silu with fc3 for SwiGLU
    kind: Kind = "swiglu" if separate and operator == "silu" else _KINDS[operator]
    if kind != "swiglu":
        if separate:
            raise FormatError(f"fc3 belongs to swiglu or silu, got activation_type {operator!r}")
        return Activation(kind)
    limit = attributes["swiglu_limit"]
    return Activation(
        kind,
        alpha=_shortest(attributes["activation_alpha"]),
        beta=_shortest(attributes["activation_beta"]),
        limit=None if limit is None else _shortest(limit),
        layout=FUSION_LAYOUTS.get(fusion, "concatenated"),
    )


def _shortest(number: float) -> float:
    """The shortest decimal with the same float32: 1.702 for what an attribute makes of 1.702."""
    return float(str(np.float32(number)))


def _kind_of(experts: Any) -> ExpertKind:
    for kind, class_ in _CLASSES.items():
        if type(experts) is class_:
            return kind
    raise FormatError(
        f"the operators have no experts of type {type(experts).__name__}: "
        f"they have {', '.join(_CLASSES)}"
    )


def _linear(experts: Any, name: str, float_type: Any) -> Linear:
    bias: Tagged | None = getattr(experts, f"{name}_bias")
    array = None if bias is None else numpy_of(f"{name}_bias", bias, ("expert", "out"))
    return Linear(
        matrix_of(name, getattr(experts, name), float_type),
        None if array is None else finite_cast(f"{name}_bias", array, float_type),
    )


def _check_shape(name: str, part: Linear, shape: tuple[int, ...]) -> None:
    if part.weight.shape != shape:
        raise FormatError(
            f"{name} must be {{expert, out, in}} = {list(shape)}, got {list(part.weight.shape)}"
        )
    if part.bias is not None and part.bias.shape != shape[:2]:
        raise FormatError(
            f"{name}_bias must be {{expert, out}} = {list(shape[:2])}, got {list(part.bias.shape)}"
        )


def _is_mxfp4(experts: Any, name: str) -> bool:
    return isinstance(getattr(experts, name), BlockScaled | TiledMXFP4)


def _split(fused: Linear, layout: Layout) -> tuple[Linear, Linear]:
    gate, up = lane_positions(layout, fused.weight.shape[1])
    return fused.rows(gate), fused.rows(up)


def _fuse(gate: Linear, up: Linear, layout: Layout) -> Linear:
    both = gate.join(up)
    order = np.concatenate(lane_positions(layout, both.weight.shape[1]))
    return both.rows(np.argsort(order))


def _complete_biases(matrices: ExpertMatrices) -> ExpertMatrices:
    """All linear layers with biases, zero where one is missing, if any has one."""
    layers = {"fc1": matrices.fc1, "fc2": matrices.fc2, "fc3": matrices.fc3}
    layers = {name: layer for name, layer in layers.items() if layer is not None}
    given = [layer.bias for layer in layers.values() if layer.bias is not None]
    if not given:
        return matrices
    complete = {
        name: Linear(layer.weight, np.zeros(layer.weight.shape[:2], given[0].dtype))
        for name, layer in layers.items()
        if layer.bias is None
    }
    return dataclasses.replace(matrices, **complete)
