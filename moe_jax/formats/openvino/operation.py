"""OpenVINO's internal operation `MOE` as data, and as the library's experts.

The operation has no router: it takes routing weights and indices, as `moe_jax.fused_experts` does.
It exists inside OpenVINO only; a file or a program cannot hold it. What OpenVINO turns into it is
a graph, see `moe_jax.formats.openvino.files`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.experts import GatedMLP, GptOssMLP
from moe_jax.experts.base import Expert
from moe_jax.formats.arrays import FLOATS, OUT_IN, numpy_of, weight_from_in_out
from moe_jax.formats.errors import FormatError
from moe_jax.formats.openvino.attributes import (
    INPUT_NAMES,
    ROUTING_INPUTS,
    AttributeOrder,
    MoeAttributes,
    clamped_attributes,
    plain_attributes,
)
from moe_jax.formats.openvino.routing import RoutingForm, from_openvino_routing
from moe_jax.mixture_of_experts import fused_experts
from moe_jax.tagged import Tagged, tag


@dataclasses.dataclass(frozen=True, eq=False)
class MoeOperation:
    """`MOE` without the inputs that change with each call.

    Attributes:
        attributes: the operation's attributes.
        parameters: its inputs from the fourth on, of one float dtype. With E experts, d the hidden
            and i the intermediate size, for GEMM2_BIAS_SWIGLU_CLAMP: [E, d, 2i], [E, 1, 2i],
            [E, i, d], [E, 1, d]. For GEMM3_SWIGLU: gate [E, d, i], up [E, d, i], down [E, i, d].

    Raises:
        FormatError: there are too few or too many of them, or their shapes do not fit.
        TypeError: they are not floats of one dtype.
    """

    attributes: MoeAttributes
    parameters: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        names = INPUT_NAMES[self.attributes.expert_type]
        if len(self.parameters) != len(names):
            raise FormatError(
                f"{self.attributes.expert_type} has {len(ROUTING_INPUTS) + len(names)} inputs: "
                f"{', '.join((*ROUTING_INPUTS, *names))}; got {len(self.parameters)} after the "
                f"first {len(ROUTING_INPUTS)}"
            )
        object.__setattr__(self, "parameters", tuple(np.asarray(p) for p in self.parameters))
        dtypes = {p.dtype for p in self.parameters}
        if len(dtypes) > 1 or not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
            raise TypeError(
                f"the inputs {', '.join(names)} must be floats of one dtype, got "
                f"{', '.join(str(p.dtype) for p in self.parameters)}"
            )
        self._check_shapes()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.parameters[0].shape[0]

    @property
    def hidden_size(self) -> int:
        """The size of the tokens that the experts take and make."""
        return self.parameters[0].shape[1]

    def __call__(
        self, hidden_states: Any, routing_weights: Any, indices: Any, *, form: RoutingForm
    ) -> Any:
        """What the operation computes, by `moe_jax.fused_experts`; not inside `jax.jit`.

        Args:
            hidden_states: [..., d], of the dtype of the weights.
            routing_weights: float, of the shape that `form` says; see `from_openvino_routing`.
            indices: int [tokens, topk] or with the token axes of `hidden_states`.
            form: how the routing weights lie.

        Returns:
            [..., d], of the dtype of `hidden_states`.

        Raises:
            FormatError: shapes do not fit, or an index is none of the experts'.
            TypeError: a dtype is wrong.
        """
        shape, dtype = np.shape(hidden_states), self.parameters[0].dtype
        if len(shape) < 2 or shape[-1] != self.hidden_size:
            raise FormatError(
                f"hidden_states must be [..., {self.hidden_size}], the size that weight_0 takes, "
                f"got {list(shape)}"
            )
        if hidden_states.dtype != dtype:
            raise TypeError(
                f"hidden_states must be {dtype} like the weights, got {hidden_states.dtype}"
            )
        ids, weights = from_openvino_routing(
            routing_weights, indices, self.num_experts, form=form, token_shape=shape[:-1]
        )
        return fused_experts(hidden_states, ids, weights, self.experts())

    def experts(self) -> GptOssMLP | GatedMLP:
        """The library's experts: `GptOssMLP` for two matrices, `GatedMLP` for three.

        Warns where the attributes look exchanged; see `MoeAttributes.activation`.
        """
        activation = self.attributes.activation
        if self.attributes.two_matrices:
            gate_up, gate_up_bias, down, down_bias = self.parameters
            return GptOssMLP(
                weight_from_in_out(gate_up),
                _bias(gate_up_bias),
                weight_from_in_out(down),
                _bias(down_bias),
                activation,
            )
        gate, up, down = (weight_from_in_out(parameter) for parameter in self.parameters)
        return GatedMLP(gate, up, down, activation=activation)

    def _check_shapes(self) -> None:
        names = INPUT_NAMES[self.attributes.expert_type]
        first = self.parameters[0]
        if first.ndim != 3:
            raise FormatError(f"weight_0 must be [experts, in, out], got {list(first.shape)}")
        num_experts, hidden, width = first.shape
        if not num_experts:
            raise FormatError(f"weight_0 holds no experts: {list(first.shape)}")
        if self.attributes.two_matrices:
            if width % 2:
                raise FormatError(f"weight_0 must have an even width, two lanes, got {width}")
            expected = [
                (num_experts, hidden, width),
                (num_experts, 1, width),
                (num_experts, width // 2, hidden),
                (num_experts, 1, hidden),
            ]
        else:
            expected = [(num_experts, hidden, width)] * 2 + [(num_experts, width, hidden)]
        for name, parameter, shape in zip(names, self.parameters, expected, strict=True):
            if parameter.shape != shape:
                raise FormatError(
                    f"{name} must be {list(shape)} to fit weight_0 {list(first.shape)}, "
                    f"got {list(parameter.shape)}"
                )


def from_inputs(attributes: MoeAttributes, inputs: Sequence[Any]) -> MoeOperation:
    """The operation from all of its inputs, in OpenVINO's order.

    The first three are those of each call: they are not looked at, and may be None.

    Raises:
        FormatError, TypeError: as `MoeOperation`.
    """
    return MoeOperation(attributes, tuple(inputs[len(ROUTING_INPUTS) :]))


def from_experts(experts: Expert, *, order: AttributeOrder) -> MoeOperation:
    """The operation that computes what these experts do.

    A `GptOssMLP` whose lanes lie in halves (`concatenated`) is written with its rows interleaved,
    and is read back so.

    Args:
        experts: `GptOssMLP` or `GatedMLP` without biases, of float weights.
        order: which revision's order of expert_alpha and expert_beta to write.

    Raises:
        FormatError: the operation cannot say it; names the field.
    """
    if type(experts) is GptOssMLP:
        names = ("gate_up", "gate_up_bias", "down", "down_bias")
        experts = _interleaved(experts)
        attributes = clamped_attributes(experts.activation, order)
    else:
        names = ("gate", "up", "down")
        experts = _checked_gated(experts)
        attributes = plain_attributes(experts.activation, order)
    parts = {name: _stored(name, getattr(experts, name)) for name in names}
    dtypes = {name: str(array.dtype) for name, array in parts.items()}
    if len(set(dtypes.values())) > 1:
        raise FormatError(f"the weights must have one dtype, got {dtypes}: cast them")
    return MoeOperation(attributes, tuple(parts.values()))


def _interleaved(experts: GptOssMLP) -> GptOssMLP:
    """The same experts with gate and linear rows in turn, gate first or second as they lie.

    Raises:
        FormatError: `gate_up` is packed, not of floats, or its rows are odd in number.
    """
    activation = experts.activation
    if not activation.layout.startswith("concatenated"):
        return experts
    gate_up = tag(numpy_of("gate_up", experts.gate_up, OUT_IN, dtypes=FLOATS), *OUT_IN)
    bias_axes = "expert", "out"
    bias = numpy_of("gate_up_bias", experts.gate_up_bias, bias_axes, dtypes=FLOATS)
    rows = gate_up.size("out")
    if rows % 2:
        raise FormatError(f"gate_up must have an even number of rows, got {rows}")
    in_turn = dataclasses.replace(
        activation,
        layout="interleaved" if activation.layout == "concatenated" else "interleaved_up_first",
    )
    return dataclasses.replace(
        experts,
        gate_up=in_turn.join_lanes(*activation.lanes(gate_up)),
        gate_up_bias=in_turn.join_lanes(*activation.lanes(tag(bias, *bias_axes))),
        activation=in_turn,
    )


def _checked_gated(experts: Expert) -> GatedMLP:
    """`GatedMLP` without biases; raises FormatError for anything else."""
    if type(experts) is not GatedMLP:
        raise FormatError(
            f"experts={type(experts).__name__}: OpenVINO knows GptOssMLP (two matrices, biases, "
            f"clamp) and GatedMLP (three matrices)"
        )
    for name in ("gate_bias", "up_bias", "down_bias"):
        if getattr(experts, name) is not None:
            raise FormatError(
                f"{name} is given: GEMM3_SWIGLU has no biases. Leave out all three, or interleave "
                f"gate and up in a GptOssMLP, which has them"
            )
    return experts


def _stored(name: str, value: Any) -> np.ndarray:
    """A weight {expert, out, in} as [E, in, out] (a view), a bias {expert, out} as [E, 1, out]."""
    if name.endswith("_bias"):
        return numpy_of(name, value, ("expert", "out"), dtypes=FLOATS)[:, None]
    return numpy_of(name, value, OUT_IN, dtypes=FLOATS).swapaxes(1, 2)


def _bias(array: np.ndarray) -> Tagged:
    """[E, 1, out] as {expert, out}."""
    return tag(array[:, 0], "expert", "out")
