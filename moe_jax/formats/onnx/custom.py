"""`trt.plugins::CustomMoE`: one node for a whole layer, which a TensorRT plugin computes.

    y = CustomMoE(x, router_w, w1, b1, w2, b2)

with x and y [..., D], router_w [E, D] float32, w1 [E, D, H], b1 [E, H], w2 [E, H, D], b2 [E, D]:
for each token the `top_k` best experts by x @ router_w.T, weighed by a softmax over their logits,
and each expert gelu(x @ w1 + b1) @ w2 + b2 with the gelu of erf. x, y, weights and biases are all
float32 or all float16.

The node, its attributes and the limits are those of a published Swin classifier whose feed-forward
blocks are such layers, of its exporter and of its plugin. A softmax over all experts whose chosen
weights are divided by their sum, as that model trains, gives the same weights.

Runtimes other than TensorRT do not know the operator. `custom_moe_function()` defines it in terms
of standard operators, and onnxruntime runs models that carry this definition:

    write("layer.onnx", layer, functions=[custom_moe_function()])
    read("layer.onnx")              # {"moe": MoE}
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto

from moe_jax.activations import Activation
from moe_jax.experts.layers import MLP
from moe_jax.formats.arrays import FLOATS, IN_OUT, check_finite, numpy_of, weight_from_in_out
from moe_jax.formats.errors import FormatError
from moe_jax.formats.modules import CHOSEN_SOFTMAX_ROUTERS, Layers, check_sayable, experts_of
from moe_jax.formats.onnx import graph
from moe_jax.formats.onnx.common import layers_model
from moe_jax.formats.onnx.custom_function import custom_moe_function as custom_moe_function
from moe_jax.formats.onnx.writer import Writer
from moe_jax.layer import MoE
from moe_jax.tagged import tag
from moe_jax.variables import value

DOMAIN = "trt.plugins"
OPERATOR = "CustomMoE"

MAX_EXPERTS = 128
MAX_EXPERTS_PER_TOKEN = 8

ROUTERS = CHOSEN_SOFTMAX_ROUTERS
"""The routers that the node computes."""

_DTYPES = ("float32", "float16")
_SIZES = ("top_k", "num_experts", "in_features", "hidden_features")
_ATTRIBUTES: dict[str, Any] = {
    **dict.fromkeys(_SIZES),
    "activation": "gelu",
    "plugin_version": "1",
    "plugin_namespace": "",
}


def write(
    path: str | os.PathLike[str],
    layers: Layers,
    *,
    expert_dtype: str | None = None,
    functions: Sequence[FunctionProto] = (),
    external_data: str | None = None,
) -> None:
    """Writes layers to an ONNX file; constants to a file `external_data` beside it, if named.

    The other arguments and the errors are those of `to_model`.
    """
    model = to_model(layers, expert_dtype=expert_dtype, functions=functions)
    graph.save(model, path, external_data=external_data)


def to_model(
    layers: Layers,
    *,
    expert_dtype: str | None = None,
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """A model with a node for each layer, from inputs `NAME.x` to outputs `NAME.y`.

    Args:
        layers: one layer, whose input and output are `x` and `y`, several by name, or a Flax
            model, of which the `MoE` inside are taken.
        expert_dtype: `float16` or `float32` rounds the experts' weights and biases to it; None
            keeps what they are. Inputs and outputs are of this dtype too; the router is float32.
        functions: definitions of operators that the file is to carry.

    Raises:
        FormatError: a layer is not what the node computes, or beyond the plugin's limits.
        TypeError: `layers` holds something else than `MoE`.
    """

    def add(writer: Writer, layer: MoE, x: str, name: str) -> str:
        return add_custom(writer, layer, x, name, expert_dtype=expert_dtype)

    def dtype(layer: MoE) -> str:
        return expert_dtype or str(_arrays(layer, None)["w1"].dtype)

    return layers_model(layers, add, dtype, functions)


def add_custom(
    writer: Writer, layer: MoE, x: str, name: str, *, expert_dtype: str | None = None
) -> str:
    """Adds a layer's node to a graph; returns the name of its result.

    Args:
        writer: the graph; its activations are cast where they are not of the experts' dtype.
        layer: the layer.
        x: the name of the tokens [..., D].
        name: of the node; initialisers are `NAME.router.weight`, `NAME.w1` and so on.
        expert_dtype: see `to_model`.

    Raises:
        FormatError: the layer is not what the node computes, or beyond the plugin's limits.
    """
    arrays = _arrays(layer, expert_dtype)
    num_experts, features, hidden = arrays["w1"].shape
    if num_experts > MAX_EXPERTS:
        raise FormatError(f"num_experts={num_experts}: CustomMoE takes {MAX_EXPERTS} at most")
    dtype = arrays["w1"].dtype
    names = [writer.constant(f"{name}.{key}", array) for key, array in arrays.items()]
    writer.opsets[DOMAIN] = 1
    result = f"{name}/{OPERATOR}"
    attributes = {
        **_ATTRIBUTES,
        "top_k": layer.config.experts_per_token,
        "num_experts": num_experts,
        "in_features": features,
        "hidden_features": hidden,
    }
    x = writer.cast(x, writer.dtype, dtype)
    writer.nodes.append(
        graph.node(OPERATOR, [x, *names], [result], domain=DOMAIN, name=name, **attributes)
    )
    return writer.cast(result, dtype, writer.dtype)


def read(source: str | os.PathLike[str] | ModelProto) -> dict[str, MoE]:
    """The layers of a file's CustomMoE nodes by name.

    A layer's name is that of its initialiser `NAME.w1`, or else its node's.

    Raises:
        FormatError: there is none, an attribute or array is missing, or they do not agree.
    """
    layers: dict[str, MoE] = {}
    for found in graph.find(graph.load(source), DOMAIN, OPERATOR):
        name = found.input(2).removesuffix(".w1")
        if name == found.input(2):
            name = found.node.name or found.node.output[0]
        if name in layers:
            raise FormatError(f"two {OPERATOR} nodes are named {name!r}")
        layers[name] = _layer(found)
    if not layers:
        raise FormatError(f"there is no {DOMAIN}.{OPERATOR} node")
    return layers


def _experts(layer: MoE) -> MLP:
    """The layer's experts. Raises FormatError where they are not gelu MLPs with biases."""
    experts = experts_of(layer)
    if type(experts) is not MLP:
        raise FormatError(
            f"the experts are {type(experts).__name__}: CustomMoE computes an MLP with gelu"
        )
    if experts.activation != Activation("gelu"):
        raise FormatError(
            f"activation={experts.activation}: CustomMoE computes Activation('gelu'), that of erf"
        )
    for field in ("up_bias", "down_bias"):
        if getattr(experts, field) is None:
            raise FormatError(f"{field} is None: CustomMoE takes six arrays, give it zeros")
    return experts


