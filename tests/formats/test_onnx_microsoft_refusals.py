"""What `com.microsoft` exports refuse, and where onnxruntime and the library differ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import microsoft_oracle as oracle
import numpy as np
import onnxruntime
import pytest
from microsoft_oracle import random_layer, relative_error, run

import moe_jax
from moe_jax import Router, tag
from moe_jax.activations import Activation
from moe_jax.formats import FormatError
from moe_jax.formats.onnx import graph, microsoft

SWIGLU = Activation("swiglu")
PACKED_SIZES = (3, 32, 64)


def tokens(rng, layer, count=6):
    return rng.normal(size=(count, layer.router["weight"].shape[1])).astype(np.float32)


def refused(record_property, name, message, *arguments, **options):
    if name:
        record_property("bad_input", name)
    with pytest.raises(FormatError, match=message):
        microsoft.to_model(*arguments, **options)


# traps


def test_trap_3_orientation_is_written_and_not_guessed(rng, record_property):
    """onnxruntime takes [expert, in, out] without a word and multiplies it as it lies."""
    layer = random_layer(rng, sizes=(4, 6, 6), activation=Activation("identity"), biases=False)
    x = tokens(rng, layer)
    model = microsoft.to_model(layer.ours)
    weights = oracle.constants_of(model)["fc1_experts_weights"]
    np.testing.assert_array_equal(weights, layer.weights["up"].astype(np.float32))
    error = relative_error(run(model, x), layer(x))
    assert error < 1e-6
    turned = next(t for t in model.graph.initializer if t.name == "fc1_experts_weights")
    turned.CopyFrom(graph.initialiser(turned.name, weights.transpose(0, 2, 1)))
    assert relative_error(run(model, x), layer(x)) > 0.1
    record_property("trap", "3")
    record_property("error", error)
    record_property("with", oracle.ORT)


def test_weights_of_any_order_of_axes_are_written_the_same(rng):
    layer = random_layer(rng, sizes=(4, 6, 6))
    experts = layer.ours.experts.tree()
    turned = dataclasses.replace(experts, up=experts.up.order("in", "expert", "out"))
    weight = tag(layer.ours.router_weight.get_value(), "expert", "d")
    other = moe_jax.MoE(turned, weight.order("d", "expert"), experts_per_token=2)
    assert microsoft.to_model(other) == microsoft.to_model(layer.ours)


def test_trap_3_the_old_shape_runs_wrongly_and_is_not_read(rng, record_property):
    layer = random_layer(rng, biases=False, activation=Activation("identity"))
    model = microsoft.to_model(layer.ours)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("experts_weights"):
            weights = oracle.constants_of(model)[tensor.name]
            tensor.CopyFrom(graph.initialiser(tensor.name, weights.transpose(0, 2, 1)))
    x = tokens(rng, layer)
    assert relative_error(run(model, x), layer(x)) > 0.1
    with pytest.raises(FormatError, match="transpose them"):
        microsoft.read(model)
    record_property("trap", "3")


def test_trap_4_gelu_is_the_tanh_approximation(rng, record_property):
    layer = random_layer(rng, activation=Activation("gelu_tanh"))
    x = tokens(rng, layer)
    model = microsoft.to_model(layer.ours)
    assert oracle.attributes_of(oracle.node_of(model))["activation_type"] == b"gelu"
    error = relative_error(run(model, x), layer(x))
    assert error < 1e-6
    read = microsoft.read(model)["moe"].experts.tree()
    assert read.activation == Activation("gelu_tanh")
    exact = random_layer(rng, activation=Activation("gelu"))
    with pytest.raises(FormatError, match="activation_type cannot say 'gelu'"):
        microsoft.to_model(exact.ours)
    record_property("trap", "4")
    record_property("error", error)
    record_property("with", oracle.ORT)


def constant_experts(router_bias):
    """A layer whose expert e makes 1 at place e, so that its output is the weights."""
    count = router_bias.shape[0]
    zeros = functools.partial(np.zeros, dtype=np.float32)
    experts = moe_jax.MLP(
        up=tag(zeros((count, 3, count)), "expert", "out", "in"),
        down=tag(zeros((count, count, 3)), "expert", "out", "in"),
        up_bias=tag(zeros((count, 3)), "expert", "out"),
        down_bias=tag(np.eye(count, dtype=np.float32), "expert", "out"),
        activation=Activation("identity"),
    )
    weight = tag(zeros((count, count)), "expert", "d")
    bias = tag(jnp.asarray(router_bias, jnp.float32), "expert")
    return moe_jax.MoE(experts, weight, bias, experts_per_token=2)


@jax.jit
def ours_of(router_bias):
    return constant_experts(router_bias)(jnp.ones((1, 4)))[0]


def both(logits):
    """Weights by expert, of onnxruntime and of the library, for one token with these logits."""
    logits = np.asarray(logits, np.float32)
    theirs = run(microsoft.to_model(constant_experts(logits)), np.ones((1, 4), np.float32))[0]
    return theirs, np.asarray(ours_of(logits))


def test_trap_5_ties_go_to_the_other_end(record_property):
    theirs, ours = both([1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(ours, [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(theirs, [0, 0.5, 0.5, 0])
    record_property("trap", "5")
    record_property("with", oracle.ORT)


@pytest.mark.parametrize(
    "logits, expected",
    [
        ([np.nan, 1, 2, 3], np.nan),
        ([np.inf, 1, 2, 3], np.nan),
        ([-np.inf] * 4, 0),
    ],
)
def test_trap_6_rows_without_a_softmax(record_property, logits, expected):
    """onnxruntime makes a row of zeros of each; here NaN stays NaN, and all -inf is no expert."""
    theirs, ours = both(logits)
    np.testing.assert_array_equal(theirs, np.zeros(4))
    np.testing.assert_array_equal(ours, np.full(4, expected))
    record_property("trap", "6")
    record_property("bad_input", "all -inf row" if expected == 0 else "NaN logit")
    record_property("with", oracle.ORT)


def test_a_barred_expert_is_barred_in_both():
    theirs, ours = both([-np.inf, 1.0, -np.inf, -np.inf])
    np.testing.assert_allclose(theirs, [0, 1, 0, 0])
    np.testing.assert_allclose(ours, theirs)


def test_trap_9_too_many_experts_per_token_is_a_clean_error(rng, record_property):
    """Versions before 1.31 abort the process, and compute int4 wrongly."""
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    assert version >= (1, 31)
    layer = random_layer(rng)
    model = microsoft.to_model(layer.ours)
    attribute = next(a for a in oracle.node_of(model).attribute if a.name == "k")
    for k in (0, 5):
        attribute.i = k
        with pytest.raises(Exception, match="attribute 'k' must be"):
            run(model, tokens(rng, layer))
        with pytest.raises(FormatError, match="k must be 1 to 4"):
            microsoft.read(model)
    record_property("trap", "9")
    record_property("bad_input", "K<1, K>E")
    record_property("with", oracle.ORT)


def test_eight_bit_blocks_need_the_environment(rng, monkeypatch):
    """What the module's docstring warns of: activations rounded to eight bits."""
    layer = random_layer(rng, sizes=PACKED_SIZES, make=oracle.mxfp4_weight)
    x, model = tokens(rng, layer), microsoft.to_model(layer.ours)
    monkeypatch.delenv("ORT_QMOE_CPU_QNBIT_GEMM")
    assert 1e-4 < relative_error(run(model, x), layer(x)) < 0.1


