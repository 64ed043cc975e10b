"""An object with the setters and properties of `IMoELayer`, which computes what it is set to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.experts.layers import GatedMLP
from moe_jax.experts.quantized import QuantizedGatedMLP
from moe_jax.formats.errors import FormatError
from moe_jax.formats.tensorrt.settings import (
    DataType,
    Method,
    MoEActType,
    Quantization,
    Swiglu,
    as_scale,
)
from moe_jax.mixture_of_experts import AlgorithmChoice, fused_experts
from moe_jax.sharding.mesh import Sharding
from moe_jax.tagged import Tagged, is_tagged

_WEIGHTS = ("fc_gate_weights", "fc_up_weights", "fc_down_weights")
_BIASES = ("fc_gate_biases", "fc_up_biases", "fc_down_biases")


class MoELayer:
    """Experts of three matrices; for each token `sum(score * fcDown(fcUp(x) * act(fcGate(x))))`.

    Names, defaults and order of arguments are those of TensorRT's Python API. Setters check what
    one argument says; whether all fit together is checked where they are used, so that they may be
    set in any order. FormatError names the attribute that does not fit. A function that `jax.jit`
    compiles keeps the settings of that moment; so that they are not overlooked, the layer itself
    has no hash, and `jax.jit` refuses it.

    Attributes:
        activation_type: `MoEActType`, of the gate.
        num_ranks: over how many devices the experts are spread.
        swiglu: the parameters of SwiGLU; `swiglu_param_limit`, `_alpha` and `_beta` are its parts.
        quantization: how the rows that go into fcDown are quantised; `quantization_to_type`,
            `quantization_block_shape` and `dyn_q_output_scale_type` are parts of it.
        weights: fcGate, fcUp, fcDown {expert, in, out}; None until they are set.
        biases: of fcGate, fcUp, fcDown {expert, out}; None for none.
    """

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        self.activation_type = MoEActType.SILU
        self.swiglu = Swiglu()
        self.quantization = Quantization()
        self.weights: tuple[Tagged, Tagged, Tagged] | None = None
        self.biases: tuple[Tagged, Tagged, Tagged] | None = None
        self.num_ranks = 1

    def set_gated_weights(
        self,
        fc_gate_weights: Any,
        fc_up_weights: Any,
        fc_down_weights: Any,
        activation_type: MoEActType,
    ) -> None:
        """Sets the matrices: bare [E, H, I], [E, H, I], [E, I, H], or `Tagged` {expert, in, out}.

        Raises:
            FormatError: one has other axes, or `activation_type` is no `MoEActType`.
            TypeError: one is not of floats.
        """
        given = (fc_gate_weights, fc_up_weights, fc_down_weights)
        gate, up, down = (
            _named(name, array, "expert", "in", "out")
            for name, array in zip(_WEIGHTS, given, strict=True)
        )
        self.activation_type = activation_type
        self.weights = gate, up, down

    def set_gated_biases(self, fc_gate_biases: Any, fc_up_biases: Any, fc_down_biases: Any) -> None:
        """Sets all three biases: bare [E, I], [E, I], [E, H], or `Tagged` {expert, out}.

        Raises:
            FormatError: one is missing or has other axes.
            TypeError: one is not of floats.
        """
        given = (fc_gate_biases, fc_up_biases, fc_down_biases)
        missing = [name for name, bias in zip(_BIASES, given, strict=True) if bias is None]
        if missing:
            raise FormatError(f"TensorRT wants all biases or none, {', '.join(missing)} is None")
        gate, up, down = (
            _named(name, array, "expert", "out") for name, array in zip(_BIASES, given, strict=True)
        )
        self.biases = gate, up, down

    def set_swiglu_params(self, limit: float, alpha: float, beta: float) -> None:
        """Sets the three parameters of SwiGLU, in TensorRT's order; see `Swiglu`.

        Raises:
            FormatError: `limit` is not positive, or `alpha` or `beta` not finite.
        """
        self.swiglu = Swiglu(float(limit), float(alpha), float(beta))

    def set_quantization_static(self, fc_down_activation_scale: Any, data_type: DataType) -> None:
        """Quantises the rows that go into fcDown with scales [] or [E] that are known beforehand.

        Takes the place of dynamic quantisation, if that was set.

        Raises:
            FormatError: the scales have another shape or are not positive, or `data_type` is no
                `DataType`.
            TypeError: the scales are not floats.
        """
        self._quantize(
            method=Method.STATIC,
            scale=as_scale("fc_down_activation_scale", fc_down_activation_scale),
            to_type=_member("data_type", data_type, DataType),
        )

    def set_quantization_dynamic_dbl_q(
        self,
        fc_down_activation_dbl_q_scale: Any,
        data_type: DataType,
        block_shape: tuple[int, ...],
        dyn_q_output_scale_type: DataType,
    ) -> None:
        """Quantises those rows in blocks, with scales that are quantised in turn.

        Takes the place of static quantisation, if that was set. The documentation gives no shape
        for the second scale; [] and [E] are taken, as for the static one.

        Raises:
            FormatError, TypeError: as `set_quantization_static`.
        """
        name = "fc_down_activation_dbl_q_scale"
        self._quantize(
            method=Method.DYNAMIC,
            scale=as_scale(name, fc_down_activation_dbl_q_scale),
            to_type=_member("data_type", data_type, DataType),
            block_shape=tuple(block_shape),
            scale_type=_member("dyn_q_output_scale_type", dyn_q_output_scale_type, DataType),
        )

    @property
    def activation_type(self) -> MoEActType:
        return self._activation_type

    @activation_type.setter
    def activation_type(self, value: MoEActType) -> None:
        self._activation_type = _member("activation_type", value, MoEActType)

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @num_ranks.setter
    def num_ranks(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"num_ranks must be a positive integer, got {value!r}")
        self._num_ranks = value

    @property
    def quantization_to_type(self) -> DataType:
        return self.quantization.to_type

    @quantization_to_type.setter
    def quantization_to_type(self, value: DataType) -> None:
        self._quantize(to_type=_member("quantization_to_type", value, DataType))

    @property
    def quantization_block_shape(self) -> tuple[int, ...]:
        return self.quantization.block_shape

    @quantization_block_shape.setter
    def quantization_block_shape(self, value: tuple[int, ...]) -> None:
        self._quantize(block_shape=tuple(value))

    @property
    def dyn_q_output_scale_type(self) -> DataType:
        return self.quantization.scale_type

    @dyn_q_output_scale_type.setter
    def dyn_q_output_scale_type(self, value: DataType) -> None:
        self._quantize(scale_type=_member("dyn_q_output_scale_type", value, DataType))

    @property
    def swiglu_param_limit(self) -> float:
        return self.swiglu.limit

    @swiglu_param_limit.setter
    def swiglu_param_limit(self, value: float) -> None:
        self.swiglu = dataclasses.replace(self.swiglu, limit=float(value))

    @property
    def swiglu_param_alpha(self) -> float:
        return self.swiglu.alpha

    @swiglu_param_alpha.setter
    def swiglu_param_alpha(self, value: float) -> None:
        self.swiglu = dataclasses.replace(self.swiglu, alpha=float(value))

    @property
    def swiglu_param_beta(self) -> float:
        return self.swiglu.beta

    @swiglu_param_beta.setter
    def swiglu_param_beta(self, value: float) -> None:
        self.swiglu = dataclasses.replace(self.swiglu, beta=float(value))

    def experts(self) -> GatedMLP | QuantizedGatedMLP:
        """The experts that the layer is set to, weights {expert, out, in}.

        Raises:
            FormatError: no weights are set, shapes do not fit, or there is nothing here for the
                quantisation or the activation.
        """
        if self.weights is None:
            raise FormatError("the layer has no weights: call set_gated_weights")
        gate, up, down = (w.order("expert", "out", "in") for w in self.weights)
        num_experts, intermediate, _ = gate.shape
        _check_shapes(self.weights, self.biases)
        biases = self.biases or (None, None, None)
        layer = GatedMLP(gate, up, down, *biases, self.swiglu.activation(self.activation_type))
        quantizer = self.quantization.quantizer(num_experts, intermediate)
        return layer if quantizer is None else QuantizedGatedMLP(layer, quantizer)

    def __call__(
        self,
        hidden_states: Any,
        selected_experts_for_tokens: Any,
        scores_for_selected_experts: Any,
        *,
        algorithm: AlgorithmChoice = "auto",
        sharding: Sharding | None = None,
    ) -> jax.Array:
        """Applies the experts where routing is done already; scores are used as they are.

        An id outside the experts stands for none, where TensorRT leaves open what happens.

        Args:
            hidden_states: floats [batch, seq, hidden].
            selected_experts_for_tokens: int [batch, seq, topK].
            scores_for_selected_experts: floats [batch, seq, topK].
            algorithm: see `moe_jax.fused_experts`.
            sharding: the devices over which the experts are spread, `num_ranks` of them.

        Returns:
            [batch, seq, hidden] with the dtype of `hidden_states`.

        Raises:
            FormatError: as `experts`; an input has not three axes; `sharding` spreads the experts
                over another number of devices than `num_ranks`.
            ValueError, TypeError: as `moe_jax.fused_experts`.
        """
        inputs = {
            "hidden_states": hidden_states,
            "selected_experts_for_tokens": selected_experts_for_tokens,
            "scores_for_selected_experts": scores_for_selected_experts,
        }
        for name, array in inputs.items():
            if is_tagged(array) or jnp.ndim(array) != 3:
                shape = array if is_tagged(array) else jnp.shape(array)
                raise FormatError(f"{name} must be a bare array of three axes, got {shape}")
        devices = 1 if sharding is None else sharding.count(*sharding.axes("expert"))
        if devices != self.num_ranks:
            raise FormatError(
                f"num_ranks is {self.num_ranks}, but the experts are spread over {devices} "
                f"devices: give a `sharding` that splits axis 'expert' so"
            )
        return fused_experts(
            hidden_states,
            selected_experts_for_tokens,
            scores_for_selected_experts,
            self.experts(),
            algorithm=algorithm,
            sharding=sharding,
        )

    def _quantize(self, **changes: Any) -> None:
        self.quantization = dataclasses.replace(self.quantization, **changes)


def _member[T](name: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise FormatError(f"{name} must be a {kind.__name__}, got {value!r}")
    return value


def _named(name: str, array: Any, *axes: str) -> Tagged:
    """A weight or bias with the axes in TensorRT's order."""
    if not is_tagged(array):
        shape = jnp.shape(array)
        if len(shape) != len(axes):
            raise FormatError(f"{name} must have the axes [{', '.join(axes)}], got shape {shape}")
        array = Tagged(jnp.asarray(array), axes)
    if set(array.axes) != set(axes):
        raise FormatError(f"{name} must have the axes {{{', '.join(axes)}}}, got {array}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floats, got {array.dtype}")
    return array.order(*axes)


def _check_shapes(weights: tuple[Tagged, ...], biases: tuple[Tagged, ...] | None) -> None:
    """Raises FormatError unless all sizes follow from those of fcGate [E, H, I]."""
    experts, hidden, intermediate = weights[0].shape
    wide = (experts, intermediate)
    shapes = {
        "fc_gate_weights": (experts, hidden, intermediate),
        "fc_up_weights": (experts, hidden, intermediate),
        "fc_down_weights": (experts, intermediate, hidden),
        "fc_gate_biases": wide,
        "fc_up_biases": wide,
        "fc_down_biases": (experts, hidden),
    }
    for (name, shape), array in zip(shapes.items(), (*weights, *(biases or ())), strict=False):
        if array.shape != shape:
            raise FormatError(
                f"{name} must have the shape {shape} with fc_gate_weights of {weights[0].shape}, "
                f"got {array.shape}"
            )
