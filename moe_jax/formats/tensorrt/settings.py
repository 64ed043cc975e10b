"""The settings of the layer that are not weights, and what experts they make."""

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_jax.activations import Activation
from moe_jax.experts.quantized import DynamicNVFP4, Quantizer, StaticFP8
from moe_jax.formats.errors import FormatError
from moe_jax.quantization.nvfp4 import NVFP4_BLOCK_SIZE
from moe_jax.tagged import Tagged, is_tagged


class MoEActType(enum.Enum):
    """What becomes of the gate: `out = fcDown(fcUp(x) * act(fcGate(x)))`."""

    NONE = 0
    SILU = 1


class DataType(enum.Enum):
    """The types that TensorRT names in quantisation; `FLOAT` stands for no quantisation."""

    FLOAT = 0
    HALF = 1
    BF16 = 2
    FP8 = 3
    FP4 = 4
    E8M0 = 5


@dataclasses.dataclass(frozen=True)
class Swiglu:
    """The parameters of SwiGLU, named as in TensorRT.

    Attributes:
        limit: clamp of the gate from above and of the linear lane on both sides; inf for none.
        alpha: slope inside the sigmoid.
        beta: added to the linear lane.
    """

    limit: float = math.inf
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise FormatError(f"swiglu_param_limit must be positive, got {self.limit}")
        for name in ("alpha", "beta"):
            if not math.isfinite(getattr(self, name)):
                raise FormatError(f"swiglu_param_{name} must be finite, got {getattr(self, name)}")

    def activation(self, kind: MoEActType) -> Activation:
        """The activation that TensorRT's settings mean.

        Raises:
            FormatError: parameters are set where there is no SiLU.
        """
        if kind is MoEActType.SILU:
            limit = None if math.isinf(self.limit) else self.limit
            return Activation("swiglu", alpha=self.alpha, beta=self.beta, limit=limit)
        if self != Swiglu():
            raise FormatError(
                f"activation_type {kind.name} has no parameters of SwiGLU, got {self}: leave "
                f"swiglu_param_limit, swiglu_param_alpha and swiglu_param_beta as they are"
            )
        return Activation("bilinear")

    @classmethod
    def of(cls, activation: Activation) -> "tuple[MoEActType, Swiglu]":
        """The settings that mean an activation. Raises FormatError where there are none."""
        if activation.kind == "swiglu":
            limit = math.inf if activation.limit is None else activation.limit
            return MoEActType.SILU, cls(limit, activation.alpha, activation.beta)
        if activation.kind == "bilinear" and activation.beta == 0 and activation.limit is None:
            return MoEActType.NONE, cls()
        raise FormatError(
            f"activation_type cannot say {activation}: TensorRT has SILU ('swiglu', with alpha, "
            f"beta and limit) and NONE ('bilinear', without)"
        )


class Method(enum.Enum):
    """Which of the two setters of quantisation was called last."""

    NONE = "set_quantization_static or set_quantization_dynamic_dbl_q"
    STATIC = "set_quantization_static"
    DYNAMIC = "set_quantization_dynamic_dbl_q"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the rows that go into fcDown are quantised and dequantised.

    Attributes:
        method: where the scale comes from.
        scale: floats [] or {expert}: of the rows, or the second one of double quantisation.
        to_type: the type of the rows; `FLOAT` for none.
        block_shape: block over [batch, seq, intermediate], -1 for the whole; dynamic only.
        scale_type: the type of the block scales; dynamic only.
    """

    method: Method = Method.NONE
    scale: Tagged | None = None
    to_type: DataType = DataType.FLOAT
    block_shape: tuple[int, ...] = ()
    scale_type: DataType = DataType.FLOAT

    def quantizer(self, num_experts: int, intermediate_size: int) -> Quantizer | None:
        """The quantiser of experts. Raises FormatError for what there is none for."""
        if self.to_type is DataType.FLOAT:
            return None
        if self.scale is None:
            raise FormatError(
                f"quantization_to_type {self.to_type.name} needs a scale: call {self.method.value}"
            )
        scale = _per_expert(self.scale, num_experts)
        if self.method is Method.STATIC:
            if self.to_type is not DataType.FP8:
                raise FormatError(
                    f"quantization_to_type of static quantisation must be FP8, "
                    f"got {self.to_type.name}"
                )
            return StaticFP8(scale)
        self._check_dynamic(intermediate_size)
        return DynamicNVFP4(scale.astype(jnp.float32))

    def _check_dynamic(self, intermediate_size: int) -> None:
        if (self.to_type, self.scale_type) != (DataType.FP4, DataType.FP8):
            raise FormatError(
                f"dynamic double quantisation is NVFP4: quantization_to_type FP4 and "
                f"dyn_q_output_scale_type FP8, got {self.to_type.name} and {self.scale_type.name}"
            )
        shape = self.block_shape
        is_one_block = shape == (1, 1, -1) and intermediate_size == NVFP4_BLOCK_SIZE
        if shape != (1, 1, NVFP4_BLOCK_SIZE) and not is_one_block:
            raise FormatError(
                f"quantization_block_shape must be (1, 1, {NVFP4_BLOCK_SIZE}), blocks of one "
                f"token, got {shape}"
            )
        if intermediate_size % NVFP4_BLOCK_SIZE:
            raise FormatError(
                f"quantization_block_shape {shape} does not divide the intermediate size "
                f"{intermediate_size}"
            )

    @classmethod
    def of(cls, quantizer: Quantizer) -> "Quantization":
        """The settings that mean a quantiser. Raises FormatError where there are none."""
        if isinstance(quantizer, StaticFP8):
            return cls(Method.STATIC, as_scale("scale", quantizer.scale), DataType.FP8)
        if isinstance(quantizer, DynamicNVFP4):
            scale = as_scale("global_scale", quantizer.global_scale)
            shape = (1, 1, NVFP4_BLOCK_SIZE)
            return cls(Method.DYNAMIC, scale, DataType.FP4, shape, DataType.FP8)
        raise FormatError(
            f"quantization_to_type cannot say {type(quantizer).__name__}: TensorRT has StaticFP8 "
            f"and DynamicNVFP4"
        )


def as_scale(name: str, scale: Any) -> Tagged:
    """A scale, bare [] or [E] or `Tagged`, as {} or {expert}.

    Raises:
        FormatError: it has another shape or axes, or numbers that are not positive and finite.
        TypeError: it is not of floats.
    """
    if not is_tagged(scale):
        scale = jnp.asarray(scale)
        if scale.ndim > 1:
            raise FormatError(f"{name} must have the shape [] or [experts], got {scale.shape}")
        scale = Tagged(scale, ("expert",) * scale.ndim)
    if scale.axes not in ((), ("expert",)):
        raise FormatError(f"{name} must have no axis or {{expert}}, got {scale}")
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"{name} must be floats, got {scale.dtype}")
    if not isinstance(scale.array, Tracer | jax.ShapeDtypeStruct):
        values = np.asarray(scale.array).astype(np.float64)
        if not (np.isfinite(values) & (values > 0)).all():
            raise FormatError(f"{name} must be positive and finite, got {values}")
    return scale


def _per_expert(scale: Tagged, num_experts: int) -> Tagged:
    """{expert}, the same for all where there is one."""
    if not scale.axes:
        return Tagged(jnp.broadcast_to(scale.array, (num_experts,)), ("expert",))
    if scale.size("expert") != num_experts:
        raise FormatError(f"the scale {scale} of quantisation is not one for {num_experts} experts")
    return scale
