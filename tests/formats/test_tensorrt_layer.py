"""The object with the methods of TensorRT's layer: setters, experts and back, the recipe."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_oracle import assert_same, f32, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_cases import EXPERTS, HIDDEN, INTERMEDIATE, Arrays, routed, set_dynamic, set_static

import moe_jax
from moe_jax import MLP, Activation, GatedMLP, GptOssMLP, tag
from moe_jax.experts import DynamicNVFP4, QuantizedGatedMLP, StaticFP8
from moe_jax.formats import FormatError
from moe_jax.formats.tensorrt import (
    Call,
    DataType,
    MoEActType,
    MoELayer,
    Result,
    from_experts,
    recipe,
    replay,
    to_gpt_oss,
)


def gated(rng, biases=True, **options):
    def draw(*shape):
        return rng.normal(size=(EXPERTS, *shape))

    parts = [
        weight(draw(INTERMEDIATE, HIDDEN)),
        weight(draw(INTERMEDIATE, HIDDEN)),
        weight(draw(HIDDEN, INTERMEDIATE)),
    ]
    if biases:
        parts += [f32(draw(n), "expert", "out") for n in (INTERMEDIATE, INTERMEDIATE, HIDDEN)]
    return GatedMLP(*parts, **options)


def gpt_oss(rng):
    def draw(*shape):
        return rng.normal(size=(EXPERTS, *shape))

    return GptOssMLP(
        weight(draw(2 * INTERMEDIATE, HIDDEN)),
        f32(draw(2 * INTERMEDIATE), "expert", "out"),
        weight(draw(HIDDEN, INTERMEDIATE)),
        f32(draw(HIDDEN), "expert", "out"),
    )


class TestSetters:
    def test_defaults(self):
        layer = MoELayer()
        assert layer.activation_type is MoEActType.SILU and layer.num_ranks == 1
        assert layer.quantization_to_type is DataType.FLOAT
        params = layer.swiglu_param_limit, layer.swiglu_param_alpha, layer.swiglu_param_beta
        assert params == (math.inf, 1.0, 0.0)
        with pytest.raises(FormatError, match="set_gated_weights"):
            layer.experts()

    def test_swiglu_parameters_together_and_one_by_one(self, rng):
        layer = Arrays.random(rng).layer()
        layer.set_swiglu_params(7.0, 1.702, 1.0)
        assert layer.experts().activation == Activation("swiglu", 1.702, 1.0, 7.0)
        layer.swiglu_param_limit, layer.swiglu_param_alpha = math.inf, 2
        layer.swiglu_param_beta = -1
        assert layer.experts().activation == Activation("swiglu", 2.0, -1.0)
        for name, value in (("limit", 0), ("limit", math.nan), ("alpha", math.inf)):
            with pytest.raises(FormatError, match=f"swiglu_param_{name} must be"):
                setattr(layer, f"swiglu_param_{name}", value)
        layer.activation_type = MoEActType.NONE
        with pytest.raises(FormatError, match="activation_type NONE has no parameters"):
            layer.experts()
        layer.set_swiglu_params(math.inf, 1, 0)
        assert layer.experts().activation == Activation("bilinear")

    def test_static_and_dynamic_take_each_others_place(self, rng):
        layer = Arrays.random(rng).layer()
        set_dynamic(layer, np.float32(0.5))
        assert layer.quantization_block_shape == (1, 1, 16)
        assert layer.dyn_q_output_scale_type is DataType.FP8
        assert isinstance(layer.experts().quantizer, DynamicNVFP4)
        set_static(layer, np.float32(0.25))
        quantizer = layer.experts().quantizer
        assert isinstance(quantizer, StaticFP8) and layer.quantization_to_type is DataType.FP8
        np.testing.assert_array_equal(quantizer.scale.array, [0.25] * EXPERTS)
        set_dynamic(layer, np.arange(1, EXPERTS + 1, dtype=np.float32))
        quantizer = layer.experts().quantizer
        assert isinstance(quantizer, DynamicNVFP4)
        np.testing.assert_array_equal(quantizer.global_scale.array, np.arange(1, EXPERTS + 1))

    def test_single_fields_override_and_nothing_else_changes(self, rng):
        layer = Arrays.random(rng).layer()
        layer.set_quantization_dynamic_dbl_q(0.5, DataType.FP8, (1, 2, 16), DataType.E8M0)
        layer.quantization_to_type = DataType.FP4
        with pytest.raises(FormatError, match="dyn_q_output_scale_type FP8, got FP4 and E8M0"):
            layer.experts()
        layer.dyn_q_output_scale_type = DataType.FP8
        with pytest.raises(
            FormatError, match=r"quantization_block_shape must be .* got \(1, 2, 16"
        ):
            layer.experts()
        layer.quantization_block_shape = (1, 1, 16)
        assert float(layer.experts().quantizer.global_scale.array[0]) == 0.5
        layer.quantization_to_type = DataType.FLOAT
        assert isinstance(layer.experts(), GatedMLP)
        layer.quantization_to_type = DataType.FP4
        assert isinstance(layer.experts().quantizer, DynamicNVFP4)

    @pytest.mark.parametrize("shape", [(1, 1, -1), (1, 1, 32), (1, 16), (), (-1, 1, 16), (1, 1, 0)])
    def test_blocks_of_more_than_a_token_are_refused(self, rng, shape):
        layer = Arrays.random(rng).layer()
        layer.set_quantization_dynamic_dbl_q(0.5, DataType.FP4, shape, DataType.FP8)
        with pytest.raises(FormatError, match="quantization_block_shape must be"):
            layer.experts()

    def test_minus_one_is_the_whole(self, rng):
        layer = MoELayer()
        gate, up = rng.normal(size=(2, 3, 7, 16))
        layer.set_gated_weights(gate, up, rng.normal(size=(3, 16, 7)), MoEActType.SILU)
        layer.set_quantization_dynamic_dbl_q(0.5, DataType.FP4, (1, 1, -1), DataType.FP8)
        assert isinstance(layer.experts().quantizer, DynamicNVFP4)

    def test_quantisation_that_is_not_there(self, rng):
        layer = Arrays.random(rng).layer()
        layer.quantization_to_type = DataType.FP8
        with pytest.raises(FormatError, match="needs a scale: call set_quantization_static"):
            layer.experts()
        layer.set_quantization_static(0.5, DataType.FP4)
        with pytest.raises(FormatError, match="quantization_to_type of static .* got FP4"):
            layer.experts()
        layer.set_quantization_static(np.ones(EXPERTS + 1), DataType.FP8)
        with pytest.raises(FormatError, match="is not one for 5 experts"):
            layer.experts()
        layer = MoELayer()
        layer.set_gated_weights(*np.ones((2, 3, 7, 24)), np.ones((3, 24, 7)), MoEActType.SILU)
        set_dynamic(layer, 0.5)
        with pytest.raises(FormatError, match="does not divide the intermediate size 24"):
            layer.experts()

    @pytest.mark.parametrize(
        ("scale", "error"),
        [
            (0.0, FormatError),
            (-1.0, FormatError),
            (math.nan, FormatError),
            (np.array([1.0, math.inf]), FormatError),
            (np.ones((2, 3)), FormatError),
            (3, TypeError),
            (tag(np.ones(3), "out"), FormatError),
        ],
    )
    def test_scales(self, scale, error):
        for call in (set_static, set_dynamic):
            with pytest.raises(error, match="fc_down_activation"):
                call(MoELayer(), scale)

    def test_axes_of_weights_and_biases(self, rng):
        arrays = Arrays.random(rng)
        layer = MoELayer()
        with pytest.raises(FormatError, match="fc_up_weights must have the axes"):
            layer.set_gated_weights(arrays.gate, arrays.up[0], arrays.down, MoEActType.SILU)
        with pytest.raises(TypeError, match="fc_down_weights must be floats"):
            layer.set_gated_weights(
                arrays.gate, arrays.up, arrays.down.astype(int), MoEActType.SILU
            )
        with pytest.raises(FormatError, match="activation_type must be a MoEActType, got 'silu'"):
            layer.set_gated_weights(arrays.gate, arrays.up, arrays.down, "silu")
        with pytest.raises(FormatError, match="all biases or none, fc_up_biases is None"):
            layer.set_gated_biases(arrays.biases[0], None, arrays.biases[2])
        layer.set_gated_weights(arrays.gate, arrays.up, arrays.up, MoEActType.SILU)
        with pytest.raises(FormatError, match=r"fc_down_weights must have the shape \(5, 32, 7\)"):
            layer.experts()
        layer = arrays.layer()
        layer.set_gated_biases(arrays.biases[0], arrays.biases[1], arrays.biases[0])
        with pytest.raises(FormatError, match=r"fc_down_biases must have the shape \(5, 7\)"):
            layer.experts()
        for value in (0, 1.0, True):
            with pytest.raises(FormatError, match="num_ranks must be"):
                layer.num_ranks = value

    def test_names_find_a_transposed_square_weight(self, rng, record_property):
        square = rng.normal(size=(3, 4, 4)).astype(np.float32)
        by_name = tag(square, "expert", "out", "in")
        layer = MoELayer()
        layer.set_gated_weights(by_name, by_name, by_name, MoEActType.SILU)
        np.testing.assert_array_equal(layer.experts().gate.array, square)
        layer.set_gated_weights(square, square, square, MoEActType.SILU)
        np.testing.assert_array_equal(layer.experts().gate.array, square.transpose(0, 2, 1))
        with pytest.raises(FormatError, match="fc_gate_weights must have the axes"):
            layer.set_gated_weights(by_name.rename(out="d"), by_name, by_name, MoEActType.SILU)
        record_property("bad_input", "D==I weights given transposed")


class TestConversion:
    @pytest.mark.parametrize("biases", [True, False])
    def test_gated_experts_and_back(self, rng, biases):
        experts = gated(rng, biases, activation=Activation("swiglu", 1.7, 0.5, 6.0))
        layer = from_experts(experts)
        assert layer.weights[0].axes == ("expert", "in", "out")
        np.testing.assert_array_equal(
            layer.weights[0].array, np.asarray(experts.gate.array).transpose(0, 2, 1)
        )
        assert_same(layer.experts(), experts)
        assert layer.experts().activation == experts.activation

    def test_gpt_oss_and_back(self, rng):
        experts = gpt_oss(rng)
        layer = from_experts(experts)
        np.testing.assert_array_equal(
            np.asarray(layer.weights[1].array),
            np.asarray(experts.gate_up.array)[:, 1::2].transpose(0, 2, 1),
        )
        back = to_gpt_oss(layer)
        assert_same(back, experts)
        assert back.activation == experts.activation
        x, ids, scores = routed(rng)
        got, expected = jax.jit(lambda *a: (layer(*a), moe_jax.fused_experts(*a, experts)))(
            x, ids, scores
        )
        np.testing.assert_allclose(got, expected, atol=2e-5)

    @pytest.mark.parametrize(
        "layout",
        ["interleaved", "interleaved_up_first", "concatenated", "concatenated_up_first"],
    )
    def test_mlp_with_both_lanes_in_one_matrix(self, rng, layout):
        whole = gated(rng, biases=False)
        activation = Activation("swiglu", layout=layout)
        up = activation.join_lanes(whole.gate, whole.up)
        gate, linear = activation.lanes(up)
        assert_same((gate, linear), (whole.gate, whole.up))
        assert_same(from_experts(MLP(up, whole.down, activation=activation)).experts(), whole)

    @pytest.mark.parametrize(
        "quantizer",
        [
            StaticFP8(tag(jnp.linspace(0.1, 1, EXPERTS), "expert")),
            DynamicNVFP4(tag(jnp.linspace(0.1, 1, EXPERTS), "expert")),
        ],
        ids=lambda q: type(q).__name__,
    )
    def test_quantised_experts_and_back(self, rng, quantizer):
        experts = QuantizedGatedMLP(gated(rng), quantizer)
        assert_same(from_experts(experts).experts(), experts)
        with pytest.raises(FormatError, match="quantization_to_type is FP"):
            to_gpt_oss(from_experts(experts))

    def test_refusals_name_what_cannot_be_said(self, rng, record_property):
        record_property("bad_input", "export asked of a thing the target op cannot say")

        @jax.tree_util.register_dataclass
        @dataclasses.dataclass(frozen=True)
        class Other:
            def quantize(self, hidden, rows):
                return hidden

        plain = gated(rng)
        packed = dataclasses.replace(plain, down=moe_jax.quantize_mxfp4(plain.down))
        wrong = [
            (moe_jax.Identity(), "set_gated_weights takes gated experts"),
            (MLP(plain.up, plain.down), "set_gated_weights takes gated experts"),
            (packed, "down is BlockScaled.*dequantize"),
            (dataclasses.replace(plain, activation=Activation("geglu")), "activation_type"),
            (
                dataclasses.replace(plain, activation=Activation("bilinear", limit=1.0)),
                "activation_type",
            ),
            (dataclasses.replace(plain, up_bias=None), "fc_up_biases is None"),
            (dataclasses.replace(plain, up=plain.down), "fc_up_weights must have the shape"),
            (QuantizedGatedMLP(plain, Other()), "quantization_to_type cannot say Other"),
        ]
        for experts, match in wrong:
            with pytest.raises(FormatError, match=match):
                from_experts(experts)
        with pytest.raises(FormatError, match="set_gated_biases"):
            to_gpt_oss(from_experts(gated(rng, biases=False)))
        bilinear = dataclasses.replace(plain, activation=Activation("bilinear"))
        with pytest.raises(FormatError, match="activation_type is NONE"):
            to_gpt_oss(from_experts(bilinear))


ATTRIBUTES = "activation_type|set_gated_weights|fc_up_biases|quantization_block_shape|swiglu_param"


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["swiglu", "geglu", "reglu", "bilinear"]),
    beta=st.sampled_from([0.0, 1.0, -0.5]),
    alpha=st.sampled_from([1.0, 1.702]),
    limit=st.sampled_from([None, 7.0]),
    biases=st.sampled_from(["all", "none", "some"]),
    quantizer=st.sampled_from(["none", "fp8", "nvfp4"]),
    seed=st.integers(0, 3),
    intermediate=st.sampled_from([16, 24]),
)
def test_random_layers_come_back_or_are_refused(
    kind, beta, alpha, limit, biases, quantizer, seed, intermediate
):
    """Bit for bit; TensorRT itself is not there to compare what both compute."""
    rng = np.random.default_rng(seed)
    shapes = [(3, intermediate, 5), (3, intermediate, 5), (3, 5, intermediate)]
    weights = [tag(rng.normal(size=s).astype(np.float32), "expert", "out", "in") for s in shapes]
    given_biases = [tag(rng.normal(size=s[:2]).astype(np.float32), "expert", "out") for s in shapes]
    kept = {"all": given_biases, "none": [None] * 3, "some": [given_biases[0], None, None]}[biases]
    activation = Activation(kind, alpha if kind == "swiglu" else 1.0, beta, limit)
    experts = GatedMLP(*weights, *kept, activation)
    scale = tag(np.float32([0.5, 1, 2]), "expert")
    if quantizer != "none":
        make = {"fp8": StaticFP8, "nvfp4": DynamicNVFP4}[quantizer]
        experts = QuantizedGatedMLP(experts, make(scale))
    sayable = (
        (kind == "swiglu" or (kind == "bilinear" and beta == 0 and limit is None))
        and biases != "some"
        and (quantizer != "nvfp4" or intermediate == 16)
    )
    if not sayable:
        with pytest.raises(FormatError, match=ATTRIBUTES):
            from_experts(experts)
        return
    back = from_experts(experts).experts()
    assert_same(back, experts)
    assert (back if quantizer == "none" else back.layer).activation == activation


class FakeNetwork:
    """The methods of TensorRT's network that the recipe calls; its MoE layer is ours."""

    def __init__(self):
        self.log = []

    def __getattr__(self, name):
        def call(*arguments):
            self.log.append((name, arguments))
            return FakeLayer((name, *arguments))

        return call

    def add_constant(self, shape, array):
        assert tuple(shape) == array.shape
        return FakeLayer(array)

    def add_moe(self, *inputs):
        self.moe, self.inputs = MoELayer(), inputs
        self.moe.get_output = lambda index: "output"
        return self.moe


