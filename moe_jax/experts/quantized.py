"""Experts that round what goes between their matrices to a number format.

How is data: a quantiser, a pytree whose arrays have an `expert` axis as those of the expert, with
a method that rounds rows. Gradients pass straight through.
"""

import dataclasses
from typing import Protocol

import jax

from moe_jax.experts.base import Expert, Rows
from moe_jax.experts.layers import GatedMLP
from moe_jax.quantization.fp8 import fake_quantize_fp8
from moe_jax.quantization.nvfp4 import fake_quantize_nvfp4
from moe_jax.tagged import Tagged


class Quantizer(Protocol):
    """Rounds rows to what a number format can hold."""

    def quantize(self, hidden: Tagged, rows: Rows) -> Tagged:
        """Rows {..., in} -> the same, rounded, in their dtype."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StaticFP8:
    """FP8 (e4m3fn) with a scale that is known beforehand; see `fake_quantize_fp8`.

    Attributes:
        scale: floats {expert}, positive.
    """

    scale: Tagged

    def quantize(self, hidden: Tagged, rows: Rows) -> Tagged:
        return fake_quantize_fp8(hidden, rows.select(self.scale))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicNVFP4:
    """NVFP4 in blocks of 16 along `in`, whose scales follow the rows; see `fake_quantize_nvfp4`.

    Attributes:
        global_scale: float32 {expert}, positive.
    """

    global_scale: Tagged

    def quantize(self, hidden: Tagged, rows: Rows) -> Tagged:
        return fake_quantize_nvfp4(hidden, "in", rows.select(self.global_scale))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedGatedMLP(Expert):
    """down(quantised(activation(gate(x)) * up(x))).

    Attributes:
        layer: the matrices, biases and activation.
        quantizer: what rounds the rows that go into `down`.
    """

    layer: GatedMLP
    quantizer: Quantizer

    def apply(self, x: Tagged, rows: Rows) -> Tagged:
        hidden = self.quantizer.quantize(self.layer.hidden(x, rows), rows)
        return self.layer.output(hidden, rows)
