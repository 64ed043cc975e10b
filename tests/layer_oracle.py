"""Whole layers in NumPy float64, and random ones: what other systems' runs are compared with."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from core_oracle import assert_same, clamped_swiglu, combine, gelu, gelu_tanh, route, sigmoid
from core_oracle import random_mxfp4 as random_mxfp4
from flax import nnx
from hypothesis import strategies as st

from moe_jax import (
    MLP,
    Activation,
    GatedMLP,
    GptOssMLP,
    Identity,
    MoE,
    Norm,
    Router,
    T5FeedForward,
    Tagged,
    tag,
)
from moe_jax.variables import value

PLAIN = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
WEIGHT = ("expert", "out", "in")
GATES = {
    "geglu": gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": PLAIN["relu"],
    "bilinear": PLAIN["identity"],
}


ours = nnx.jit(lambda layer, x: layer(x))
"""A layer as one program: to compile it costs less than to compile each operation."""


def array(tagged: Tagged, *axes: str) -> np.ndarray:
    return np.asarray(tagged.untag(*axes)).astype(np.float64)


def combined(activation: Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    limit = np.inf if activation.limit is None else activation.limit
    if activation.kind == "swiglu":
        return clamped_swiglu(gate, up, activation.alpha, activation.beta, limit)
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return GATES[activation.kind](gate) * (up + activation.beta)


def activated(activation: Activation, x: np.ndarray) -> np.ndarray:
    if activation.kind in PLAIN:
        return PLAIN[activation.kind](x)
    if activation.layout.startswith("interleaved"):
        lanes = x[..., 0::2], x[..., 1::2]
    else:
        lanes = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    gate, up = lanes[::-1] if activation.layout.endswith("up_first") else lanes
    return combined(activation, gate, up)


def expert_function(experts):
    """(expert, row) -> row, in float64."""

    def linear(field: str):
        weight, bias = getattr(experts, field), getattr(experts, f"{field}_bias")
        matrix = array(weight, "expert", "out", "in")
        offset = np.zeros(matrix.shape[:2]) if bias is None else array(bias, "expert", "out")
        return lambda e, x: matrix[e] @ x + offset[e]

    if isinstance(experts, Identity):
        return lambda e, x: x
    if isinstance(experts, T5FeedForward):
        return t5_function(experts)
    down = linear("down")
    if isinstance(experts, GatedMLP):
        gate, up = linear("gate"), linear("up")
        return lambda e, x: down(e, combined(experts.activation, gate(e, x), up(e, x)))
    up = linear("up" if isinstance(experts, MLP) else "gate_up")
    return lambda e, x: down(e, activated(experts.activation, up(e, x)))


def normalized(norm: Norm, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x [..., d], float64."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * weight + bias


def t5_function(experts: T5FeedForward):
    """(expert, row) -> row, in float64."""
    wi_0, wi_1, wo = (array(getattr(experts, f), *WEIGHT) for f in ("wi_0", "wi_1", "wo"))
    weight = array(experts.norm_weight, "expert", "d")
    bias = experts.norm_bias
    offset = np.zeros(weight.shape) if bias is None else array(bias, "expert", "d")

    def expert(e: int, x: np.ndarray) -> np.ndarray:
        normed = normalized(experts.norm, x, weight[e], offset[e])
        hidden = combined(experts.activation, wi_0[e] @ normed, wi_1[e] @ normed)
        return x + wo[e] @ hidden

    return expert


def evaluate(layer: MoE, x: np.ndarray) -> np.ndarray:
    """What `layer` makes of x [..., D], in float64."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    seen, config = rows, layer.config
    if layer.router_norm_weight is not None:
        weight = array(value(layer.router_norm_weight), "d")
        seen = normalized(config.router_norm, rows, weight, np.zeros(len(weight)))
    logits = seen @ array(value(layer.router_weight), "expert", "d").T
    if layer.router_bias is not None:
        logits = logits + array(value(layer.router_bias), "expert")
    bias = 0.0 if layer.selection_bias is None else array(value(layer.selection_bias), "expert")
    ids, weights = route(logits, config.experts_per_token, config.router, bias)
    y = combine(rows, ids, weights, expert_function(layer.experts.tree()))
    if config.remaining_weight == "input":
        y += (1 - weights.sum(-1, keepdims=True)) * rows
    return y.reshape(x.shape)


def random_array(rng: np.random.Generator, dtype, *shape: int):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), dtype)


def weight(rng, dtype, experts: int, outputs: int, inputs: int) -> Tagged:
    return tag(random_array(rng, dtype, experts, outputs, inputs), "expert", "out", "in")


def bias(rng, dtype, experts: int, outputs: int, given: bool = True) -> Tagged | None:
    return tag(random_array(rng, dtype, experts, outputs), "expert", "out") if given else None


def mlp(rng, experts, hidden, intermediate, activation, dtype=jnp.float32, biases=True) -> MLP:
    lanes = 2 if activation.gated else 1
    return MLP(
        weight(rng, dtype, experts, lanes * intermediate, hidden),
        weight(rng, dtype, experts, hidden, intermediate),
        bias(rng, dtype, experts, lanes * intermediate, biases),
        bias(rng, dtype, experts, hidden, biases),
        activation,
    )


def gated(rng, experts, hidden, intermediate, activation, dtype=jnp.float32, biases=True):
    return GatedMLP(
        weight(rng, dtype, experts, intermediate, hidden),
        weight(rng, dtype, experts, intermediate, hidden),
        weight(rng, dtype, experts, hidden, intermediate),
        bias(rng, dtype, experts, intermediate, biases),
        bias(rng, dtype, experts, intermediate, biases),
        bias(rng, dtype, experts, hidden, biases),
        activation,
    )