class FakeLayer:
    def __init__(self, value):
        self.value, self.inputs = value, {}

    def get_output(self, index):
        return self.value if index == 0 else (self.value, index)

    def set_input(self, index, tensor):
        self.inputs[index] = tensor


class TestRecipe:
    def build(self, calls):
        network = FakeNetwork()
        names = "hidden_states", "selected_experts_for_tokens", "scores_for_selected_experts"
        results = replay(calls, {"network": network} | {n: n for n in names})
        assert results["moe_output"] == "output"
        return network

    @pytest.mark.parametrize("quantise", [None, set_static, set_dynamic])
    def test_x5_recipe_builds_the_same_layer(self, rng, quantise, record_property):
        layer = Arrays.random(rng).layer()
        layer.set_swiglu_params(7.0, 1.702, 1.0)
        layer.num_ranks = 2
        if quantise is not None:
            quantise(layer, np.float32(0.125))
        network = self.build(recipe(layer))
        assert network.inputs[0] == "hidden_states"
        assert_same(network.moe.experts(), layer.experts())
        assert network.moe.num_ranks == 2 and network.moe.swiglu == layer.swiglu
        record_property("row", "X5")
        record_property("status", "reference only")

    def test_calls_in_order_and_only_those_needed(self, rng):
        layer = Arrays.random(rng).layer(biases=False)
        calls = recipe(layer)
        assert [c.method for c in calls] == (
            ["add_moe"] + ["add_constant", "get_output"] * 3 + ["set_gated_weights", "get_output"]
        )
        assert calls[0].arguments == (
            Result("hidden_states"),
            Result("selected_experts_for_tokens"),
            Result("scores_for_selected_experts"),
        )
        weights = calls[-2]
        assert weights == Call(
            Result("moe"),
            "set_gated_weights",
            tuple(Result(f"fc_{n}_weights_output_0") for n in ("gate", "up", "down"))
            + (MoEActType.SILU,),
            weights.result,
        )
        assert calls[1].arguments[0] == (EXPERTS, HIDDEN, INTERMEDIATE)

    def test_hidden_states_are_quantised_outside_by_the_same_method(self, rng):
        layer = Arrays.random(rng).layer()
        with pytest.raises(FormatError, match="quantization_to_type is FLOAT"):
            recipe(layer, hidden_states_scale=0.5)
        set_static(layer, np.float32(0.25))
        with pytest.raises(FormatError, match="hidden_states_scale must have the shape"):
            recipe(layer, hidden_states_scale=np.ones(EXPERTS))
        network = self.build(recipe(layer, hidden_states_scale=np.float32(0.5)))
        assert [name for name, _ in network.log] == ["add_quantize", "add_dequantize"]
        tensor, scale, to_type = network.log[0][1]
        assert (tensor, float(scale), to_type) == ("hidden_states", 0.5, DataType.FP8)
        assert network.inputs[0][0] == "add_dequantize"
        set_dynamic(layer, np.float32(0.25))
        network = self.build(recipe(layer, hidden_states_scale=np.float32(0.5)))
        names = ["add_dynamic_quantize", "add_dequantize", "add_dequantize"]
        assert [name for name, _ in network.log] == names
        assert network.log[0][1] == ("hidden_states", 2, 16, DataType.FP4, DataType.FP8)

    def test_convert_gets_arrays_and_enums(self, rng):
        layer = Arrays.random(rng).layer()
        set_static(layer, np.float32(0.25))
        seen = []
        given = {"network": FakeNetwork()} | {r.name: r.name for r in recipe(layer)[0].arguments}
        replay(recipe(layer), given, lambda value: seen.append(value) or value)
        assert {type(v) for v in seen} == {np.ndarray, MoEActType, DataType}
        assert len(seen) == 7 + 2
