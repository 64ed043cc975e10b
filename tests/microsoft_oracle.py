"""Random layers as NumPy arrays: what they compute, in float64, and as layers of the library.

For the tests of `com.microsoft.MoE` and `QMoE`, together with what runs their models.
"""

import dataclasses
import os

# read by onnxruntime when a session is made: 8-bit weights meet float32 activations
os.environ["ORT_QMOE_CPU_QNBIT_GEMM"] = "fp32"

import core_oracle
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime_tools
from flax import nnx
from onnxruntime_tools import session as session

import moe_jax
from moe_jax import Router, tag
from moe_jax.activations import Activation
from moe_jax.quantization import PackedIntegers

ORT = onnxruntime_tools.VERSION

PLAIN = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * core_oracle.sigmoid(x),
    "gelu": core_oracle.gelu,
    "gelu_tanh": core_oracle.gelu_tanh,
}
SILU, DEFAULT_ROUTER = Activation("silu"), Router()
GATED = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


@dataclasses.dataclass
class Weight:
    """A weight of the library, and the float64 [expert, out, in] that it stands for."""

    ours: object
    floats: np.ndarray


def float_weight(rng, shape, dtype=np.float32):
    array = (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(dtype)
    return Weight(tag(jnp.asarray(array), "expert", "out", "in"), array.astype(np.float64))


def mxfp4_weight(rng, shape, minus_zero=True):
    """Random codes and scales; without minus zero, which integers cannot say, if asked so."""
    experts, outputs, inputs = shape
    packed, floats = core_oracle.random_mxfp4(rng, experts, outputs, inputs // 32)
    if not minus_zero:
        blocks = np.asarray(packed.blocks.array)
        low, high = (np.where(codes == 8, 0, codes) for codes in (blocks & 15, blocks >> 4))
        blocks = (low | high << 4).astype(np.uint8)
        packed = dataclasses.replace(packed, blocks=tag(blocks, *packed.blocks.axes))
    return Weight(packed, floats)


def integer_weight(rng, shape, bits, group_size=None, zero_points=False):
    """Codes and scales drawn at random, packed byte by byte; one group a row if not told."""
    experts, outputs, inputs = shape
    group_size = group_size or inputs
    groups = inputs // group_size
    codes = rng.integers(0, 2**bits, (experts, outputs, groups, group_size))
    scales = rng.uniform(0.5, 1.5, codes.shape[:3]).astype(np.float32) / 2**bits
    zero = rng.integers(3 * 2**bits // 8, 5 * 2**bits // 8 + 1, codes.shape[:3])
    centre = zero[..., None] if zero_points else 2 ** (bits - 1)
    floats = (codes - centre) * scales.astype(np.float64)[..., None]
    ours = PackedIntegers(
        tag(pack_bits(codes, bits), "expert", "out", "group", "byte"),
        tag(scales, "expert", "out", "group"),
        tag(zero.astype(np.uint8), "expert", "out", "group") if zero_points else None,
        bits,
    )
    return Weight(ours, floats.reshape(shape))


def pack_bits(codes, bits):
    """Codes [..., n] in bytes, the lowest bits first; the last byte filled with zeros."""
    each = 8 // bits
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // each) * each), np.int64)
    padded[..., : codes.shape[-1]] = codes
    return sum(padded[..., i::each] << (bits * i) for i in range(each)).astype(np.uint8)


def lanes(array, layout):
    """Gate and linear lane of the columns of `array`, as the docstring of `Activation` says."""
    half = array.shape[-1] // 2
    first, second = {
        "interleaved": (array[..., 0::2], array[..., 1::2]),
        "concatenated": (array[..., :half], array[..., half:]),
    }[layout.removesuffix("_up_first")]
    return (second, first) if layout.endswith("up_first") else (first, second)


def combine(activation, gate, up):
    limit = np.inf if activation.limit is None else activation.limit
    if activation.kind == "swiglu":
        return core_oracle.clamped_swiglu(gate, up, activation.alpha, activation.beta, limit)
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return PLAIN[GATED[activation.kind]](gate) * (up + activation.beta)


@dataclasses.dataclass
class Layer:
    """A layer, and what it computes.

    Attributes:
        ours: the `MoE`.
        weights: float64 weights and biases by the names of the expert's fields.
        router: float64 router_weight, router_bias, selection_bias; 0 for none.
    """

    ours: moe_jax.MoE
    weights: dict
    router: dict

    def expert(self, e, row):
        experts = self.ours.experts.tree()
        activation = experts.activation

        def linear(name, x):
            bias = self.weights.get(f"{name}_bias")
            return self.weights[name][e] @ x + (0 if bias is None else bias[e])

        if "gate" in self.weights:
            hidden = combine(activation, linear("gate", row), linear("up", row))
        else:
            hidden = linear("gate_up" if "gate_up" in self.weights else "up", row)
            if activation.gated:
                hidden = combine(activation, *lanes(hidden, activation.layout))
            else:
                hidden = PLAIN[activation.kind](hidden)
        return linear("down", hidden)

    def logits(self, x):
        return x.astype(np.float64) @ self.router["weight"].T + self.router["bias"]

    def __call__(self, x):
        """float64 [tokens, d] of x [tokens, d]."""
        config = self.ours.config
        ids, weights = core_oracle.route(
            self.logits(x), config.experts_per_token, config.router, self.router["selection"]
        )
        return core_oracle.combine(x, ids, weights, self.expert)

    def margin(self, x):
        """The least distance, in what selects, of a chosen expert from one that is not."""
        config, logits = self.ours.config, self.logits(x)
        if config.router.order == "before_top_k":
            logits = core_oracle.scores_of(logits, config.router.score)
        ranked = -np.sort(-(logits + self.router["selection"]), axis=-1)
        k = config.experts_per_token
        gaps = ranked[:, k - 1] - ranked[:, k : k + 1].T if k < ranked.shape[1] else [np.inf]
        return np.min(gaps)


def random_layer(
    rng,
    *,
    experts="MLP",
    sizes=(4, 5, 7),
    k=2,
    activation=SILU,
    biases=True,
    router=DEFAULT_ROUTER,
    router_bias=False,
    selection_bias=False,
    dtype=np.float32,
    make=float_weight,
    **options,
):
    """A random `Layer`; `make(rng, shape)` makes its weights, sizes are experts, d, inner."""
    num_experts, d, inner = sizes
    wide = inner * (2 if activation.gated and experts != "GatedMLP" else 1)
    names = {"MLP": ("up",), "GptOssMLP": ("gate_up",), "GatedMLP": ("gate", "up")}[experts]
    shapes = {name: (num_experts, wide, d) for name in names} | {"down": (num_experts, d, inner)}
    fields, floats = {"activation": activation}, {}
    for name, shape in shapes.items():
        arguments = {"dtype": dtype} if make is float_weight else {}
        weight = make(rng, shape, **arguments)
        fields[name], floats[name] = weight.ours, weight.floats
        if biases:
            bias = rng.normal(size=shape[:2]).astype(dtype)
            fields[f"{name}_bias"] = tag(jnp.asarray(bias), "expert", "out")
            floats[f"{name}_bias"] = bias.astype(np.float64)
    weight = (rng.normal(size=(num_experts, d)) / np.sqrt(d)).astype(np.float32)
    vectors = {
        name: rng.normal(size=num_experts).astype(np.float32) if given else None
        for name, given in (("bias", router_bias), ("selection", selection_bias))
    }
    tagged = {n: None if v is None else tag(v, "expert") for n, v in vectors.items()}
    ours = moe_jax.MoE(
        getattr(moe_jax, experts)(**fields),
        tag(weight, "expert", "d"),
        tagged["bias"],
        experts_per_token=k,
        router=router,
        selection_bias=tagged["selection"],
        **options,
    )
    numbers = {n: 0.0 if v is None else v.astype(np.float64) for n, v in vectors.items()}
    return Layer(ours, floats, {"weight": weight.astype(np.float64), **numbers})


def run(model, x):
    """What onnxruntime makes of x, for a model with one input."""
    one = session(model)
    return one.run(None, {one.get_inputs()[0].name: x})[0]


def check_error(record_property, error, bound, **names):
    """Records what a test is about and the error it measured, and checks the error."""
    for name, text in {**names, "error": error, "with": ORT}.items():
        record_property(name, text)
    assert error <= bound, error


def relative_error(actual, expected):
    """The largest difference, relative to the largest expected number or 1."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))


def node_of(model):
    """The MoE or QMoE node."""
    return next(n for n in model.graph.node if n.domain == "com.microsoft")


def constants_of(model):
    """The initialisers by name."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def attributes_of(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def state(layer):
    """Everything an `MoE` holds as arrays, and its configuration."""
    return list(nnx.to_flat_state(nnx.state(layer))), layer.config, layer.experts.treedef


def assert_same_layer(a, b):
    """Two `MoE` with the same configuration and the same bits."""
    first, second = state(a), state(b)
    assert first[1:] == second[1:]
    assert [path for path, _ in first[0]] == [path for path, _ in second[0]]
    for (path, one), (_, other) in zip(first[0], second[0], strict=True):
        one, other = one.get_value(), other.get_value()
        assert one.dtype == other.dtype and one.shape == other.shape, path
        np.testing.assert_array_equal(core_oracle.bits(one), core_oracle.bits(other), str(path))