def gpt_oss(rng, experts, hidden, intermediate, activation, dtype=jnp.float32, biases=True):
    return GptOssMLP(
        weight(rng, dtype, experts, 2 * intermediate, hidden),
        bias(rng, dtype, experts, 2 * intermediate),
        weight(rng, dtype, experts, hidden, intermediate),
        bias(rng, dtype, experts, hidden),
        activation,
    )


def t5(rng, experts, hidden, intermediate, activation, dtype=jnp.float32, biases=True):
    return T5FeedForward(
        tag(1 + random_array(rng, dtype, experts, hidden), "expert", "d"),
        weight(rng, dtype, experts, intermediate, hidden),
        weight(rng, dtype, experts, intermediate, hidden),
        weight(rng, dtype, experts, hidden, intermediate),
        tag(random_array(rng, dtype, experts, hidden), "expert", "d") if biases else None,
        Norm("layer" if biases else "rms"),
        activation,
    )


def moe(rng, experts, num_experts: int, hidden: int, experts_per_token: int, **options) -> MoE:
    """A layer with a random router."""
    router_weight = tag(random_array(rng, jnp.float32, num_experts, hidden), "expert", "d")
    return MoE(experts, router_weight, experts_per_token=experts_per_token, **options)


def gelu_layer(rng, experts=5, hidden=4, intermediate=7, k=2, dtype=jnp.float32, **options) -> MoE:
    """A dropless layer of gelu MLPs with biases."""
    kind = mlp(rng, experts, hidden, intermediate, Activation("gelu"), dtype)
    return moe(rng, kind, experts, hidden, k, **options)


@st.composite
def activations(draw, kinds) -> Activation:
    kind = draw(st.sampled_from(kinds))
    if kind in PLAIN:
        return Activation(kind)
    return Activation(
        kind,
        alpha=draw(st.sampled_from([1.0, 1.702])) if kind == "swiglu" else 1.0,
        beta=draw(st.sampled_from([0.0, 1.0])),
        limit=draw(st.sampled_from([None, 0.5, 7.0])),
        layout=draw(
            st.sampled_from(
                [
                    "interleaved",
                    "interleaved_up_first",
                    "concatenated",
                    "concatenated_up_first",
                ]
            )
        ),
    )


@st.composite
def routers(draw) -> Router:
    """Routers of six experts, with room for two."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return Router(
        score=draw(st.sampled_from(["softmax", "softmax", "sigmoid", "linear"])),
        order=draw(st.sampled_from(["after_top_k", "before_top_k"])),
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 1.0, 2.5])),
        num_groups=groups,
        groups_per_token=draw(st.integers(1, groups)),
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
    )


GATED = (*GATES, "swiglu")
EXPERTS = {
    "mlp": (mlp, (*PLAIN, *GATED)),
    "gated": (gated, GATED),
    "gpt_oss": (gpt_oss, GATED),
    "t5": (t5, GATED),
}


@st.composite
def layers(draw, dtypes=(jnp.float32,)) -> tuple[MoE, np.ndarray]:
    """A layer of six experts, and tokens [b, s, 4] for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    name, dtype = draw(st.sampled_from([*EXPERTS, "identity"])), draw(st.sampled_from(dtypes))
    experts = Identity()
    if name != "identity":
        make, kinds = EXPERTS[name]
        experts = make(rng, 6, 4, 5, draw(activations(kinds)), dtype, draw(st.booleans()))
    router = draw(routers())
    options = {}
    if draw(st.booleans()):
        options["router_bias"] = tag(random_array(rng, jnp.float32, 6), "expert")
    if draw(st.booleans()):
        options["selection_bias"] = tag(random_array(rng, jnp.float32, 6), "expert")
    if draw(st.booleans()):
        options["remaining_weight"] = "input"
    if draw(st.integers(0, 3)) == 0:
        options["router_norm_weight"] = tag(random_array(rng, jnp.float32, 4), "d")
        options["router_norm"] = Norm(draw(st.sampled_from(["rms", "layer"])))
    layer = moe(rng, experts, 6, 4, draw(st.integers(1, 2)), router=router, **options)
    if router.score == "linear":
        # gatings must not be negative
        layer.config = dataclasses.replace(layer.config, router_norm=Norm())
        if layer.router_norm_weight is not None:
            layer.router_norm_weight[...] = abs(layer.router_norm_weight[...])
        layer.router_weight[...] = abs(layer.router_weight[...])
        if layer.router_bias is not None:
            layer.router_bias[...] = abs(layer.router_bias[...])
    x = rng.normal(size=(2, draw(st.sampled_from([1, 3])), 4)).astype(np.float32)
    return layer, abs(x) if router.score == "linear" else x


def assert_same_layer(one: MoE, other: MoE) -> None:
    """Two layers that compute the same, with the same bits."""
    for field in ("experts_per_token", "router", "remaining_weight", "router_norm"):
        assert getattr(one.config, field) == getattr(other.config, field)
    assert_same(one.experts.tree(), other.experts.tree())
    for field in ("router_weight", "router_bias", "selection_bias", "router_norm_weight"):
        pair = getattr(one, field), getattr(other, field)
        assert (pair[0] is None) == (pair[1] is None), field
        if pair[0] is not None:
            assert_same(value(pair[0]), value(pair[1]))
