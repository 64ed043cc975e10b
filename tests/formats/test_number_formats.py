"""Number formats against ONNX Runtime: QDQ and casts of FP8, QMoE's integers, MXFP4 as integers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnxruntime_tools
import pytest
from mxfp4_oracle import nibbles
from onnx import TensorProto, helper, numpy_helper

import moe_jax
from moe_jax import GptOssMLP, tag
from moe_jax.activations import Activation
from moe_jax.quantization import (
    BlockScaled,
    PackedIntegers,
    fake_quantize_fp8,
    quantize_integers,
    quantize_nvfp4,
)
from moe_jax.quantization.fp8 import to_fp8

RUNTIME = onnxruntime_tools.VERSION
EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 3, 64, 32, 5


def run(nodes, inputs, initializers=(), output_type=TensorProto.FLOAT):
    """What a graph of float inputs makes of them, in ONNX Runtime."""
    graph = helper.make_graph(
        nodes,
        "check",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", output_type, None)],
        list(initializers),
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    return onnxruntime_tools.run(model, dict(inputs))


def fp8_zero():
    return helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [1], b"\0", raw=True)


def quantize_dequantize(x, scale, axis):
    zero = helper.make_tensor(
        "zero", TensorProto.FLOAT8E4M3FN, scale.shape, bytes(scale.size), raw=True
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], axis=axis),
    ]
    return run(nodes, {"x": x}, [numpy_helper.from_array(scale, "scale"), zero])


@pytest.mark.parametrize("scale", [[0.0173], [0.5, 3e-3, 1.7]], ids=["one", "experts"])
def test_q3_fp8_qdq_is_exact(rng, scale, record_property):
    scale = np.array(scale, np.float32)
    spread = np.array([1e-3, 1, 1e3, 1e5], np.float32)[:, None, None]
    x = rng.normal(size=(4, EXPERTS, 500)).astype(np.float32) * spread
    x[0, 0, :7] = 0, -0.0, 448, -464, 1e30, np.nan, 2.0**-10
    if scale.size == 1:
        scale = scale.reshape(())
    got = jax.jit(fake_quantize_fp8)(
        tag(jnp.asarray(x), "s", "expert", "in"), tag(scale, *("expert",)[: scale.ndim])
    )
    expected = quantize_dequantize(x, scale, axis=1)
    np.testing.assert_array_equal(np.isnan(got.array), np.isnan(expected))
    error = float(np.nanmax(np.abs(np.asarray(got.array) - expected)))
    record_property("row", "Q3")
    record_property("with", f"{RUNTIME} QuantizeLinear, DequantizeLinear")
    record_property("error", error)
    assert error == 0


def test_q2_block_scales_are_cast_as_onnxruntime_does(rng, record_property):
    """The E4M3 scales of NVFP4 blocks, by a Cast of ONNX Runtime of what is to be cast."""
    w = rng.normal(size=(200, 64)).astype(np.float32) * np.exp(rng.normal(size=(200, 1)) * 2)
    w = w.astype(np.float32)
    w[0, :16], w[1, :16], w[2, 3] = 0, 1e-30, np.nan
    factor = np.float32(0.0021)
    got = jax.jit(quantize_nvfp4, static_argnums=1)(
        tag(jnp.asarray(w), "out", "in"), "in", tag(jnp.asarray(factor))
    )
    amax = np.abs(w.reshape(200, 4, 16)).max(-1)
    scales = np.clip(amax / np.float32(6) / factor, np.float32(2**-6), np.float32(448))
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT8E4M3FN, saturate=1),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    expected = run(nodes, {"x": scales})
    ours = np.asarray(got.scales.array).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    record_property("row", "Q2")
    record_property("with", f"{RUNTIME} Cast to float8e4m3fn, and ml_dtypes")
    error = float(np.nanmax(np.abs(ours - expected)))
    record_property("error", error)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
    assert error == 0
    codes = (w.reshape(200, 4, 16) / (expected * factor)[..., None]).astype(ml_dtypes.float4_e2m1fn)
    decoded = codes.astype(np.float32) * expected[..., None] * factor
    got = np.asarray(jax.jit(lambda w: w.dequantize(jnp.float32))(got).array).reshape(200, 4, 16)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(got[known], decoded[known])
    assert np.isnan(got[~known]).all()


def test_cast_overflow_saturates_as_in_onnxruntime_and_not_as_in_jax(rng):
    x = np.array([447, 464, 465, 500, -1e9, np.inf, -np.inf, np.nan], np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT8E4M3FN, saturate=1),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    np.testing.assert_array_equal(
        np.asarray(to_fp8(jnp.asarray(x))).astype(np.float32), run(nodes, {"x": x})
    )
    assert np.isnan(np.asarray(jnp.asarray(x).astype(jnp.float8_e4m3fn))[3].astype(np.float32))


def qmoe(layer, x, logits, experts_per_token, **attributes):
    """Experts with integer weights, run by ONNX Runtime's QMoE, built here by hand."""
    tensors = {"fc1_bias": layer.gate_up_bias.array, "fc2_bias": layer.down_bias.array}
    by_row = layer.gate_up.scales.size("group") == 1
    for name, w in (("fc1", layer.gate_up), ("fc2", layer.down)):
        codes = np.asarray(w.codes.array)
        tensors[f"{name}_w"] = codes.reshape(*codes.shape[:2], -1)
        scales = np.asarray(w.scales.array)
        tensors[f"{name}_s"] = scales[..., 0] if by_row else scales
        if w.zero_points is not None:
            each, zeros = 8 // w.bits, np.asarray(w.zero_points.array)
            zeros = zeros[..., 0] if by_row else zeros
            padded = np.pad(zeros, [(0, 0)] * (zeros.ndim - 1) + [(0, -zeros.shape[-1] % each)])
            parts = [padded[..., n::each] << (w.bits * n) for n in range(each)]
            tensors[f"{name}_z"] = np.bitwise_or.reduce(parts)
    names = ["x", "logits", "fc1_w", "fc1_s", "fc1_bias", "fc2_w", "fc2_s", "fc2_bias"]
    names += ["", "", "", "fc1_z", "fc2_z"] if "fc1_z" in tensors else []
    if not by_row:
        attributes["block_size"] = layer.gate_up.group_size
    node = helper.make_node(
        "QMoE", names, ["y"], domain="com.microsoft", k=experts_per_token,
        expert_weight_bits=layer.gate_up.bits, activation_type="swiglu", swiglu_fusion=1,
        normalize_routing_weights=1, activation_alpha=layer.activation.alpha,
        activation_beta=layer.activation.beta, swiglu_limit=layer.activation.limit, **attributes,
    )  # fmt: skip
    initializers = [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()]
    return run([node], {"x": x, "logits": logits}, initializers)


