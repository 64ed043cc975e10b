"""CustomMoE nodes, run by onnxruntime through the operator's definition in standard operators."""

import dataclasses

import jax.numpy as jnp
import layer_oracle
import numpy as np
import onnx
import onnx.inliner
import onnxruntime_tools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from moe_jax import MLP, Activation, MoE, Router, tag
from moe_jax.formats import FormatError
from moe_jax.formats.onnx import custom
from moe_jax.formats.openvino.package import load_openvino
from moe_jax.variables import value

openvino = load_openvino()

RUNTIME = onnxruntime_tools.VERSION
FUNCTION = custom.custom_moe_function()
DTYPES = {"float32": 1e-6, "float16": 5e-3}


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return onnxruntime_tools.run(model, {"x": x})


def runnable(layer: MoE, **options) -> onnx.ModelProto:
    return custom.to_model(layer, functions=[FUNCTION], **options)


def tokens(rng, dtype=np.float32, *, hidden: int = 4) -> np.ndarray:
    return rng.normal(size=(2, 3, hidden)).astype(dtype)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(abs(found - expected).max() / max(1, abs(expected).max()))


@pytest.mark.parametrize("router", [Router(), Router(order="before_top_k", renormalize=True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_x1_the_node_matches_onnxruntime(dtype, router, rng, record_property):
    layer = layer_oracle.gelu_layer(rng, dtype=jnp.dtype(dtype), router=router)
    x = tokens(rng, dtype)
    y = run(runnable(layer), x)
    assert y.dtype == x.dtype
    error = relative(y, layer_oracle.evaluate(layer, x))
    assert error < DTYPES[dtype]
    np.testing.assert_allclose(y, layer_oracle.ours(layer, x), atol=DTYPES[dtype])
    record_property("row", "X1")
    record_property("error", error)
    record_property("with", f"{RUNTIME}, {dtype}, by a local function")


def test_x1_the_node_is_what_the_swin_exporter_writes(rng, record_property):
    layer = layer_oracle.gelu_layer(rng)
    model = custom.to_model({"layers.0.blocks.1.mlp": layer}, expert_dtype="float16")
    (node,) = (n for n in model.graph.node if n.op_type == "CustomMoE")
    name = "layers.0.blocks.1.mlp"
    assert (node.domain, node.name) == ("trt.plugins", name)
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {
        "top_k": 2,
        "num_experts": 5,
        "in_features": 4,
        "hidden_features": 7,
        "activation": b"gelu",
        "plugin_version": b"1",
        "plugin_namespace": b"",
    }
    assert {o.domain: o.version for o in model.opset_import} == {"": 17, "trt.plugins": 1}
    assert list(node.input) == [f"{name}.x"] + [
        f"{name}.{part}" for part in ("router.weight", "w1", "b1", "w2", "b2")
    ]
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    expected = {
        "router.weight": ((5, 4), np.float32),
        "w1": ((5, 4, 7), np.float16),
        "b1": ((5, 7), np.float16),
        "w2": ((5, 7, 4), np.float16),
        "b2": ((5, 4), np.float16),
    }
    for part, (shape, dtype) in expected.items():
        array = constants[f"{name}.{part}"]
        assert (array.shape, array.dtype) == (shape, dtype), part
    up = np.asarray(layer.experts.tree().up.untag("expert", "in", "out"))
    np.testing.assert_array_equal(constants[f"{name}.w1"], up.astype(np.float16))
    assert not model.functions
    record_property("row", "X1")
    record_property("error", 0.0)
    record_property("with", f"onnx.checker {onnx.__version__}")


def test_x1_inlined_the_node_matches_openvino(rng, record_property):
    layer, x = layer_oracle.gelu_layer(rng), tokens(rng)
    model = onnx.inliner.inline_local_functions(runnable(layer))
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    error = relative(compiled(x)[0], layer_oracle.evaluate(layer, x))
    assert error < 1e-6
    record_property("row", "X1")
    record_property("error", error)
    record_property("with", f"openvino {openvino.__version__.split('-')[0]}, inlined")


def test_without_the_definition_onnxruntime_refuses_the_node(rng):
    model = custom.to_model(layer_oracle.gelu_layer(rng))
    with pytest.raises(Exception, match="CustomMoE"):
        onnxruntime_tools.session(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_comes_back_with_the_same_bits(dtype, rng):
    layer = layer_oracle.gelu_layer(rng, dtype=jnp.dtype(dtype))
    model = onnx.load_from_string(runnable(layer).SerializeToString())
    layer_oracle.assert_same_layer(custom.read(model)["moe"], layer)


def test_experts_of_half_precision_keep_the_router(rng):
    layer = layer_oracle.gelu_layer(rng)
    back = custom.read(custom.to_model(layer, expert_dtype="float16"))["moe"]
    assert back.experts.tree().up.dtype == jnp.float16
    np.testing.assert_array_equal(
        value(back.router_weight).array, value(layer.router_weight).array, strict=True
    )


def test_trap_3_square_weights_keep_their_orientation(rng, record_property):
    layer = layer_oracle.gelu_layer(rng, hidden=4, intermediate=4)
    x = tokens(rng)
    model = runnable(layer)
    assert relative(run(model, x), layer_oracle.evaluate(layer, x)) < 1e-6
    layer_oracle.assert_same_layer(custom.read(model)["moe"], layer)
    record_property("trap", "3")


def test_trap_4_the_node_is_the_gelu_of_erf(rng, record_property):
    layer = layer_oracle.gelu_layer(rng)
    experts = dataclasses.replace(layer.experts.tree(), activation=Activation("gelu_tanh"))
    other = MoE(experts, value(layer.router_weight), experts_per_token=2)
    with pytest.raises(FormatError, match="activation=.*gelu_tanh.*erf"):
        custom.to_model(other)
    x = 3 * tokens(rng)
    y = run(runnable(layer), x)
    assert relative(y, layer_oracle.evaluate(layer, x)) < 1e-6
    assert relative(y, layer_oracle.evaluate(other, x)) > 1e-5
    record_property("trap", "4")


def test_trap_5_of_equal_logits_the_lowest_expert_is_chosen(rng, record_property):
    layer = layer_oracle.gelu_layer(rng)
    layer.router_weight[...] = jnp.zeros((5, 4))
    x = tokens(rng)
    y = run(runnable(layer), x)
    assert relative(y, layer_oracle.evaluate(layer, x)) < 1e-6
    np.testing.assert_allclose(y, layer_oracle.ours(layer, x), atol=1e-6)
    record_property("trap", "5")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_tokens_are_no_tokens(shape, rng, record_property):
    layer = layer_oracle.gelu_layer(rng)
    x = np.zeros(shape, np.float32)
    assert run(runnable(layer), x).shape == layer_oracle.ours(layer, x).shape == shape
    record_property("bad_input", "no tokens")


def test_a_token_that_is_not_a_number_stays_alone(rng, record_property):
    layer = layer_oracle.gelu_layer(rng)
    x = tokens(rng)
    expected = run(runnable(layer), x)
    x[1, 2] = np.nan
    for y in (run(runnable(layer), x), np.asarray(layer_oracle.ours(layer, x))):
        assert np.isnan(y[1, 2]).all()
        np.testing.assert_allclose(y[0], expected[0], atol=1e-6)
    record_property("bad_input", "NaN in x")


@st.composite
def custom_layers(draw) -> tuple[MoE, np.ndarray, str]:
    """A layer of six experts, tokens for it, and what of the layer the node cannot say."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    wrong = draw(st.sampled_from([*[""] * 12, *WRONG]))
    dtype = jnp.dtype(draw(st.sampled_from(["float32", "float32", "float16"])))
    options = {
        "router": draw(
            st.sampled_from(
                [
                    Router(),
                    Router(renormalize=True),
                    Router(order="before_top_k", renormalize=True),
                ]
            )
        )
    }
    activation, biases = Activation("gelu"), True
    if wrong == "router":
        options["router"] = Router(
            score=draw(st.sampled_from(["softmax", "sigmoid", "linear"])),
            order="before_top_k",
            scale=draw(st.sampled_from([1.0, 0.5])),
        )
    elif wrong in ("router_bias", "selection_bias"):
        options[wrong] = tag(layer_oracle.random_array(rng, jnp.float32, 6), "expert")
    elif wrong == "tokens_per_expert_ratio":
        options[wrong] = 2.0
    elif wrong == "activation":
        activation = Activation(draw(st.sampled_from(["relu", "silu", "gelu_tanh", "geglu"])))
    elif wrong == "up_bias":
        biases = False
    experts = layer_oracle.mlp(rng, 6, 4, 5, activation, dtype, biases)
    if wrong == "experts":
        experts = layer_oracle.gated(rng, 6, 4, 5, Activation("swiglu"), dtype)
    elif wrong == "up is bfloat16":
        experts = layer_oracle.mlp(rng, 6, 4, 5, activation, jnp.bfloat16)
    count = draw(st.integers(1, 3))
    layer = layer_oracle.moe(rng, experts, 6, 4, count, **options)
    x = rng.normal(size=(2, draw(st.sampled_from([1, 3])), 4)).astype(dtype)
    return layer, x, wrong


WRONG = (
    "router",
    "router_bias",
    "selection_bias",
    "tokens_per_expert_ratio",
    "activation",
    "up_bias",
    "experts",
    "up is bfloat16",
)


def test_x1_random_layers_match_onnxruntime_or_are_refused(record_property):
    errors = {dtype: [0.0] for dtype in DTYPES}

    @settings(max_examples=500, derandomize=True, deadline=None, database=None)
    @given(custom_layers())
    def check(case):
        layer, x, wrong = case
        if wrong:
            with pytest.raises(FormatError, match=wrong):
                custom.to_model(layer)
            return
        found = errors[str(x.dtype)]
        found.append(relative(run(runnable(layer), x), layer_oracle.evaluate(layer, x)))
        assert found[-1] < DTYPES[str(x.dtype)]

    check()
    record_property("row", "X1")
    record_property("error", max(errors["float32"]))
    record_property("with", f"{RUNTIME}, {len(errors['float32']) - 1} random layers")
    record_property("bad_input", "export of what the target cannot say")


def big_layer(rng, num_experts: int, experts_per_token: int) -> MoE:
    experts = layer_oracle.mlp(rng, num_experts, 3, 2, Activation("gelu"))
    return layer_oracle.moe(rng, experts, num_experts, 3, experts_per_token)


def test_the_plugins_limits(rng):
    x = tokens(rng, hidden=3)
    layer = big_layer(rng, 128, 8)
    assert relative(run(runnable(layer), x), layer_oracle.evaluate(layer, x)) < 1e-6
    with pytest.raises(FormatError, match="num_experts=129.*128"):
        custom.to_model(big_layer(rng, 129, 8))
    with pytest.raises(FormatError, match="experts_per_token=9.*8"):
        custom.to_model(big_layer(rng, 128, 9))


def test_packed_experts_are_refused(rng):
    packed, _ = layer_oracle.random_mxfp4(rng, 5, 7, 1)
    experts = MLP(
        packed,
        layer_oracle.weight(rng, jnp.float32, 5, 32, 7),
        layer_oracle.bias(rng, jnp.float32, 5, 7),
        layer_oracle.bias(rng, jnp.float32, 5, 32),
    )
    with pytest.raises(FormatError, match="up is BlockScaled.*dequantize"):
        custom.to_model(layer_oracle.moe(rng, experts, 5, 32, 2))


def test_numbers_beyond_half_precision_are_refused(rng):
    layer = layer_oracle.gelu_layer(rng)
    layer.experts.leaves["down_bias"][...] = jnp.full((5, 4), 1e5)
    with pytest.raises(FormatError, match="b2 holds numbers.*float16"):
        custom.to_model(layer, expert_dtype="float16")
    with pytest.raises(FormatError, match="expert_dtype must be"):
        custom.to_model(layer, expert_dtype="int8")


def damage_attribute(name: str, given):
    def damage(model: onnx.ModelProto) -> None:
        (node,) = (n for n in model.graph.node if n.op_type == "CustomMoE")
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if given is not None:
            node.attribute.append(helper.make_attribute(name, given))

    return damage


def damage_constant(name: str, array: np.ndarray | None):
    def damage(model: onnx.ModelProto) -> None:
        kept = [t for t in model.graph.initializer if t.name != f"moe.{name}"]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        if array is not None:
            model.graph.initializer.append(numpy_helper.from_array(array, f"moe.{name}"))

    return damage


def drop_input(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[5]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_attribute("top_k", None), "top_k"),
        (damage_attribute("top_k", 0), "positive"),
        (damage_attribute("top_k", 6), "top_k=6 of num_experts=5"),
        (damage_attribute("top_k", "2"), "positive integers"),
        (damage_attribute("activation", "relu"), "activation must be 'gelu', got 'relu'"),
        (damage_attribute("plugin_version", "2"), "plugin_version"),
        (damage_attribute("dropout", 1), "dropout"),
        (damage_attribute("hidden_features", 6), "w1 must have"),
        (damage_constant("w1", np.zeros((5, 7, 4), np.float32)), r"w1 must have \(5, 4, 7\)"),
        (damage_constant("w2", np.zeros((5, 7, 4), np.float16)), "all be one of"),
        (damage_constant("router.weight", np.zeros((5, 4), np.float16)), "router_w must be"),
        (damage_constant("b1", None), "b1"),
        (drop_input, "6 inputs"),
    ],
)
def test_a_damaged_node_is_refused(damage, message, rng, record_property):
    model = custom.to_model(layer_oracle.gelu_layer(rng))
    damage(model)
    with pytest.raises(FormatError, match=message):
        custom.read(model)
    record_property("bad_input", "attributes and shapes of a node that do not agree")


def test_a_file_without_such_nodes_is_refused(rng, tmp_path):
    model = custom.to_model(layer_oracle.gelu_layer(rng))
    path = tmp_path / "layer.onnx"
    onnx.save(model, path)
    assert list(custom.read(path)) == ["moe"]
    model.graph.node[0].op_type = "Other"
    with pytest.raises(FormatError, match="no trt.plugins.CustomMoE"):
        custom.read(model)
