"""What to call in TensorRT to make the layer, as data.

TensorRT cannot be run where this library is tested: the calls follow its documentation. `recipe`
lists them with their arguments, and `replay` makes them, on TensorRT's objects or on any that have
the same methods.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.formats.errors import FormatError
from moe_jax.formats.tensorrt.layer import MoELayer
from moe_jax.formats.tensorrt.settings import DataType, Method, Swiglu, as_scale
from moe_jax.quantization.nvfp4 import NVFP4_BLOCK_SIZE

_LAST_AXIS = 2  # of the hidden states


class Result(NamedTuple):
    """What an earlier call returned, or what was given to `replay`, by its name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """`result = target.method(*arguments)`.

    Attributes:
        target: what the method is called on.
        method: its name in TensorRT's Python API.
        arguments: arrays, numbers, tuples, `MoEActType`, `DataType`, and results of other calls.
        result: the name by which later calls know what it returns.
    """

    target: Result
    method: str
    arguments: tuple[Any, ...]
    result: Result


class _Calls:
    """Collects calls and names their results."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def add(self, target: Result, method: str, *arguments: Any, result: str = "") -> Result:
        name = Result(result or f"{method}_{len(self.calls)}")
        self.calls.append(Call(target, method, arguments, name))
        return name

    def output(self, layer: Result, index: int = 0) -> Result:
        return self.add(layer, "get_output", index, result=f"{layer.name}_output_{index}")

    def constant(self, name: str, value: Any) -> Result:
        array = np.asarray(value)
        layer = self.add(NETWORK, "add_constant", array.shape, array, result=name)
        return self.output(layer)


NETWORK = Result("network")
"""TensorRT's `INetworkDefinition`."""

INPUTS = tuple(
    Result(name)
    for name in ("hidden_states", "selected_experts_for_tokens", "scores_for_selected_experts")
)
"""The tensors that the layer is applied to."""


def recipe(layer: MoELayer, hidden_states_scale: Any = None) -> tuple[Call, ...]:
    """The calls that make the layer in a TensorRT network; `moe_output` is its result.

    Args:
        layer: the layer, all of whose settings fit together.
        hidden_states_scale: floats []: quantises what goes into the layer by the method of the
            layer, which is to be done outside of it. None for a layer without quantisation, or
            where the hidden states are quantised elsewhere.

    Raises:
        FormatError: as `MoELayer.experts`, or there is a scale and no quantisation.
    """
    layer.experts()
    assert layer.weights is not None  # experts() has checked it
    calls = _Calls()
    hidden_states = INPUTS[0]
    if hidden_states_scale is not None:
        hidden_states = _quantized_input(calls, layer, hidden_states_scale)
    moe = calls.add(NETWORK, "add_moe", hidden_states, *INPUTS[1:], result="moe")
    weights = _constants(calls, ("fc_gate", "fc_up", "fc_down"), "weights", layer.weights)
    calls.add(moe, "set_gated_weights", *weights, layer.activation_type)
    if layer.biases is not None:
        biases = _constants(calls, ("fc_gate", "fc_up", "fc_down"), "biases", layer.biases)
        calls.add(moe, "set_gated_biases", *biases)
    if layer.swiglu != Swiglu():
        calls.add(moe, "set_swiglu_params", *dataclasses.astuple(layer.swiglu))
    if layer.quantization_to_type is not DataType.FLOAT:
        _quantization(calls, moe, layer)
    if layer.num_ranks != 1:
        calls.add(moe, "__setattr__", "num_ranks", layer.num_ranks)
    calls.add(moe, "get_output", 0, result="moe_output")
    return tuple(calls.calls)


def replay(
    calls: Sequence[Call], given: Mapping[str, Any], convert: Callable[[Any], Any] = lambda a: a
) -> dict[str, Any]:
    """Makes the calls.

    Args:
        calls: what `recipe` returns.
        given: `network` and the three inputs, by the names in `NETWORK` and `INPUTS`.
        convert: what becomes of arrays and members of `MoEActType` and `DataType`; for TensorRT,
            `trt.Weights(array)` and `getattr(trt.DataType, member.name)`.

    Returns:
        `given` and what the calls returned, by name.
    """
    results = dict(given)

    def value(argument: Any) -> Any:
        if isinstance(argument, Result):
            return results[argument.name]
        return convert(argument) if isinstance(argument, np.ndarray | enum.Enum) else argument

    for call in calls:
        method = getattr(value(call.target), call.method)
        results[call.result.name] = method(*map(value, call.arguments))
    return results


def _constants(calls: _Calls, names: tuple[str, ...], kind: str, arrays: Any) -> list[Result]:
    return [
        calls.constant(f"{name}_{kind}", array.array)
        for name, array in zip(names, arrays, strict=True)
    ]


def _quantization(calls: _Calls, moe: Result, layer: MoELayer) -> None:
    settings = layer.quantization
    assert settings.scale is not None  # experts() has checked it
    if settings.method is Method.STATIC:
        scale = calls.constant("fc_down_activation_scale", settings.scale.array)
        calls.add(moe, settings.method.value, scale, settings.to_type)
        return
    scale = calls.constant("fc_down_activation_dbl_q_scale", settings.scale.array)
    calls.add(
        moe,
        settings.method.value,
        scale,
        settings.to_type,
        settings.block_shape,
        settings.scale_type,
    )


def _quantized_input(calls: _Calls, layer: MoELayer, scale: Any) -> Result:
    """Quantises and dequantises the hidden states by the method of the layer."""
    settings, hidden_states = layer.quantization, INPUTS[0]
    if settings.to_type is DataType.FLOAT:
        raise FormatError(
            "hidden_states_scale is for layers with quantisation, quantization_to_type is FLOAT"
        )
    scale = as_scale("hidden_states_scale", scale)
    if scale.axes:
        raise FormatError(f"hidden_states_scale must have the shape [], got {scale}")
    constant = calls.constant("hidden_states_scale", scale.array)
    if settings.method is Method.STATIC:
        q = calls.add(NETWORK, "add_quantize", hidden_states, constant, settings.to_type)
        dq = calls.add(NETWORK, "add_dequantize", calls.output(q), constant, DataType.FLOAT)
        return calls.output(dq)
    types = settings.to_type, settings.scale_type
    where = _LAST_AXIS, NVFP4_BLOCK_SIZE
    q = calls.add(NETWORK, "add_dynamic_quantize", hidden_states, *where, *types)
    calls.add(q, "set_input", 1, constant)
    blocks = calls.output(q, 1)
    scales = calls.add(NETWORK, "add_dequantize", blocks, constant, DataType.FLOAT)
    data = calls.output(q, 0)
    dq = calls.add(NETWORK, "add_dequantize", data, calls.output(scales), DataType.FLOAT)
    return calls.output(dq)
