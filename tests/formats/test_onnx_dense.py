"""Layers in standard operators, run by onnxruntime and OpenVINO."""

import dataclasses
import json

import jax.numpy as jnp
import layer_oracle
import numpy as np
import onnx
import onnxruntime_tools
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from moe_jax import MLP, Activation, GatedMLP, MoE, Router, tag
from moe_jax.formats import FormatError
from moe_jax.formats.onnx import dense
from moe_jax.formats.openvino.package import load_openvino
from moe_jax.variables import value

openvino = load_openvino()

ORT = onnxruntime_tools.VERSION
OPENVINO = f"openvino {openvino.__version__.split('-')[0]}"
KINDS = {
    **{kind: (layer_oracle.mlp, Activation(kind)) for kind in layer_oracle.PLAIN},
    **{kind: (layer_oracle.gated, Activation(kind)) for kind in layer_oracle.GATED},
    "t5": (layer_oracle.t5, Activation("geglu_tanh")),
    "gpt_oss": (
        layer_oracle.gpt_oss,
        Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0, layout="interleaved"),
    ),
}


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return onnxruntime_tools.run(model, {"x": x})


def run_openvino(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    core = openvino.Core()
    read = core.read_model(model.SerializeToString())
    # without the hint some CPUs compute in bfloat16
    return core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]


RUNTIMES = {ORT: run, OPENVINO: run_openvino}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(abs(found - expected).max() / max(1, abs(expected).max()))


def tokens(rng, dtype=np.float32) -> np.ndarray:
    return rng.normal(size=(2, 3, 4)).astype(dtype)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_x2_every_activation_matches(kind, runtime, rng, record_property):
    make, activation = KINDS[kind]
    layer = layer_oracle.moe(rng, make(rng, 5, 4, 7, activation), 5, 4, 2)
    x = tokens(rng)
    error = relative(RUNTIMES[runtime](dense.to_model(layer), x), layer_oracle.evaluate(layer, x))
    assert error < 1e-6
    record_property("row", "E2" if kind == "gelu" else "X2")
    record_property("error", error)
    record_property("with", runtime)


