"""`com.microsoft.MoE` and `QMoE` exports, run by onnxruntime: the rows of the feature table."""

import functools

import jax
import jax.numpy as jnp
import microsoft_oracle as oracle
import numpy as np
import onnx
import pytest
from flax import nnx
from microsoft_oracle import check_error, random_layer, relative_error, run
from mxfp4_oracle import decode_mxfp4

import moe_jax
from moe_jax import Router
from moe_jax.activations import GPT_OSS_ACTIVATION, Activation
from moe_jax.experts.prepare import prepare_experts
from moe_jax.formats.onnx import microsoft
from moe_jax.formats.onnx import microsoft_matrices as matrices

SIZES = (4, 5, 7)  # experts, d, intermediate
PACKED_SIZES = (3, 32, 64)


def tokens(rng, layer, count=6, scale=1.0, dtype=np.float32):
    d = layer.router["weight"].shape[1]
    return (scale * rng.normal(size=(count, d))).astype(dtype)


def errors(layer, x, **options):
    """Of onnxruntime and of the library against each other, and of both against float64."""
    theirs = run(microsoft.to_model(layer.ours, **options), x)
    ours = np.asarray(jax.jit(lambda x: layer.ours(x))(x))
    expected = layer(x)
    return max(
        relative_error(theirs.astype(np.float64), ours.astype(np.float64)),
        relative_error(theirs.astype(np.float64), expected),
        relative_error(ours.astype(np.float64), expected),
    )


ROUTERS = {
    "R1": (Router(), 1),
    "R2": (Router(order="before_top_k"), 0),
    "R3": (Router(order="before_top_k", renormalize=True), 1),
}


def check_router(rng, record_property, row):
    router, normalize = ROUTERS[row]
    layer = random_layer(rng, router=router, router_bias=True)
    model = microsoft.to_model(layer.ours)
    attributes = oracle.attributes_of(oracle.node_of(model))
    assert attributes["normalize_routing_weights"] == normalize and attributes["k"] == 2
    check_error(record_property, errors(layer, tokens(rng, layer)), 1e-6, row=row)


def test_r1_softmax_after_top_k_matches_ort(rng, record_property):
    check_router(rng, record_property, "R1")


def test_r2_softmax_before_top_k_matches_ort(rng, record_property):
    check_router(rng, record_property, "R2")


