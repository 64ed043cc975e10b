"""What TensorRT's layer computes, by ONNX Runtime's operators and by NumPy; TensorRT is not run."""

import math

import jax
import numpy as np
import onnxruntime_tools
import pytest
from onnx import TensorProto, helper, numpy_helper
from sharding_tools import sharding
from tensorrt_cases import (
    CHOSEN,
    EXPERTS,
    Arrays,
    expected,
    fp8,
    nvfp4,
    routed,
    set_dynamic,
    set_static,
)

from moe_jax.activations import GPT_OSS_ACTIVATION
from moe_jax.formats import FormatError
from moe_jax.formats.tensorrt import DataType, MoEActType
from moe_jax.tagged import tag

RUNTIME = onnxruntime_tools.VERSION
ALGORITHMS = ("per_token", "dense", "grouped")


def compiled(layer, **options):
    """The layer as it is set now, as one program: that costs less than operation by operation."""
    return jax.jit(lambda *inputs: layer(*inputs, **options))


def run(nodes, inputs, tensors):
    """The output y of a graph, in ONNX Runtime."""
    graph = helper.make_graph(
        nodes,
        "check",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [t if hasattr(t, "dims") else numpy_helper.from_array(t, n) for n, t in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime_tools.run(model, dict(inputs))


def onnx_moe(layer, x, ids, scores):
    """The layer by `com.microsoft.MoE`, whose router gets the logarithms of the scores."""
    experts = layer.experts()
    join = GPT_OSS_ACTIVATION.join_lanes
    tensors = {
        "fc1": np.asarray(join(experts.gate, experts.up).array),
        "fc2": np.asarray(experts.down.array),
    }
    names = ["x", "logits", "fc1", "", "fc2", ""]
    if layer.biases is not None:
        tensors["b1"] = np.asarray(join(experts.gate_bias, experts.up_bias).array)
        tensors["b2"] = np.asarray(experts.down_bias.array)
        names = ["x", "logits", "fc1", "b1", "fc2", "b2"]
    logits = np.full((x.shape[0] * x.shape[1], EXPERTS), -np.inf, np.float32)
    np.put_along_axis(logits, ids.reshape(-1, CHOSEN), np.log(scores.reshape(-1, CHOSEN)), 1)
    limit = {} if math.isinf(layer.swiglu.limit) else {"swiglu_limit": layer.swiglu.limit}
    node = helper.make_node(
        "MoE", names, ["y"], domain="com.microsoft", k=CHOSEN, activation_type="swiglu",
        swiglu_fusion=1, normalize_routing_weights=0, activation_alpha=layer.swiglu.alpha,
        activation_beta=layer.swiglu.beta, **limit,
    )  # fmt: skip
    return run([node], {"x": x, "logits": logits}, tensors)


def record(record_property, row, error, scale, what):
    record_property("row", row)
    record_property("with", f"{RUNTIME} {what}")
    record_property("error", error / scale)
    record_property("status", "equal in ONNX Runtime; as TensorRT reference only")


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_e3_silu_glu_equals_onnxruntime(rng, biases, record_property):
    layer = Arrays.random(rng).layer(biases)
    x, ids, scores = routed(rng)
    reference = onnx_moe(layer, x, ids, scores)
    error = float(np.abs(np.asarray(compiled(layer)(x, ids, scores)) - reference).max())
    scale = float(np.abs(reference).max())
    record(record_property, "E3", error, scale, "MoE swiglu, fusion 1, alpha 1, beta 0")
    assert error < 4e-6 * scale


@pytest.mark.parametrize(
    ("params", "algorithm"),
    [
        ((7.0, 1.702, 1.0), "per_token"),
        ((0.5, 2.0, -0.25), "dense"),
        ((math.inf, 1.0, 0.0), "grouped"),
    ],
    ids=str,
)
def test_r6_prerouted_scores_are_used_as_they_are(rng, params, algorithm, record_property):
    layer = Arrays.random(rng).layer()
    layer.set_swiglu_params(*params)
    x, ids, scores = routed(rng)
    reference = onnx_moe(layer, x, ids, scores)
    function = compiled(layer, algorithm=algorithm)
    error = float(np.abs(np.asarray(function(x, ids, scores)) - reference).max())
    scale = float(np.abs(reference).max())
    record(record_property, "R6", error, scale, "MoE with log-scores as logits")
    assert error < 4e-6 * scale
    doubled = np.asarray(function(x, ids, 2 * scores))
    np.testing.assert_allclose(doubled, 2 * reference, atol=8e-6 * scale)


@pytest.mark.parametrize("scale", [0.02, "experts"], ids=["one scale", "a scale an expert"])
def test_q3_static_fp8_of_the_mul_output_equals_qdq(rng, scale, record_property):
    """Expert by expert as standard operators, with the Q/DQ pair before fcDown."""
    arrays = Arrays.random(rng)
    scale = rng.uniform(0.005, 0.05, EXPERTS) if scale == "experts" else np.array(scale)
    scale = scale.astype(np.float32)
    layer = arrays.layer()
    set_static(layer, scale)
    x, ids, scores = routed(rng)
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes, tensors, terms = [], {"zero": zero}, []

    def add(op, *inputs, **attributes):
        nodes.append(helper.make_node(op, inputs, [f"n{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    for e in range(EXPERTS):
        named = {
            "gate": arrays.gate[e], "up": arrays.up[e], "down": arrays.down[e],
            "bg": arrays.biases[0][e], "bu": arrays.biases[1][e], "bd": arrays.biases[2][e],
            "s": np.broadcast_to(scale, (EXPERTS,))[e],
            "w": (np.where(ids == e, scores, 0).sum(-1, keepdims=True)),
        }  # fmt: skip
        tensors |= {f"{n}{e}": np.asarray(a, np.float32) for n, a in named.items()}
        gate = add("Add", add("MatMul", "x", f"gate{e}"), f"bg{e}")
        up = add("Add", add("MatMul", "x", f"up{e}"), f"bu{e}")
        hidden = add("Mul", add("Mul", gate, add("Sigmoid", gate)), up)
        q = add("QuantizeLinear", hidden, f"s{e}", "zero")
        dq = add("DequantizeLinear", q, f"s{e}", "zero")
        out = add("Add", add("MatMul", dq, f"down{e}"), f"bd{e}")
        terms.append(add("Mul", out, f"w{e}"))
    nodes.append(helper.make_node("Sum", terms, ["y"]))
    reference = run(nodes, {"x": x}, tensors)
    got = np.asarray(compiled(layer)(x, ids, scores))
    size = float(np.abs(reference).max())
    record(record_property, "Q3", float(np.abs(got - reference).max()), size, "Q/DQ in a graph")
    np.testing.assert_allclose(got, reference, atol=4e-6 * size)
    layer.quantization_to_type = DataType.FLOAT
    assert np.abs(np.asarray(compiled(layer)(x, ids, scores)) - reference).max() > 1e-3 * size


SCALES = {"one scale": np.float32(0.004), "a scale an expert": np.linspace(0.001, 0.01, EXPERTS)}


def check_quantised(rng, algorithm, scale, set_up, oracle, record_property):
    """The mul output is quantised and dequantised; against NumPy and the casts of ml_dtypes."""
    scale = np.asarray(SCALES[scale], np.float32)
    arrays, (x, ids, scores) = Arrays.random(rng), routed(rng)
    layer = arrays.layer()
    layer.set_swiglu_params(7.0, 1.702, 1.0)
    set_up(layer, scale)
    got = compiled(layer, algorithm=algorithm)(x, ids, scores)
    params = {"params": (1.702, 1.0, 7.0), "quantize": oracle(scale)}
    reference = expected(arrays, x, ids, scores, **params)
    size = np.abs(reference).max()
    record_property("with", "ml_dtypes")
    record_property("status", "equal by ml_dtypes; as TensorRT reference only")
    record_property("error", float(np.abs(got - reference).max() / size))
    np.testing.assert_allclose(got, reference, atol=1e-6 * size)


@pytest.mark.parametrize(
    ("scale", "algorithm"),
    [("one scale", "dense")] + [("a scale an expert", algorithm) for algorithm in ALGORITHMS],
)
def test_q2_dynamic_nvfp4_of_the_mul_output(rng, scale, algorithm, record_property):
    record_property("row", "Q2")
    check_quantised(rng, algorithm, scale, set_dynamic, nvfp4, record_property)


@pytest.mark.parametrize(
    ("scale", "algorithm"), [("one scale", "per_token"), ("a scale an expert", "grouped")]
)
def test_q3_static_fp8_of_the_mul_output(rng, scale, algorithm, record_property):
    record_property("row", "Q3")
    check_quantised(rng, algorithm, scale, set_static, fp8, record_property)


def test_no_activation(rng):
    arrays, (x, ids, scores) = Arrays.random(rng), routed(rng)
    layer = arrays.layer(kind=MoEActType.NONE)
    reference = expected(arrays, x, ids, scores, kind="NONE")
    np.testing.assert_allclose(compiled(layer)(x, ids, scores), reference, rtol=1e-4, atol=1e-4)


def test_ids_of_no_expert_and_repeated_ones(rng, record_property):
    record_property("bad_input", "id < 0 or >= E")
    record_property("bad_input", "duplicate ids in a row")
    arrays, (x, ids, scores) = Arrays.random(rng), routed(rng)
    layer = compiled(arrays.layer())
    ids[0, 0] = -1, EXPERTS
    ids[1, 1] = 3, 3
    got = np.asarray(layer(x, ids, scores))
    np.testing.assert_array_equal(got[0, 0], 0)
    twice = expected(arrays, x[1:, 1:2], ids[1:, 1:2], scores[1:, 1:2])
    np.testing.assert_allclose(got[1:, 1:2], twice, rtol=1e-5, atol=1e-5)


def test_num_ranks_is_the_number_of_devices_of_the_experts(rng):
    arrays = Arrays.random(rng)
    four = Arrays(
        arrays.gate[:4], arrays.up[:4], arrays.down[:4], tuple(b[:4] for b in arrays.biases)
    )
    x, ids, scores = routed(rng)
    layer = four.layer()
    set_dynamic(layer, np.float32(0.004))
    reference = np.asarray(compiled(layer)(x, ids, scores))
    layer.num_ranks = 2
    with pytest.raises(FormatError, match="num_ranks is 2, but the experts are spread over 1"):
        layer(x, ids, scores)
    here = sharding((1, 2, 1))
    got = compiled(layer, sharding=here)(x, ids, scores)
    np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({0: np.ones((3, 7), np.float32)}, FormatError, "hidden_states must be a bare array"),
        ({0: tag(np.ones((2, 3, 7), np.float32), "b", "s", "d")}, FormatError, "bare array"),
        ({0: np.ones((2, 3, 7), np.int32)}, TypeError, "x must be floats"),
        ({0: np.ones((2, 3, 8), np.float32)}, ValueError, "axis 'in' has different sizes"),
        ({1: np.ones((2, 3, 2), np.float32)}, TypeError, "selected_experts must be integers"),
        ({1: np.ones((2, 3), np.int32)}, FormatError, "selected_experts_for_tokens must be"),
        ({1: np.ones((2, 4, 2), np.int32)}, ValueError, "different sizes"),
        ({2: np.ones((2, 3, 2), np.int32)}, TypeError, "scores must be floats"),
        ({2: np.ones((2, 3, 3), np.float32)}, ValueError, "must have the same sizes"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit(rng, change, error, match, record_property):
    name = "float ids / int weights" if error is TypeError else "sizes that do not fit"
    record_property("bad_input", name)
    inputs = list(routed(rng))
    for place, value in change.items():
        inputs[place] = value
    with pytest.raises(error, match=match):
        compiled(Arrays.random(rng).layer()).eval_shape(*inputs)


def test_a_layer_that_can_change_is_not_compiled_as_a_function(rng):
    with pytest.raises(TypeError, match="unhashable"):
        jax.jit(Arrays.random(rng).layer())(*routed(rng))