def _arrays(layer: MoE, expert_dtype: str | None) -> dict[str, np.ndarray]:
    """The node's constants in order, by the last part of their names."""
    check_sayable(layer, "router")
    experts, config = _experts(layer), layer.config
    if config.router not in ROUTERS:
        raise FormatError(f"router={config.router}: CustomMoE computes {ROUTERS[0]} and its equals")
    if config.experts_per_token > MAX_EXPERTS_PER_TOKEN:
        raise FormatError(
            f"experts_per_token={config.experts_per_token}: CustomMoE takes "
            f"{MAX_EXPERTS_PER_TOKEN} at most"
        )
    if expert_dtype not in (None, *_DTYPES):
        raise FormatError(f"expert_dtype must be None or one of {_DTYPES}, got {expert_dtype!r}")
    router = numpy_of("router_weight", value(layer.router_weight), ("expert", "d"), dtypes=FLOATS)
    check_finite("router_weight", router)
    num_experts, features = router.shape
    taken = _DTYPES if expert_dtype is None else FLOATS

    up = numpy_of(
        "up", experts.up, IN_OUT, sizes={"expert": num_experts, "in": features}, dtypes=taken
    )
    hidden = up.shape[2]
    sizes = {"expert": num_experts, "in": hidden, "out": features}

    def rest(field: str, axes: tuple[str, ...], **other: int) -> np.ndarray:
        dtypes = (str(up.dtype),) if expert_dtype is None else taken
        value = getattr(experts, field)
        return numpy_of(field, value, axes, sizes=sizes | other, dtypes=dtypes)

    parts = {
        "w1": up,
        "b1": rest("up_bias", ("expert", "out"), out=hidden),
        "w2": rest("down", IN_OUT),
        "b2": rest("down_bias", ("expert", "out")),
    }
    rounded = {
        key: graph.finite_cast(key, part, expert_dtype or part.dtype) for key, part in parts.items()
    }
    return {"router.weight": router.astype(np.float32), **rounded}


def _layer(found: graph.Found) -> MoE:
    """The layer of one node."""
    where = graph.describe(found.node)
    top_k, num_experts, features, hidden = _sizes(found)
    if len(found.node.input) != 6:
        raise FormatError(f"{where} must have 6 inputs, got {len(found.node.input)}")
    shapes = {
        "router_w": (num_experts, features),
        "w1": (num_experts, features, hidden),
        "b1": (num_experts, hidden),
        "w2": (num_experts, hidden, features),
        "b2": (num_experts, features),
    }
    arrays = {
        name: _read(found, position, name, shape)
        for position, (name, shape) in enumerate(shapes.items(), 1)
    }
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    if dtypes.pop("router_w") != "float32":
        raise FormatError(f"{where}: router_w must be float32, got {arrays['router_w'].dtype}")
    if len(set(dtypes.values())) > 1 or dtypes["w1"] not in _DTYPES:
        raise FormatError(f"{where}: weights must all be one of {_DTYPES}, got {dtypes}")
    return MoE(
        MLP(
            up=weight_from_in_out(arrays["w1"]),
            down=weight_from_in_out(arrays["w2"]),
            up_bias=tag(arrays["b1"], "expert", "out"),
            down_bias=tag(arrays["b2"], "expert", "out"),
            activation=Activation("gelu"),
        ),
        tag(arrays["router_w"], "expert", "d"),
        experts_per_token=top_k,
    )


def _sizes(found: graph.Found) -> list[int]:
    """The values of `_SIZES`, after a check of all attributes."""
    where = graph.describe(found.node)
    attributes = found.attributes(_ATTRIBUTES)
    for name in ("activation", "plugin_version"):
        if attributes[name] != _ATTRIBUTES[name]:
            raise FormatError(
                f"{where}: {name} must be {_ATTRIBUTES[name]!r}, got {attributes[name]!r}"
            )
    sizes = [attributes[name] for name in _SIZES]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise FormatError(f"{where}: {_SIZES} must be positive integers, got {sizes}")
    top_k, num_experts = sizes[:2]
    if top_k > min(num_experts, MAX_EXPERTS_PER_TOKEN) or num_experts > MAX_EXPERTS:
        raise FormatError(
            f"{where}: top_k={top_k} of num_experts={num_experts} is not possible, the plugin "
            f"takes {MAX_EXPERTS_PER_TOKEN} of {MAX_EXPERTS} at most"
        )
    return sizes


def _read(found: graph.Found, position: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = found.constant(position, name)
    if array is None or array.shape != shape:
        got = None if array is None else array.shape
        raise FormatError(f"{graph.describe(found.node)}: {name} must have {shape}, got {got}")
    return array