def test_r3_renormalised_softmax_matches_ort(rng, record_property):
    check_router(rng, record_property, "R3")


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("order", ["before_top_k", "after_top_k"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_r7_separate_selection_and_weights_match_ort(
    rng, record_property, score, order, renormalize
):
    router = Router(score, order, renormalize=renormalize, scale=2.5)
    error = 0.0
    for make in (functools.partial(oracle.integer_weight, bits=4, group_size=16, zero_points=True),
                 oracle.mxfp4_weight):  # fmt: skip
        layer = random_layer(
            rng, router=router, router_bias=True, selection_bias=True, sizes=PACKED_SIZES, make=make
        )
        x = tokens(rng, layer)
        model = microsoft.to_model(layer.ours)
        assert len(oracle.node_of(model).input) == 15
        error = max(error, relative_error(run(model, x), layer(x)))
    if not renormalize:
        ours = np.asarray(jax.jit(lambda x: layer.ours(x))(x))
        error = max(error, relative_error(run(model, x), ours))
    check_error(record_property, error, 1e-6, row="R7")


def test_r2_of_qmoe_says_its_weights_apart(rng, record_property):
    """Without `router_weights` the CPU kernel of QMoE normalises whatever the attribute says."""
    layer = random_layer(
        rng, router=Router(order="before_top_k"), sizes=PACKED_SIZES, make=oracle.mxfp4_weight
    )
    check_error(record_property, errors(layer, tokens(rng, layer)), 1e-6, row="R2")
    model = microsoft.to_model(layer.ours)
    node = oracle.node_of(model)
    del node.input[8:]
    x = tokens(rng, layer)
    assert relative_error(run(model, x), layer(x)) > 1e-2


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kind", ["relu", "silu", "identity", "gelu_tanh"])
def test_e1_plain_activation_matches_ort(rng, record_property, kind, biases):
    layer = random_layer(rng, activation=Activation(kind), biases=biases)
    x = tokens(rng, layer)
    if biases:
        error = errors(layer, x)
    else:
        error = relative_error(run(microsoft.to_model(layer.ours), x), layer(x))
    check_error(record_property, error, 1.7e-6, row="E1")


LAYOUTS = ["interleaved", "interleaved_up_first", "concatenated", "concatenated_up_first"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_e4_clamped_swiglu_of_every_layout_matches_ort(rng, record_property, layout):
    activation = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0, layout=layout)
    layer = random_layer(rng, activation=activation)
    x = tokens(rng, layer, scale=12.0)
    hidden = np.abs(np.einsum("td,ehd->teh", x, layer.weights["up"]))
    assert (hidden > 7).mean() > 0.1
    check_error(record_property, errors(layer, x), 3e-6, row="E4")


def test_e4_gpt_oss_experts_match_ort(rng, record_property):
    layer = random_layer(rng, experts="GptOssMLP", activation=GPT_OSS_ACTIVATION)
    check_error(record_property, errors(layer, tokens(rng, layer, scale=12.0)), 3e-6, row="E4")


@pytest.mark.parametrize("biases", [False, True])
def test_e3_three_matrices_match_ort(rng, record_property, biases):
    """The CPU kernel has no fc3; gate and up go into one matrix."""
    layer = random_layer(rng, experts="GatedMLP", activation=Activation("swiglu"), biases=biases)
    check_error(record_property, errors(layer, tokens(rng, layer)), 4e-6, row="E3")


def test_q1_mxfp4_as_int8_matches_ort(rng, record_property):
    layer = random_layer(
        rng,
        experts="GptOssMLP",
        activation=GPT_OSS_ACTIVATION,
        sizes=PACKED_SIZES,
        make=oracle.mxfp4_weight,
    )
    model = microsoft.to_model(layer.ours)
    attributes = oracle.attributes_of(oracle.node_of(model))
    assert (attributes["expert_weight_bits"], attributes["block_size"]) == (8, 32)
    check_error(record_property, errors(layer, tokens(rng, layer)), 2e-6, row="Q1")


def test_q1_every_code_and_scale_is_carried_exactly(record_property):
    """16 codes with bytes 0 to 254, as the float32 that integers and scales stand for."""
    codes = np.tile(np.arange(16, dtype=np.uint8).repeat(2), (1, 255, 1))
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = np.arange(255, dtype=np.uint8)[None]
    packed = moe_jax.BlockScaled(
        moe_jax.tag(blocks[:, None], "expert", "out", "block", "byte"),
        moe_jax.tag(scales[:, None], "expert", "out", "block"),
    )
    matrix = matrices.matrix_of("up", packed, np.float32)
    with np.errstate(over="ignore"):
        expected = (decode_mxfp4(blocks[:, None], scales[:, None])).astype(np.float32)
        assert matrix.scales.dtype == np.float32 and matrix.values.dtype == np.uint8
        # in float32, as the kernel does it
        blocked = matrix.values.reshape(1, 1, 255, 32).astype(np.float32) - np.float32(128)
        decoded = (blocked * matrix.scales[..., None]).reshape(1, 1, -1)
    np.testing.assert_array_equal(decoded, expected)
    again = matrices.weight_of(matrix, mxfp4=True)
    np.testing.assert_array_equal(again.scales.array, packed.scales.array)
    # code 8 is minus zero, which becomes zero
    np.testing.assert_array_equal(again.blocks.array, np.where(blocks == 0x88, 0, blocks)[:, None])
    check_error(record_property, 0.0, 0.0, row="Q1")


@pytest.mark.parametrize("byte", [0, 1, 126])
def test_q1_scales_down_to_the_least_survive_ort(rng, record_property, byte):
    layer = random_layer(
        rng, activation=Activation("identity"), sizes=PACKED_SIZES, make=oracle.mxfp4_weight,
        biases=False, k=1,
    )  # fmt: skip
    experts = layer.ours.experts
    scale = jnp.full_like(experts.leaves["up.scales"].get_value(), byte)
    experts.leaves["up.scales"].set_value(scale)
    large = jnp.full_like(experts.leaves["down.scales"].get_value(), 250 - byte)
    experts.leaves["down.scales"].set_value(large)
    for name in ("up", "down"):
        blocks = np.asarray(experts.leaves[f"{name}.blocks"].get_value())
        scales = np.asarray(experts.leaves[f"{name}.scales"].get_value())
        layer.weights[name] = decode_mxfp4(blocks, scales)
    x = tokens(rng, layer)
    error = relative_error(run(microsoft.to_model(layer.ours), x), layer(x))
    check_error(record_property, error, 1e-6, row="Q1")


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_q4_integers_match_ort(rng, record_property, bits, group_size, zero_points):
    make = functools.partial(
        oracle.integer_weight, bits=bits, group_size=group_size, zero_points=zero_points
    )
    layer = random_layer(
        rng, experts="GatedMLP", activation=Activation("swiglu"), sizes=(3, 32, 96), make=make
    )
    x = tokens(rng, layer)
    if group_size == 16 and zero_points:
        error = errors(layer, x)
    else:
        error = relative_error(run(microsoft.to_model(layer.ours), x), layer(x))
    check_error(record_property, error, 1e-6, row="Q4")


def test_x3_rows_of_any_rank_and_number(rng, record_property):
    layer = random_layer(rng)
    model = microsoft.to_model(layer.ours, token_axes=("batch", 3))
    x = tokens(rng, layer, 6)
    expected = layer(x)
    error = relative_error(run(model, x.reshape(2, 3, -1)), expected.reshape(2, 3, -1))
    check_error(record_property, error, 1e-6, row="X3")
    assert run(microsoft.to_model(layer.ours), x[:0]).shape == (0, 5)
    record_property("bad_input", "T=0")


@pytest.mark.parametrize("make", [oracle.float_weight, oracle.mxfp4_weight])
def test_float16_layers_match_ort_to_its_rounding(rng, make):
    packed = make is oracle.mxfp4_weight
    layer = random_layer(rng, dtype=np.float16, sizes=PACKED_SIZES if packed else SIZES, make=make)
    x = tokens(rng, layer, dtype=np.float16)
    model = microsoft.to_model(layer.ours)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert relative_error(run(model, x), layer(x)) <= 1e-3


def test_x3_float_type_casts_bfloat16_without_loss(rng, record_property):
    layer = random_layer(rng, dtype=jnp.bfloat16)
    x = tokens(rng, layer)
    model = microsoft.to_model(layer.ours, float_type=np.float32)
    check_error(record_property, relative_error(run(model, x), layer(x)), 1e-6, row="X3")


class Model(nnx.Module):
    """Two layers, one inside a list."""

    def __init__(self, first, second):
        self.blocks = nnx.List([first])
        self.last = second


def test_x3_all_layers_of_a_model_with_external_data(rng, record_property, tmp_path):
    layers = [random_layer(rng), random_layer(rng, sizes=(3, 7, 5), k=1)]
    path = tmp_path / "model.onnx"
    microsoft.write(path, Model(*(one.ours for one in layers)), external_data="model.data")
    assert path.stat().st_size < (tmp_path / "model.data").stat().st_size + 10_000
    onnx.checker.check_model(path)
    session = oracle.session(onnx.load(path))
    named = dict(zip(("blocks.0", "last"), layers, strict=True))
    inputs = {f"{name}.x": tokens(rng, one) for name, one in named.items()}
    error = max(
        relative_error(session.run([f"{name}.y"], inputs)[0], one(inputs[f"{name}.x"]))
        for name, one in named.items()
    )
    check_error(record_property, error, 1e-6, row="X3")
    again = microsoft.read(path)
    assert list(again) == list(named)
    for name, layer in named.items():
        oracle.assert_same_layer(again[name], layer.ours)


@pytest.mark.parametrize("experts", ["MLP", "GatedMLP", "GptOssMLP"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_x3_round_trip_is_bit_for_bit(rng, record_property, experts, layout):
    activation = Activation("swiglu", alpha=1.702, beta=0.1, limit=7.0, layout=layout)
    for router in [router for router, _ in ROUTERS.values()] + [Router(scale=1.5)]:
        layer = random_layer(
            rng, experts=experts, activation=activation, router=router, router_bias=True
        ).ours
        for target in (microsoft.CPU, microsoft.CUDA):
            model = microsoft.to_model(layer, target=target)
            oracle.assert_same_layer(microsoft.read(model, target=target)["moe"], layer)
    check_error(record_property, 0.0, 0.0, row="X3")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_x3_round_trip_of_types(rng, record_property, dtype):
    """The router keeps the type it is stored in, whatever the experts' is."""
    for router_type in (jnp.bfloat16, jnp.float16, jnp.float32):
        layer = random_layer(rng, dtype=jnp.dtype(dtype), router_bias=True).ours
        for variable in (layer.router_weight, layer.router_bias):
            variable.set_value(variable.get_value().astype(router_type))
        model = microsoft.to_model(layer, target=microsoft.CUDA)
        oracle.assert_same_layer(microsoft.read(model)["moe"], layer)
    check_error(record_property, 0.0, 0.0, row="X3")


def test_q1_prepared_experts_are_written_as_those_they_were_made_of(rng, record_property):
    layer = random_layer(
        rng,
        experts="GptOssMLP",
        activation=GPT_OSS_ACTIVATION,
        sizes=PACKED_SIZES,
        make=oracle.mxfp4_weight,
    ).ours
    prepared = moe_jax.MoE(
        prepare_experts(layer.experts.tree()),
        moe_jax.tag(layer.router_weight.get_value(), "expert", "d"),
        experts_per_token=2,
    )
    assert microsoft.to_model(prepared) == microsoft.to_model(layer)
    check_error(record_property, 0.0, 0.0, row="Q1")


def test_x3_round_trip_of_mxfp4(rng, record_property):
    make = functools.partial(oracle.mxfp4_weight, minus_zero=False)
    for experts in ("MLP", "GatedMLP"):
        layer = random_layer(
            rng, sizes=PACKED_SIZES, make=make, experts=experts, activation=Activation("swiglu")
        ).ours
        oracle.assert_same_layer(microsoft.read(microsoft.to_model(layer))["moe"], layer)
    check_error(record_property, 0.0, 0.0, row="X3")