def test_two_bit_blocks_may_meet_rounded_activations(rng):
    """The module's docstring warns of this too: a lookup table where rows are 128 or more."""
    make = functools.partial(oracle.integer_weight, bits=2, group_size=32)
    layer = random_layer(rng, sizes=(3, 64, 128), make=make)
    x = tokens(rng, layer)
    assert relative_error(run(microsoft.to_model(layer.ours), x), layer(x)) < 0.03


# exports that are refused


KINDS = ["gelu", "geglu", "geglu_tanh", "reglu", "bilinear"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_activations(rng, record_property, kind):
    layer = random_layer(rng, activation=Activation(kind)).ours
    refused(record_property, "export asked of what the target cannot say", "activation_type", layer)


@pytest.mark.parametrize(
    "name, number",
    [("alpha", 1e39), ("beta", -1e39), ("limit", 1e-46)],
)
def test_numbers_that_are_no_float32(rng, record_property, name, number):
    layer = random_layer(rng, activation=Activation("swiglu", **{name: number})).ours
    refused(record_property, "", name, layer)


def test_a_scale_beyond_the_type(rng, record_property):
    layer = random_layer(rng, router=Router(scale=1e39)).ours
    refused(record_property, "", "scale", layer)


@pytest.mark.parametrize("limit", [None, float("inf"), 1e-3])
def test_limits_at_the_edge(rng, limit):
    layer = random_layer(rng, activation=Activation("swiglu", limit=limit))
    x, model = tokens(rng, layer), microsoft.to_model(layer.ours)
    assert relative_error(run(model, x), layer(x)) < 1e-6
    oracle.assert_same_layer(microsoft.read(model)["moe"], layer.ours)


@pytest.mark.parametrize(
    "router, options, message",
    [
        (Router("linear"), {}, "score 'linear'"),
        (Router("sigmoid"), {}, "router_weights"),
        (Router(), {"selection_bias": True}, "router_weights"),
        (Router(num_groups=2), {}, "num_groups"),
    ],
)
def test_routers_that_moe_cannot_say(rng, record_property, router, options, message):
    layer = random_layer(rng, router=router, **options).ours
    refused(record_property, "export asked of what the target cannot say", message, layer)


@pytest.mark.parametrize("name", ["router_bias", "selection_bias"])
def test_bars_that_router_weights_cannot_say(rng, record_property, name):
    layer = random_layer(
        rng, router_bias=True, selection_bias=True, sizes=PACKED_SIZES, make=oracle.mxfp4_weight
    ).ours
    variable = getattr(layer, name)
    variable.set_value(variable.get_value().at[1].set(-jnp.inf))
    refused(record_property, "", f"{name} must be finite", layer)


def test_a_fixed_budget(rng, record_property):
    layer = random_layer(rng, tokens_per_expert_ratio=2.0).ours
    refused(record_property, "budget ratio", "tokens_per_expert_ratio", layer)


def test_other_experts(rng, record_property):
    layer = random_layer(rng).ours
    weight = moe_jax.tag(layer.router_weight.get_value(), "expert", "d")
    identity = moe_jax.MoE(moe_jax.Identity(), weight, experts_per_token=1)
    refused(record_property, "", "Identity", identity)


def test_things_that_are_no_layers(rng):
    with pytest.raises(TypeError, match="expected moe_jax.MoE layers by name, got int for 'a'"):
        microsoft.to_model({"a": 1})
    with pytest.raises(FormatError, match="one or two token axes"):
        microsoft.to_model(random_layer(rng).ours, token_axes=())


@pytest.mark.parametrize(
    "target, float_type", [(microsoft.CPU, "bfloat16"), (microsoft.CUDA, "float64")]
)
def test_types_without_kernels(rng, record_property, target, float_type):
    layer = random_layer(rng).ours
    refused(
        record_property, "export asked of what the target cannot say", "float_type", layer,
        target=target, float_type=jnp.dtype(float_type),
    )  # fmt: skip


def changed(layer, **leaves):
    """The layer with other arrays in the experts' variables."""
    for name, function in leaves.items():
        variable = layer.experts.leaves[name]
        variable.set_value(function(variable.get_value()))
    return layer


def test_types_that_do_not_fit_together(rng, record_property):
    layer = changed(random_layer(rng).ours, up_bias=lambda a: a.astype(jnp.float16))
    refused(record_property, "", "float_type", layer)
    large = changed(random_layer(rng).ours, up=lambda a: a * 1e5)
    refused(record_property, "", "up holds numbers beyond float16", large, float_type=np.float16)
    integers = changed(random_layer(rng).ours, up=lambda a: a.astype(jnp.int32))
    refused(record_property, "", "up must be floats", integers)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"up": lambda a: a[:, :, :-1]}, "up must be"),
        ({"up": lambda a: a[:, :-1]}, "up_bias must be"),
        ({"down": lambda a: a[:, :-1]}, "down must be"),
        ({"up_bias": lambda a: a[:, :-1]}, "up_bias must be"),
        ({"down_bias": lambda a: a[:, :-1]}, "down_bias must be"),
        ({"up": lambda a: a.transpose(0, 2, 1)}, "up must be"),
    ],
)
def test_shapes_that_do_not_fit(rng, record_property, changes, message):
    layer = changed(random_layer(rng).ours, **changes)
    refused(record_property, "x last dim, E or widths differ", message, layer)


