"""500 random layers: onnxruntime's output matches, or the export names what it cannot say."""

import functools

import hypothesis.strategies as st
import jax.numpy as jnp
import microsoft_oracle as oracle
import numpy as np
from hypothesis import assume, given, settings
from microsoft_oracle import random_layer, relative_error, run

from moe_jax import Router
from moe_jax.activations import Activation
from moe_jax.formats import FormatError
from moe_jax.formats.onnx import microsoft

REASONS = (
    "activation_type", "num_groups", "router_weights", "router score", "float_type", "block_size",
    "expert_weight_bits", "scale byte", "tokens_per_expert_ratio",
)  # fmt: skip
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "bilinear")
KINDS = ("relu", "silu", "identity", "gelu_tanh") * 2 + ("gelu",)
LAYOUTS = ("interleaved", "interleaved_up_first", "concatenated", "concatenated_up_first")

OUTCOMES = []
"""The error of each layer, None for those that were refused."""

sizes = st.sampled_from([(4, 5, 7), (6, 3, 2), (2, 8, 5), (5, 6, 6), (3, 1, 4)])
# no 128 rows, where 2-bit blocks meet rounded activations
packed_sizes = st.sampled_from([(4, 32, 96), (2, 64, 32), (6, 32, 32)])


@st.composite
def activations(draw, gated):
    if not gated:
        return Activation(draw(st.sampled_from(KINDS)))
    kind = draw(st.sampled_from(GATED + ("swiglu",) * 12))
    return Activation(
        kind,
        alpha=draw(st.sampled_from([1.0, 1.702, 0.3])) if kind == "swiglu" else 1.0,
        beta=draw(st.sampled_from([0.0, 1.0, -0.7])),
        limit=draw(st.sampled_from([None, 7.0, 0.4])),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def routers(draw, num_experts):
    groups = draw(st.sampled_from([1] * 14 + [2])) if num_experts % 2 == 0 else 1
    return Router(
        score=draw(st.sampled_from(["softmax"] * 7 + ["sigmoid"] * 2 + ["linear"])),
        order=draw(st.sampled_from(["after_top_k", "before_top_k"])),
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 1.0, 2.5])),
        num_groups=groups,
        groups_per_token=groups,
    )


def weights(draw):
    """How weights are made, and sizes that suit it."""
    kind = draw(st.sampled_from(["floats"] * 2 + ["mxfp4", "integers"]))
    if kind == "floats":
        return oracle.float_weight, draw(sizes)
    if kind == "mxfp4":
        return functools.partial(oracle.mxfp4_weight, minus_zero=False), draw(packed_sizes)
    options = {
        "bits": draw(st.sampled_from([2, 4, 8])),
        "group_size": draw(st.sampled_from([16, 32, None, 16, 32, None, 8])),
        "zero_points": draw(st.booleans()),
    }
    return functools.partial(oracle.integer_weight, **options), draw(packed_sizes)


@st.composite
def layers(draw):
    """Arguments of `random_layer`."""
    make, dimensions = weights(draw)
    experts = draw(st.sampled_from(["MLP", "MLP", "GatedMLP", "GptOssMLP"]))
    gated = experts != "MLP" or draw(st.booleans())
    return dict(
        experts=experts,
        sizes=dimensions,
        k=draw(st.integers(1, dimensions[0])),
        activation=draw(activations(gated)),
        biases=experts == "GptOssMLP" or draw(st.booleans()),
        router=draw(routers(dimensions[0])),
        router_bias=draw(st.booleans()),
        selection_bias=draw(st.sampled_from([False] * 4 + [True])),
        dtype=draw(st.sampled_from([jnp.float32] * 14 + [jnp.bfloat16])),
        make=make,
    )


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(arguments=layers(), seed=st.integers(0, 2**32 - 1))
def check(arguments, seed):
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, **arguments)
    try:
        model = microsoft.to_model(layer.ours)
    except FormatError as error:
        assert any(reason in str(error) for reason in REASONS), error
        OUTCOMES.append(None)
        return
    x = rng.normal(size=(5, layer.router["weight"].shape[1])).astype(np.float32)
    assume(layer.margin(x) > 1e-5)  # a choice that rounding does not make
    error = relative_error(run(model, x), layer(x))
    assert error < 2e-6, error
    OUTCOMES.append(error)
    again = microsoft.read(model)["moe"]
    oracle.assert_same_layer(again, layer.ours)


def test_x3_500_random_layers_run_or_are_refused(record_property):
    OUTCOMES.clear()
    check()
    errors = [error for error in OUTCOMES if error is not None]
    assert len(OUTCOMES) >= 500 and 200 < len(errors) < len(OUTCOMES)
    oracle.check_error(record_property, max(errors), 2e-6, row="X3")
