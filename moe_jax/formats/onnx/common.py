"""What the writers of whole layers share: models of layers side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto

from moe_jax.formats.modules import Layers, as_layers
from moe_jax.formats.onnx.writer import Writer
from moe_jax.layer import MoE
from moe_jax.variables import value

type AddLayer = Callable[[Writer, MoE, str, str], str]
"""Adds the nodes of a layer to a graph: (writer, layer, x, name) -> the name of the result."""


def hidden_size(layer: MoE) -> int:
    """The size of the tokens that a layer takes."""
    return value(layer.router_weight).size("d")


def layers_model(
    layers: Layers,
    add: AddLayer,
    dtype: Callable[[MoE], Any],
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """A model with each layer by itself, from input `NAME.x` to output `NAME.y`.

    Both are {NAME.b, NAME.s, d}; those of a layer alone, without a name, are `x` and `y`.
    """
    prefixed = not isinstance(layers, MoE)
    writer = Writer(np.dtype(np.float32))
    for name, layer in as_layers(layers).items():
        prefix = f"{name}." if prefixed else ""
        writer.dtype = np.dtype(dtype(layer))
        shape = (f"{prefix}b", f"{prefix}s", hidden_size(layer))
        x = writer.input(f"{prefix}x", shape)
        writer.output(add(writer, layer, x, name), f"{prefix}y", shape)
    return writer.model(functions)
