"""Selection by one tensor and weights from another, against ONNX Runtime's QMoE."""

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime_tools
import pytest
from core_oracle import f32, moe, sigmoid, weight
from onnx import TensorProto, helper

import moe_jax
from moe_jax import Activation, Router

EXPERTS, HIDDEN, WIDE, TOKENS, K = 5, 32, 16, 7, 2


def int4(rng, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of four bits, low ones first, a scale for each row, and what they stand for."""
    codes = rng.integers(0, 16, (EXPERTS, outputs, inputs), dtype=np.uint8)
    scales = rng.uniform(0.02, 0.1, (EXPERTS, outputs)).astype(np.float32)
    values = (codes.astype(np.float64) - 8) * scales[..., None]
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales, values


def run_qmoe(constants: dict[str, np.ndarray], inputs: dict[str, np.ndarray], normalize: int):
    """The output of one QMoE node with interleaved SwiGLU."""
    names = ["x", "router_probs", "w1", "s1", "", "w2", "s2", *[""] * 7, "router_weights"]
    node = helper.make_node(
        "QMoE", names, ["y"], domain="com.microsoft", k=K, activation_type="swiglu",
        swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, expert_weight_bits=4,
        normalize_routing_weights=normalize,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (TOKENS, HIDDEN))],
        [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime_tools.run(model, inputs)


@pytest.fixture
def parts(rng):
    w1, s1, up = int4(rng, 2 * WIDE, HIDDEN)
    w2, s2, down = int4(rng, HIDDEN, WIDE)
    experts = moe_jax.MLP(
        weight(up), weight(down), activation=Activation("swiglu", layout="interleaved")
    )
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    return experts, {"w1": w1, "s1": s1, "w2": w2, "s2": s2}, x, logits


def check(record_property, ours, theirs) -> None:
    error = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
    record_property("row", "R7")
    record_property("error", error)
    record_property("with", onnxruntime_tools.VERSION)
    assert error < 1e-6


@pytest.mark.parametrize("normalize", [0, 1])
def test_r7_mixing_matches_qmoe(parts, rng, normalize, record_property):
    experts, constants, x, logits = parts
    mixing = rng.uniform(0.1, 1, logits.shape).astype(np.float32)
    theirs = run_qmoe(
        constants, {"x": x, "router_probs": logits, "router_weights": mixing}, normalize
    )
    # a linear score selects by the numbers as they are
    router = Router(score="linear", renormalize=bool(normalize))
    ours = moe(
        experts, jnp.asarray(x), jnp.asarray(logits), experts_per_token=K, normalization=router,
        mixing=jnp.asarray(mixing),
    )  # fmt: skip
    check(record_property, ours, theirs)


def test_r7_sigmoid_with_selection_bias_matches_qmoe(parts, rng, record_property):
    experts, constants, x, logits = parts
    bias = rng.normal(size=EXPERTS)
    scores = sigmoid(logits)
    theirs = run_qmoe(
        constants,
        {
            "x": x,
            "router_probs": (scores + bias).astype(np.float32),
            "router_weights": scores.astype(np.float32),
        },
        1,
    )
    ours = moe(
        experts, jnp.asarray(x), jnp.asarray(logits), experts_per_token=K,
        normalization=Router("sigmoid", "before_top_k", renormalize=True),
        selection_bias=f32(bias, "expert"),
    )  # fmt: skip
    check(record_property, ours, theirs)
