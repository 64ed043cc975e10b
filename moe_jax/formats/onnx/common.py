"""What the writers and readers of MoE nodes share: named arrays of layers, and files of layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import FunctionProto, ModelProto

from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import Layers, as_layers
from moe_jax.formats.onnx.writer import Writer
from moe_jax.layer import MoE
from moe_jax.quantization.packed import is_packed
from moe_jax.tagged import Tagged
from moe_jax.variables import value

type AddLayer = Callable[[Writer, MoE, str, str], str]
"""Adds the nodes of a layer to a graph: (writer, layer, x, name) -> the name of the result."""

FLOATS = ("float32", "float16", "bfloat16")
"""The dtypes of weights that these files hold."""

WEIGHT_AXES = ("expert", "in", "out")
"""How the weights of experts lie in these files: as MatMul multiplies them from the right."""


def array_of(
    name: str, tagged: Any, axes: Sequence[str], sizes: Mapping[str, int], dtypes: Sequence[str]
) -> np.ndarray:
    """A layer's array with its axes in the stated order.

    Raises:
        FormatError: it is packed, or has other axes, sizes other than in `sizes`, or a dtype not in
            `dtypes`.
    """
    if is_packed(tagged):
        raise FormatError(
            f"{name} is {type(tagged).__name__}: this format has no such packed weights, "
            f"dequantize it"
        )
    if not isinstance(tagged, Tagged) or set(tagged.axes) != set(axes):
        raise FormatError(f"{name} must have the axes {set(axes)}, got {tagged}")
    wrong = {axis: size for axis, size in sizes.items() if tagged.sizes.get(axis, size) != size}
    if wrong:
        raise FormatError(f"{name} must have {wrong}, got {tagged}")
    if str(tagged.dtype) not in dtypes:
        raise FormatError(
            f"{name} is {tagged.dtype}, and this format holds {' or '.join(dtypes)}: convert it"
        )
    return np.asarray(tagged.untag(*axes))


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises FormatError where a router's array holds infinity or NaN."""
    if not np.isfinite(array.astype(np.float32)).all():
        raise FormatError(
            f"{name} is not finite: experts that are barred cannot be said, leave them out"
        )


def weight_of(array: np.ndarray) -> Tagged:
    """[E, in, out] as {expert, out, in}, the order that the library's own weights have."""
    return Tagged(jnp.asarray(array.swapaxes(1, 2)), ("expert", "out", "in"))


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