ROUTERS = {
    "R1": Router(),
    "R2": Router(order="before_top_k"),
    "R3": Router(order="before_top_k", renormalize=True),
    "R7": Router(score="sigmoid", order="before_top_k", renormalize=True, scale=2.5),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("row", ROUTERS)
def test_r1_r2_r3_r7_routers_match(row, runtime, rng, record_property):
    experts = layer_oracle.gated(rng, 6, 4, 7, Activation("swiglu"))
    options = {"router": ROUTERS[row]}
    if row == "R7":
        options["selection_bias"] = tag(layer_oracle.random_array(rng, jnp.float32, 6), "expert")
    layer = layer_oracle.moe(rng, experts, 6, 4, 2, **options)
    x = tokens(rng)
    error = relative(RUNTIMES[runtime](dense.to_model(layer), x), layer_oracle.evaluate(layer, x))
    assert error < 1e-6
    record_property("row", row)
    record_property("error", error)
    record_property("with", f"{runtime}, dense graph")


WRONG = ("tokens_per_expert_ratio", "router_bias", "selection_bias", "up", "down_bias")


def test_x2_random_layers_match_onnxruntime_or_are_refused(record_property):
    errors = []

    @settings(max_examples=500, derandomize=True, deadline=None, database=None)
    @given(layer_oracle.layers(), st.sampled_from(["", "", "", "", *WRONG]))
    def check(case, wrong):
        layer, x = case
        if not wrong or not hasattr(layer.experts.tree(), "down"):
            y = run(dense.to_model(layer), x)
            errors.append(relative(y, layer_oracle.evaluate(layer, x)))
            assert errors[-1] < 1e-6
            return
        with pytest.raises(FormatError, match=wrong):
            dense.to_model(damaged(layer, wrong))

    check()
    record_property("row", "X2")
    record_property("error", max(errors))
    record_property("with", f"{ORT}, {len(errors)} random layers")
    record_property("bad_input", "export of what the target cannot say")


def damaged(layer: MoE, wrong: str) -> MoE:
    """The layer with one thing that the graph cannot say."""
    experts, router = layer.experts.tree(), value(layer.router_weight)
    options = {"router": layer.config.router}
    if wrong == "tokens_per_expert_ratio":
        options[wrong] = 2.0
    elif wrong.startswith(("router", "selection")):
        options[wrong] = tag(jnp.full(6, -jnp.inf), "expert")
    elif wrong == "up":
        field = "gate_up" if hasattr(experts, "gate_up") else "up"
        shape = (6, getattr(experts, field).size("out"), 3)
        short = tag(jnp.zeros(shape), "expert", "out", "in")
        experts = dataclasses.replace(experts, **{field: short})
    else:
        width = None if experts.down_bias is not None else 4
        bias = None if width is None else tag(jnp.zeros((6, width)), "expert", "out")
        experts = dataclasses.replace(experts, down_bias=bias)
    return MoE(experts, router, experts_per_token=layer.config.experts_per_token, **options)


def test_x2_random_layers_match_openvino(record_property):
    errors = []

    @settings(max_examples=15, derandomize=True, deadline=None, database=None)
    @given(layer_oracle.layers())
    def check(case):
        layer, x = case
        y = run_openvino(dense.to_model(layer), x)
        errors.append(relative(y, layer_oracle.evaluate(layer, x)))
        assert errors[-1] < 1e-5

    check()
    record_property("row", "X2")
    record_property("error", max(errors))
    record_property("with", f"{OPENVINO}, {len(errors)} random layers")


@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@given(layer_oracle.layers((jnp.float32, jnp.float16, jnp.bfloat16)))
def test_layers_of_any_float_come_back_with_the_same_bits(case):
    layer, x = case
    expected = layer_oracle.evaluate(layer, x)
    for dtype, tolerance in {"float32": 2e-6, "float16": 1e-2}.items():
        model = dense.to_model(layer, dtype=dtype)
        assert relative(run(model, x.astype(dtype)), expected) < tolerance
        read = onnx.load_from_string(model.SerializeToString())
        layer_oracle.assert_same_layer(dense.read(read)["moe"], layer)


def test_the_layer_itself_computes_the_same(rng):
    layer = layer_oracle.gelu_layer(rng)
    x = tokens(rng)
    np.testing.assert_allclose(
        run(dense.to_model(layer), x), layer_oracle.ours(layer, x), atol=1e-6
    )


def test_only_standard_operators_are_used(rng):
    model = dense.to_model(layer_oracle.gelu_layer(rng))
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    onnx.checker.check_model(model, full_check=True)


def test_trap_3_square_weights_keep_their_orientation(rng, record_property):
    experts = layer_oracle.gated(rng, 5, 4, 4, Activation("swiglu"))
    layer = layer_oracle.moe(rng, experts, 5, 4, 2)
    x = tokens(rng)
    model = dense.to_model(layer)
    assert relative(run(model, x), layer_oracle.evaluate(layer, x)) < 1e-6
    layer_oracle.assert_same_layer(dense.read(model)["moe"], layer)
    record_property("trap", "3")


def test_weights_with_other_orders_of_axes_are_the_same_layer(rng):
    layer = layer_oracle.gelu_layer(rng)
    experts = layer.experts.tree()
    turned = dataclasses.replace(
        experts,
        up=experts.up.order("in", "expert", "out"),
        down=experts.down.order("out", "in", "expert"),
    )
    other = MoE(turned, value(layer.router_weight).order("d", "expert"), experts_per_token=2)
    assert dense.to_model(other) == dense.to_model(layer)


def test_trap_5_of_equal_logits_the_lowest_expert_is_chosen(rng, record_property):
    layer = layer_oracle.gelu_layer(rng)
    layer.router_weight[...] = jnp.zeros((5, 4))
    x = tokens(rng)
    y = run(dense.to_model(layer), x)
    assert relative(y, layer_oracle.evaluate(layer, x)) < 1e-6
    np.testing.assert_allclose(y, layer_oracle.ours(layer, x), atol=1e-6)
    record_property("trap", "5")


EMPTY = {
    "plain": {},
    "groups": {"router": Router(num_groups=5, groups_per_token=2)},
    "remaining": {"router": Router(order="before_top_k"), "remaining_weight": "input"},
    "norm": {"router_norm_weight": tag(np.ones(4, np.float32), "d")},
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_tokens_are_no_tokens(name, rng, record_property):
    layer = layer_oracle.gelu_layer(rng, **EMPTY[name])
    x = np.zeros((2, 0, 4), np.float32)
    assert run(dense.to_model(layer), x).shape == x.shape
    record_property("bad_input", "no tokens")


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_a_token_that_is_not_a_number_stays_alone(kind, rng, record_property):
    experts = layer_oracle.mlp(rng, 5, 4, 7, Activation(kind))
    layer = layer_oracle.moe(rng, experts, 5, 4, 2, router=Router(score="sigmoid"))
    x = tokens(rng)
    expected = layer_oracle.evaluate(layer, x)
    x[1, 2] = np.nan
    for y in (run(dense.to_model(layer), x), np.asarray(layer_oracle.ours(layer, x))):
        assert np.isnan(y[1, 2]).all()
        np.testing.assert_allclose(y[0], expected[0], atol=1e-6)
    record_property("bad_input", "NaN in x")


def test_a_negative_linear_gating_gives_nan(rng):
    experts = layer_oracle.mlp(rng, 3, 4, 7, Activation("gelu"))
    layer = layer_oracle.moe(rng, experts, 3, 4, 3, router=Router(score="linear", renormalize=True))
    layer.router_weight[...] = jnp.asarray([[1, 0, 0, 0], [2, 0, 0, 0], [0, 1, 0, 0]], jnp.float32)
    x = np.array([[[1, 1, 0, 0], [0, 0, 1, 0], [1, -1, 0, 0]]], np.float32)
    for y in (run(dense.to_model(layer), x), np.asarray(layer_oracle.ours(layer, x))):
        assert np.isfinite(y[0, 0]).all()
        np.testing.assert_array_equal(y[0, 1], 0)
        assert np.isnan(y[0, 2]).all()


def test_what_an_expert_overflows_to_counts_only_where_it_was_chosen(rng):
    layer = layer_oracle.gelu_layer(rng, dtype=jnp.float16)
    layer.experts.leaves["down"][...] = layer.experts.leaves["down"][...].at[4].set(6e4)
    layer.experts.leaves["up_bias"][...] = jnp.full((5, 7), 2, jnp.float16)
    layer.router_weight[...] = jnp.zeros((5, 4))
    y = run(dense.to_model(layer, dtype="float16"), tokens(rng, np.float16))
    assert np.isfinite(y).all()


class Module(nnx.Module):
    """Experts that are a Flax module."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones((5, 4, 4)))


def test_experts_that_are_not_known_are_refused(rng):
    with pytest.raises(FormatError, match="Flax module Module"):
        dense.to_model(layer_oracle.moe(rng, Module(), 5, 4, 2))
    with pytest.raises(FormatError, match="experts are .*known are Identity, MLP"):
        dense.to_model(layer_oracle.moe(rng, {"a": jnp.zeros((5, 3))}, 5, 4, 2))


def test_packed_and_unusual_weights_are_refused(rng):
    packed, _ = layer_oracle.random_mxfp4(rng, 5, 7, 1)
    experts = MLP(packed, layer_oracle.weight(rng, jnp.float32, 5, 32, 7))
    with pytest.raises(FormatError, match="up is BlockScaled.*dequantize"):
        dense.to_model(layer_oracle.moe(rng, experts, 5, 32, 2))
    layer = layer_oracle.gelu_layer(rng, dtype=jnp.float8_e4m3fn)
    with pytest.raises(FormatError, match="up is float8_e4m3fn"):
        dense.to_model(layer)
    with pytest.raises(FormatError, match="dtype must be"):
        dense.to_model(layer, dtype="bfloat16")


def test_contradicting_experts_are_refused(rng, record_property):
    odd = MLP(
        layer_oracle.weight(rng, jnp.float32, 5, 7, 4),
        layer_oracle.weight(rng, jnp.float32, 5, 4, 3),
        activation=Activation("geglu"),
    )
    with pytest.raises(FormatError, match="up has 7 outputs"):
        dense.to_model(layer_oracle.moe(rng, odd, 5, 4, 2))
    plain = layer_oracle.gated(rng, 5, 4, 7, Activation("swiglu"))
    plain = dataclasses.replace(plain, activation=Activation("gelu"))
    assert isinstance(plain, GatedMLP)
    with pytest.raises(FormatError, match="activation=.*gated"):
        dense.to_model(layer_oracle.moe(rng, plain, 5, 4, 2))
    uneven = dataclasses.replace(
        layer_oracle.gated(rng, 5, 4, 7, Activation("swiglu")),
        up=layer_oracle.weight(rng, jnp.float32, 5, 6, 4),
    )
    with pytest.raises(FormatError, match="up has 6 outputs"):
        dense.to_model(layer_oracle.moe(rng, uneven, 5, 4, 2))
    record_property("bad_input", "fused width odd")


def note_of(model: onnx.ModelProto) -> dict:
    return json.loads(model.metadata_props[0].value)["moe"]


def with_note(model: onnx.ModelProto, **changes) -> onnx.ModelProto:
    model.metadata_props[0].value = json.dumps({"moe": {**note_of(model), **changes}})
    return model


def without_note(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.metadata_props[:]
    return model


def broken_note(model: onnx.ModelProto) -> onnx.ModelProto:
    model.metadata_props[0].value = "{"
    return model


def without_constant(model: onnx.ModelProto) -> onnx.ModelProto:
    (index,) = (i for i, t in enumerate(model.graph.initializer) if t.name == "moe.experts.up")
    del model.graph.initializer[index]
    return model


def with_other_node(model: onnx.ModelProto) -> onnx.ModelProto:
    (erf,) = (node for node in model.graph.node if node.op_type == "Erf")
    erf.op_type = "Tanh"
    return model


def with_other_number(model: onnx.ModelProto) -> onnx.ModelProto:
    (half,) = (t for t in model.graph.initializer if t.name.startswith("0.5:"))
    half.CopyFrom(numpy_helper.from_array(np.float32(0.25), half.name))
    return model


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_note, "no dense layers"),
        (broken_note, "not JSON"),
        (without_constant, "no constant moe.experts.up"),
        (with_other_node, "changed since"),
        (with_other_number, "changed since"),
        (lambda model: with_note(model, experts="Other"), "cannot be read"),
        (lambda model: with_note(model, experts_per_token=6), "experts_per_token"),
        (lambda model: with_note(model, experts_per_token=3), "changed since"),
        (lambda model: with_note(model, static={"activation": {"kind": "relu"}}), "changed since"),
        (lambda model: with_note(model, router={"score": "best"}), "score must be"),
    ],
)
def test_a_changed_file_is_refused(damage, message, rng):
    model = damage(dense.to_model(layer_oracle.gelu_layer(rng)))
    with pytest.raises(FormatError, match=message):
        dense.read(model)
