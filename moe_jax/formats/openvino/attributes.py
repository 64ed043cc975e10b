"""The attributes of OpenVINO's internal operation `MOE`, and what they mean here.

OpenVINO's `expert_alpha` and `expert_beta` are not the library's `alpha` and `beta`. Worse, they
have changed places: in present releases `expert_alpha` is the clamp and `expert_beta` the slope
inside the sigmoid, in earlier revisions of the operation it is the other way round, with nothing
in the attributes to tell which. So `order` has no default.

Source: `openvino/op/moe.hpp` and the page of the internal operation MOE, of which both orders exist
(openvinotoolkit/openvino, pull request 32255 and what followed it).
"""

import dataclasses
import warnings
from typing import Literal

from moe_jax.activations import Activation, Kind, Layout
from moe_jax.formats.errors import FormatError

type ExpertType = Literal["GEMM2_BIAS_SWIGLU_CLAMP", "GEMM3_SWIGLU"]
type ActivationType = Literal["swiglu", "geglu_tanh", "geglu_erf"]
type AttributeOrder = Literal["alpha_is_limit", "alpha_is_slope"]

INPUT_NAMES: dict[str, tuple[str, ...]] = {
    "GEMM2_BIAS_SWIGLU_CLAMP": ("weight_0", "bias_0", "weight_1", "bias_1"),
    "GEMM3_SWIGLU": ("weight_0", "weight_1", "weight_2"),
}
"""The operation's inputs from the fourth on; the first three are those of `ROUTING_INPUTS`."""

ROUTING_INPUTS = ("hidden_states", "routing_weights", "router_topk_output_indices")

UP_OFFSET = 1.0
"""What GEMM2_BIAS_SWIGLU_CLAMP adds to the linear lane. No attribute changes it."""

_ORDERS = ("alpha_is_limit", "alpha_is_slope")
_DEFAULT_LIMIT, _DEFAULT_SLOPE = 0.0, 1.0

LANES: tuple[Layout, Layout] = ("interleaved", "interleaved_up_first")
"""The layout of the matrix that makes both lanes, by `gate_idx`."""

KINDS: dict[ActivationType, Kind] = {
    "swiglu": "swiglu",
    "geglu_tanh": "geglu_tanh",
    "geglu_erf": "geglu",
}
"""The library's kind of activation by `activation_type`."""

GELU_MODES: dict[ActivationType, str] = {"geglu_erf": "ERF", "geglu_tanh": "TANH"}
"""`approximation_mode` of the operation Gelu by `activation_type`."""

