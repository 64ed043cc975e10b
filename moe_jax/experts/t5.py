"""The gated feed-forward of T5 (version 1.1), with its norm and its residual, as an expert."""

import dataclasses

import jax

from moe_jax.activations import Activation
from moe_jax.experts.base import Expert, Rows
from moe_jax.norms import Norm
from moe_jax.quantization.packed import Packed
from moe_jax.tagged import Tagged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5FeedForward(Expert):
    """x + wo(activation(wi_0(norm(x))) * wi_1(norm(x))); every expert has a norm of its own.

    The names are those of T5: https://arxiv.org/abs/2002.05202 (gated), and
    https://arxiv.org/abs/1910.10683. With `Norm("rms")`, no bias and the default activation this
    is T5 itself.

    Attributes:
        norm_weight: {expert, d}.
        wi_0: {expert, out=intermediate, in=d}, floats or packed; makes the gate.
        wi_1: {expert, out=intermediate, in=d}, floats or packed.
        wo: {expert, out=d, in=intermediate}, floats or packed.
        norm_bias: {expert, d} or None.
        norm: `rms` or `layer`, and its eps.
        activation: a gated activation; its layout is not used.
    """

    norm_weight: Tagged
    wi_0: Tagged | Packed
    wi_1: Tagged | Packed
    wo: Tagged | Packed
    norm_bias: Tagged | None = None
    norm: Norm = dataclasses.field(default=Norm(), metadata={"static": True})
    activation: Activation = dataclasses.field(
        default=Activation("geglu_tanh"), metadata={"static": True}
    )

    def apply(self, x: Tagged, rows: Rows) -> Tagged:
        bias = None if self.norm_bias is None else rows.select(self.norm_bias)
        normed = self.norm(x, rows.select(self.norm_weight), bias).rename(d="in")
        gate, up = rows.linear(normed, self.wi_0), rows.linear(normed, self.wi_1)
        hidden = self.activation.combine(gate, up).rename(out="in")
        return x + rows.linear(hidden, self.wo).rename(out="d")