def test_an_odd_width_of_two_lanes(rng, record_property):
    layer = random_layer(rng, activation=SWIGLU).ours
    changed(layer, up=lambda a: a[:, :-1], up_bias=lambda a: a[:, :-1])
    refused(record_property, "fused width odd", "up must be", layer)


def test_partial_biases(rng, record_property):
    layer = random_layer(rng)
    experts = layer.ours.experts.tree()
    part = moe_jax.MLP(experts.up, experts.down, experts.up_bias, None, experts.activation)
    weight = tag(layer.ours.router_weight.get_value(), "expert", "d")
    partial = moe_jax.MoE(part, weight, experts_per_token=2)
    refused(record_property, "biases partly given", "down_bias is None", partial)


def test_scale_byte_255(rng, record_property):
    layer = random_layer(rng, sizes=PACKED_SIZES, make=oracle.mxfp4_weight).ours
    changed(layer, **{"up.scales": lambda a: a.at[0, 0, 0].set(255)})
    refused(record_property, "scale byte 255", "scale byte 255", layer)


def test_mxfp4_blocks_and_scales_that_do_not_fit(rng, record_property):
    layer = random_layer(rng, sizes=PACKED_SIZES, make=oracle.mxfp4_weight).ours
    changed(layer, **{"up.scales": lambda a: a[:, :-1]})
    record_property("bad_input", "MXFP4 blocks/scales mismatch")
    with pytest.raises(ValueError, match="blocks"):
        microsoft.to_model(layer)