_ACTIVATION_TYPES: dict[Kind, ActivationType] = {kind: name for name, kind in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class MoeAttributes:
    """Attributes of `MOE` as they stand in a file of OpenVINO.

    Attributes:
        expert_type: `GEMM2_BIAS_SWIGLU_CLAMP`: gate and linear lane interleaved in one matrix,
            biases, both lanes clamped, 1 added to the linear lane. `GEMM3_SWIGLU`: a matrix for
            each, neither biases nor clamp.
        order: which of the next two is the clamp (`limit`) and which the slope inside the sigmoid.
        expert_alpha: None for its default: 0 as a limit, 1 as a slope.
        expert_beta: None for its default: 1 as a slope, 0 as a limit.
        gate_idx: lane that goes through the sigmoid: 0 the even rows, 1 the odd rows. Two matrices
            only. Revisions without this attribute take the odd rows.
        activation_type: `swiglu`, or for three matrices `geglu_tanh` or `geglu_erf`.

    Raises:
        FormatError: a value is unknown, or does not go with `expert_type`.
    """

    expert_type: ExpertType
    order: AttributeOrder
    expert_alpha: float | None = None
    expert_beta: float | None = None
    gate_idx: int = 0
    activation_type: ActivationType = "swiglu"

    def __post_init__(self) -> None:
        _check_choice("expert_type", self.expert_type, tuple(INPUT_NAMES))
        _check_choice("order", self.order, _ORDERS)
        _check_choice("gate_idx", self.gate_idx, (0, 1))
        _check_choice("activation_type", self.activation_type, tuple(KINDS))
        if self.two_matrices and self.activation_type != "swiglu":
            raise FormatError(
                f"activation_type={self.activation_type!r} needs GEMM3_SWIGLU: "
                f"GEMM2_BIAS_SWIGLU_CLAMP knows swiglu alone"
            )
        if not self.two_matrices and self.gate_idx:
            raise FormatError(
                f"gate_idx={self.gate_idx} is for GEMM2_BIAS_SWIGLU_CLAMP: "
                f"GEMM3_SWIGLU has a matrix for each lane"
            )

    @property
    def two_matrices(self) -> bool:
        """Whether gate and linear lane lie in one matrix: GEMM2_BIAS_SWIGLU_CLAMP."""
        return self.expert_type == "GEMM2_BIAS_SWIGLU_CLAMP"

    @property
    def limit(self) -> float:
        """The clamp, by whatever name."""
        value = self._ordered()[0]
        return _DEFAULT_LIMIT if value is None else value

    @property
    def slope(self) -> float:
        """The slope inside the sigmoid, by whatever name."""
        value = self._ordered()[1]
        return _DEFAULT_SLOPE if value is None else value

    @property
    def activation(self) -> Activation:
        """The library's activation.

        Warns (UserWarning) where limit and slope look exchanged: where the slope is 0, which makes
        a swiglu linear, or where it is more than the clamp.

        Raises:
            FormatError: the limit is not positive.
        """
        kind = KINDS[self.activation_type]
        if self._looks_exchanged():
            warnings.warn(
                f"expert_alpha={self.expert_alpha} and expert_beta={self.expert_beta} look "
                f"exchanged: with order={self.order!r} the clamp is {self.limit} and the slope "
                f"{self.slope}. Give the other order if the file is of another revision",
                stacklevel=2,
            )
        if not self.two_matrices:
            return Activation(kind, alpha=self.slope if kind == "swiglu" else 1.0)
        if not self.limit > 0:
            raise FormatError(
                f"the clamp of GEMM2_BIAS_SWIGLU_CLAMP must be positive, got {self.limit}: "
                f"with order={self.order!r} that is {self._limit_name()}"
            )
        return Activation(
            kind,
            alpha=self.slope,
            beta=UP_OFFSET,
            limit=self.limit,
            layout=LANES[self.gate_idx],
        )

    def _looks_exchanged(self) -> bool:
        if self.activation_type != "swiglu":
            return False
        return self.slope == 0 or self.two_matrices and self.slope > self.limit > 0

    def _limit_name(self) -> str:
        return "expert_alpha" if self.order == "alpha_is_limit" else "expert_beta"

    def _ordered(self) -> tuple[float | None, float | None]:
        """Limit and slope."""
        return _ordered(self.order, self.expert_alpha, self.expert_beta)


def clamped_attributes(activation: Activation, order: AttributeOrder) -> MoeAttributes:
    """GEMM2_BIAS_SWIGLU_CLAMP with this activation, whose layout must be an interleaved one.

    Raises:
        FormatError: the operation cannot say it; names the field of `Activation`.
    """
    if activation.kind != "swiglu":
        raise FormatError(
            f"activation.kind={activation.kind!r}: GEMM2_BIAS_SWIGLU_CLAMP knows swiglu alone. "
            f"GatedMLP without biases can be exported with geglu and geglu_tanh"
        )
    if activation.beta != UP_OFFSET:
        raise FormatError(
            f"activation.beta={activation.beta}: GEMM2_BIAS_SWIGLU_CLAMP always adds {UP_OFFSET} "
            f"to the linear lane"
        )
    if activation.limit is None or activation.limit == float("inf"):
        raise FormatError(
            f"activation.limit={activation.limit}: GEMM2_BIAS_SWIGLU_CLAMP always clamps; give a "
            f"limit beyond all values"
        )
    if activation.layout not in LANES:
        raise FormatError(
            f"activation.layout={activation.layout!r}: GEMM2_BIAS_SWIGLU_CLAMP knows "
            f"{' and '.join(LANES)}"
        )
    alpha, beta = _ordered(order, activation.limit, activation.alpha)
    gate_idx = LANES.index(activation.layout)
    return MoeAttributes("GEMM2_BIAS_SWIGLU_CLAMP", order, alpha, beta, gate_idx)


def plain_attributes(activation: Activation, order: AttributeOrder) -> MoeAttributes:
    """GEMM3_SWIGLU with this activation; its layout is not looked at.

    Raises:
        FormatError: the operation cannot say it; names the field of `Activation`.
    """
    if activation.kind not in _ACTIVATION_TYPES:
        raise FormatError(
            f"activation.kind={activation.kind!r}: GEMM3_SWIGLU knows {tuple(_ACTIVATION_TYPES)}"
        )
    if activation.beta != 0.0 or activation.limit is not None:
        raise FormatError(
            f"activation.beta={activation.beta}, activation.limit={activation.limit}: GEMM3_SWIGLU "
            f"neither adds to the linear lane nor clamps. GptOssMLP can be exported with both"
        )
    alpha, beta = _ordered(order, _DEFAULT_LIMIT, activation.alpha)
    return MoeAttributes(
        "GEMM3_SWIGLU",
        order,
        alpha,
        beta,
        activation_type=_ACTIVATION_TYPES[activation.kind],
    )


def _ordered[T](order: str, first: T, second: T) -> tuple[T, T]:
    """From (alpha, beta) to (limit, slope), or back."""
    return (first, second) if order == "alpha_is_limit" else (second, first)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise FormatError(f"{name} must be one of {choices}, got {value!r}")
