"""The expert layers that come with the library.

All weights are {expert, out, in}, floats or packed (`moe_jax.quantization.Packed`), and all
biases {expert, out}.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.activations import GPT_OSS_ACTIVATION, Activation
from moe_jax.experts.base import Expert, Rows
from moe_jax.quantization.packed import Packed
from moe_jax.tagged import Tagged

type Weight = Tagged | Packed


def _check_biases(**biases: Tagged | None) -> None:
    """Raises ValueError unless all biases are given or none."""
    missing = [name for name, bias in biases.items() if bias is None]
    if missing and len(missing) < len(biases):
        raise ValueError(
            f"expected all of {', '.join(biases)} or none, but {', '.join(missing)} is None"
        )


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity(Expert):
    """An expert that returns its rows."""

    def apply(self, x: Tagged, rows: Rows) -> Tagged:
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLP(Expert):
    """down(activation(up(x))).

    Attributes:
        up: {expert, out=intermediate, in=d}; twice as wide for a gated activation.
        down: {expert, out=d, in=intermediate}.
        up_bias: {expert, out=intermediate} or None.
        down_bias: {expert, out=d} or None.
        activation: how the rows of `up` become the columns of `down`.
    """

    up: Weight
    down: Weight
    up_bias: Tagged | None = None
    down_bias: Tagged | None = None
    activation: Activation = _static(Activation("gelu"))

    def apply(self, x: Tagged, rows: Rows) -> Tagged:
        _check_biases(up_bias=self.up_bias, down_bias=self.down_bias)
        hidden = rows.linear(x.rename(d="in"), self.up, self.up_bias)
        hidden = self.activation(hidden).rename(out="in")
        return rows.linear(hidden, self.down, self.down_bias).rename(out="d")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedMLP(Expert):
    """down(activation(gate(x)) * up(x)), with a matrix for each of the three.

    Attributes:
        gate: {expert, out=intermediate, in=d}.
        up: {expert, out=intermediate, in=d}.
        down: {expert, out=d, in=intermediate}.
        gate_bias: {expert, out=intermediate} or None.
        up_bias: {expert, out=intermediate} or None.
        down_bias: {expert, out=d} or None.
        activation: a gated activation; its layout is not used.
    """

    gate: Weight
    up: Weight
    down: Weight
    gate_bias: Tagged | None = None
    up_bias: Tagged | None = None
    down_bias: Tagged | None = None
    activation: Activation = _static(Activation("swiglu"))

    def apply(self, x: Tagged, rows: Rows) -> Tagged:
        return self.output(self.hidden(x, rows), rows)

    def hidden(self, x: Tagged, rows: Rows) -> Tagged:
        """Rows {..., d} -> {..., in=intermediate}: what goes into `down`."""
        _check_biases(gate_bias=self.gate_bias, up_bias=self.up_bias, down_bias=self.down_bias)
        x = x.rename(d="in")
        gate = rows.linear(x, self.gate, self.gate_bias)
        up = rows.linear(x, self.up, self.up_bias)
        return self.activation.combine(gate, up).rename(out="in")

    def output(self, hidden: Tagged, rows: Rows) -> Tagged:
        """Rows {..., in=intermediate} -> {..., d}."""
        return rows.linear(hidden, self.down, self.down_bias).rename(out="d")

    @classmethod
    def random(
        cls, key: jax.Array, num_experts: int, hidden_size: int, intermediate_size: int
    ) -> "GatedMLP":
        """Experts with normal weights of variance 1 / inputs, float32, without biases."""
        keys = jax.random.split(key, 3)

        def weight(key: jax.Array, outputs: int, inputs: int) -> Tagged:
            array = jax.random.normal(key, (num_experts, outputs, inputs), jnp.float32)
            return Tagged(array * inputs**-0.5, ("expert", "out", "in"))

        return cls(
            gate=weight(keys[0], intermediate_size, hidden_size),
            up=weight(keys[1], intermediate_size, hidden_size),
            down=weight(keys[2], hidden_size, intermediate_size),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GptOssMLP(Expert):
    """The expert of gpt-oss: gate and up interleaved in one matrix, clamped SwiGLU, biases.

    Attributes:
        gate_up: {expert, out=2*intermediate, in=d}; row 2j makes gate j, row 2j+1 up j.
        gate_up_bias: {expert, out=2*intermediate}.
        down: {expert, out=d, in=intermediate}.
        down_bias: {expert, out=d}.
        activation: clamped SwiGLU.
    """

    gate_up: Weight
    gate_up_bias: Tagged
    down: Weight
    down_bias: Tagged
    activation: Activation = _static(GPT_OSS_ACTIVATION)

    def apply(self, x: Tagged, rows: Rows) -> Tagged:
        hidden = rows.linear(x.rename(d="in"), self.gate_up, self.gate_up_bias)
        hidden = self.activation(hidden).rename(out="in")
        return rows.linear(hidden, self.down, self.down_bias).rename(out="d")