def pair(rng, up, down, sizes=(3, 32, 64)):
    """A layer with `up` and `down` made by two functions (rng, shape) -> Weight."""

    def make(rng, shape):
        return (up if shape[-1] == sizes[1] else down)(rng, shape)

    return random_layer(rng, sizes=sizes, make=make).ours


def integers(bits=4, group_size=None):
    return functools.partial(oracle.integer_weight, bits=bits, group_size=group_size)


@pytest.mark.parametrize(
    "up, down, message",
    [
        (integers(4), integers(8), "expert_weight_bits"),
        (integers(4, 16), integers(4, 32), "block_size"),
        (integers(8, 8), integers(8, 8), "block_size"),
        (oracle.mxfp4_weight, oracle.float_weight, "QMoE needs all weights as integers"),
        (oracle.float_weight, oracle.mxfp4_weight, "QMoE needs all weights as integers"),
    ],
)
def test_integers_that_one_node_cannot_hold(rng, record_property, up, down, message):
    refused(record_property, "", message, pair(rng, up, down))


def test_gate_and_up_of_different_forms(rng, record_property):
    makers = iter([integers(4), integers(4, 16), integers(4)])
    layer = random_layer(
        rng, experts="GatedMLP", activation=SWIGLU, sizes=(3, 32, 64),
        make=lambda rng, shape: next(makers)(rng, shape),
    ).ours  # fmt: skip
    refused(record_property, "", "gate and up must be of one form", layer)


def test_mixed_widths_go_to_cuda(rng):
    layer = pair(rng, integers(4), integers(8))
    attributes = oracle.attributes_of(
        oracle.node_of(microsoft.to_model(layer, target=microsoft.CUDA))
    )
    assert attributes["expert_weight_bits"] == 4 and attributes["fc2_expert_weight_bits"] == 8