def integer_layer(rng, quantize):
    def weight(outputs, inputs):
        w = rng.normal(size=(EXPERTS, outputs, inputs)).astype(np.float32) / np.sqrt(inputs)
        return jax.jit(quantize)(tag(jnp.asarray(w, jnp.float32), "expert", "out", "in"))

    def bias(size):
        return tag(jnp.asarray(rng.normal(size=(EXPERTS, size)), jnp.float32), "expert", "out")

    activation = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0, layout="interleaved")
    return GptOssMLP(
        weight(2 * INTERMEDIATE, HIDDEN),
        bias(2 * INTERMEDIATE),
        weight(HIDDEN, INTERMEDIATE),
        bias(HIDDEN),
        activation,
    )


def relative_error(layer, rng, **attributes):
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    expected = qmoe(layer, x, logits, 2, **attributes)
    got = jax.jit(moe_jax.mixture_of_experts, static_argnames=("experts_per_token", "algorithm"))(
        layer, x, logits, experts_per_token=2, algorithm="dense"
    )
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


INTEGERS = {
    "int4 groups": (lambda w: quantize_integers(w, 4, 16), 1e-6),
    "int4 groups, zero points": (lambda w: quantize_integers(w, 4, 32, zero_points=True), 1e-6),
    "int4 rows": (lambda w: quantize_integers(w, 4), 1e-6),
    "int4 rows, zero points": (lambda w: quantize_integers(w, 4, zero_points=True), 1e-6),
    "int8 rows": (lambda w: quantize_integers(w, 8), 1e-6),
    "int8 groups": (lambda w: quantize_integers(w, 8, 32, zero_points=True), 1e-6),
    "int2 groups": (lambda w: quantize_integers(w, 2, 16), 1e-6),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_q4_integer_groups_equal_qmoe(rng, name, record_property, monkeypatch):
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")
    quantize, tolerance = INTEGERS[name]
    error = relative_error(integer_layer(rng, quantize), rng)
    record_property("row", "Q4")
    record_property("with", f"{RUNTIME} QMoE {name}")
    record_property("error", error)
    assert error < tolerance


def mxfp4_as_integers(w: BlockScaled) -> PackedIntegers:
    """q = 2 x element + 128 in eight bits, scale = 2^(byte - 128): nothing is rounded."""
    codes = nibbles(np.asarray(w.blocks.array))
    doubled = np.array([0, 1, 2, 3, 4, 6, 8, 12])[codes & 7] * np.where(codes & 8, -1, 1)
    scales = np.exp2(np.asarray(w.scales.array).astype(np.float32) - 128)
    return PackedIntegers(
        tag(jnp.asarray((doubled + 128).astype(np.uint8)), "expert", "out", "group", "byte"),
        tag(jnp.asarray(scales), "expert", "out", "group"),
        bits=8,
    )


def test_q1_mxfp4_is_carried_exactly_by_eight_bits(rng, record_property, monkeypatch):
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")
    layer = integer_layer(rng, moe_jax.quantize_mxfp4)
    carried = GptOssMLP(
        mxfp4_as_integers(layer.gate_up),
        layer.gate_up_bias,
        mxfp4_as_integers(layer.down),
        layer.down_bias,
        layer.activation,
    )
    for packed, integers in ((layer.gate_up, carried.gate_up), (layer.down, carried.down)):
        decode = jax.jit(lambda w: w.dequantize(jnp.float32).array)
        np.testing.assert_array_equal(decode(packed), decode(integers))
    error = relative_error(carried, rng)
    record_property("row", "Q1")
    record_property("with", f"{RUNTIME} QMoE int8, block 32")
    record_property("error", error)
    assert error < 1e-6


def test_trap_7_scale_bytes_255_and_0(record_property):
    """255 is NaN, as in the specification, and 0 is 2^-127: bit for bit, not flushed."""
    blocks = np.broadcast_to(np.arange(16, dtype=np.uint8) * 17, (2, 16))
    packed = BlockScaled(
        tag(jnp.asarray(blocks[:, None]), "out", "block", "byte"),
        tag(jnp.array([[255], [0]], jnp.uint8), "out", "block"),
    )
    got = np.asarray(jax.jit(lambda w: w.dequantize(jnp.float32))(packed).array)
    assert np.isnan(got[0]).all()
    codes = np.repeat(np.arange(16, dtype=np.uint8), 2).view(ml_dtypes.float4_e2m1fn)
    expected = (codes.astype(np.float64) * 2.0**-127).astype(np.float32)
    np.testing.assert_array_equal(got[1].view(np.uint32), expected.view(np.uint32))
    e8m0 = np.array([255, 0], np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.isnan(e8m0[0]) and e8m0[1] == 2.0**-127
    record_property("trap", "7")
