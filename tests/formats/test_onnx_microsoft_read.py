"""Reading `com.microsoft` nodes that others wrote, and refusing what is malformed."""

import json

import jax.numpy as jnp
import microsoft_oracle as oracle
import numpy as np
import onnx
import pytest
from microsoft_oracle import assert_same_layer, random_layer

import moe_jax
from moe_jax import Router
from moe_jax.activations import Activation
from moe_jax.formats import FormatError
from moe_jax.formats.onnx import graph, microsoft

E, D, I = 3, 4, 5  # noqa: E741


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def model_with(rng, operator="MoE", constants=None, inputs=(), router=None, **attributes):
    """A model with one node as another exporter may write it.

    The logits are MatMul and Add of the constants wr [d, expert] and br unless `router` is given.
    """
    weights = {
        "fc1": draw(rng, E, I, D),
        "b1": draw(rng, E, I),
        "fc2": draw(rng, E, D, I),
        "b2": draw(rng, E, D),
        "wr": draw(rng, D, E),
        "br": draw(rng, E),
    } | (constants or {})
    nodes = router or [
        graph.node("MatMul", ["x", "wr"], ["affinities"]),
        graph.node("Add", ["affinities", "br"], ["logits"]),
    ]
    attributes = {"k": 2, **attributes}
    names = list(inputs) or ["x", "logits", "fc1", "b1", "fc2", "b2"]
    node = graph.node(operator, names, ["y"], domain="com.microsoft", name="layer", **attributes)
    given = [graph.initialiser(n, a) for n, a in weights.items() if a is not None]
    x, y = (graph.value(name, np.float32, ["tokens", D]) for name in "xy")
    return graph.model_of([*nodes, node], [x], [y], given, {"com.microsoft": 1}), weights


def experts_of(layer):
    return layer.experts.tree()


def array(tagged):
    return np.asarray(tagged.untag("expert", "out", "in"))


def check_same_result(rng, layer, model):
    """What was read computes what was there: both run by onnxruntime."""
    x = draw(rng, 6, layer.router_weight.get_value().shape[1])
    again = microsoft.to_model(layer)
    assert oracle.relative_error(oracle.run(again, x), oracle.run(model, x)) < 1e-6


def test_matmul_add_and_plain_weights(rng):
    model, weights = model_with(rng, activation_type="silu")
    layer = microsoft.read(model)["layer"]
    experts = experts_of(layer)
    assert type(experts) is moe_jax.MLP and experts.activation == Activation("silu")
    np.testing.assert_array_equal(array(experts.up), weights["fc1"])
    np.testing.assert_array_equal(array(experts.down), weights["fc2"])
    np.testing.assert_array_equal(layer.router_weight.get_value(), weights["wr"].T)
    np.testing.assert_array_equal(layer.router_bias.get_value(), weights["br"])
    assert layer.config.router == Router(order="before_top_k")
    assert layer.config.experts_per_token == 2
    check_same_result(rng, layer, model)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_a_router(rng, transposed):
    wr = draw(rng, E, D) if transposed else draw(rng, D, E)
    router = [graph.node("Gemm", ["x", "wr", "br"], ["logits"], transB=transposed)]
    model, weights = model_with(rng, constants={"wr": wr}, router=router)
    found = microsoft.read(model)["layer"].router_weight.get_value()
    np.testing.assert_array_equal(found, wr if transposed else wr.T)


def test_a_transposed_router_and_constant_nodes(rng):
    wr = draw(rng, E, D)
    router = [
        graph.node("Constant", [], ["weight"], value=graph.initialiser("", wr)),
        graph.node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        graph.node("MatMul", ["x", "turned"], ["affinities"]),
        graph.node("Identity", ["affinities"], ["logits"]),
    ]
    model, _ = model_with(rng, constants={"wr": None, "br": None}, router=router)
    layer = microsoft.read(model)["layer"]
    np.testing.assert_array_equal(layer.router_weight.get_value(), wr)
    assert layer.router_bias is None


SWIGLU = {"activation_type": "swiglu", "activation_alpha": 1.702, "activation_beta": 1.0}


@pytest.mark.parametrize("fusion, layout", [(0, "interleaved"), (1, "interleaved"),
                                            (2, "concatenated")])  # fmt: skip
def test_fused_swiglu(rng, fusion, layout):
    """Without fc3, fusion 0 is what exporters wrote before there was the attribute."""
    fused = {"fc1": draw(rng, E, 2 * I, D), "b1": draw(rng, E, 2 * I)}
    model, _ = model_with(rng, constants=fused, swiglu_fusion=fusion, swiglu_limit=7.0, **SWIGLU)
    experts = experts_of(microsoft.read(model)["layer"])
    assert type(experts) is moe_jax.MLP
    assert experts.activation == Activation("swiglu", 1.702, 1.0, 7.0, layout)
    np.testing.assert_array_equal(array(experts.up), fused["fc1"])


@pytest.mark.parametrize("attributes", [SWIGLU, {"activation_type": "silu"}])
def test_separate_gate_and_up(rng, attributes):
    """silu with fc3 is SwiGLU to the CUDA kernels; the CPU kernels have no fc3."""
    inputs = ["x", "logits", "fc1", "", "fc2", "", "fc3", ""]
    fc3 = draw(rng, E, I, D)
    model, weights = model_with(rng, constants={"fc3": fc3}, inputs=inputs[:7], **attributes)
    experts = experts_of(microsoft.read(model)["layer"])
    assert type(experts) is moe_jax.GatedMLP and experts.gate_bias is None
    np.testing.assert_array_equal(array(experts.gate), weights["fc1"])
    np.testing.assert_array_equal(array(experts.up), fc3)
    assert experts.activation.kind == "swiglu"
    assert experts.activation.alpha == attributes.get("activation_alpha", 1.0)


def test_a_missing_bias_beside_others_is_zero(rng):
    model, weights = model_with(rng, inputs=["x", "logits", "fc1", "", "fc2", "b2"])
    experts = experts_of(microsoft.read(model)["layer"])
    np.testing.assert_array_equal(experts.up_bias.array, np.zeros((E, I)))
    np.testing.assert_array_equal(experts.down_bias.array, weights["b2"])


def quantised(rng, bits=8, group=None, zero_points=False):
    """QMoE constants, and the float64 weights they stand for."""
    constants, floats = {}, {}
    for name, shape in (("fc1", (E, 32, 16)), ("fc2", (E, 16, 32))):
        weight = oracle.integer_weight(rng, shape, bits, group or shape[-1], zero_points)
        codes = np.asarray(weight.ours.codes.array)
        constants[name] = codes.reshape(*shape[:2], -1)
        scales = np.asarray(weight.ours.scales.array)
        constants[f"{name}_scales"] = scales if group else scales[..., 0]
        if zero_points:
            zero = np.asarray(weight.ours.zero_points.array)
            zero = zero if group else zero[..., 0]
            constants[f"{name}_zero"] = oracle.pack_bits(zero, bits)
        floats[name] = weight.floats
    return constants | {"wr": draw(rng, 16, E)}, floats


QINPUTS = ["x", "logits", "fc1", "fc1_scales", "", "fc2", "fc2_scales"]


def qmodel(rng, constants, inputs=QINPUTS, router=None, **attributes):
    nodes = router or [
        graph.node("MatMul", ["x", "wr"], ["affinities"]),
        graph.node("Add", ["affinities", "br"], ["logits"]),
    ]
    attributes = {"activation_type": "identity", **attributes}
    node = graph.node(
        "QMoE", inputs, ["y"], domain="com.microsoft", name="layer", k=2, **attributes
    )
    given = [graph.initialiser(n, a) for n, a in ({"br": draw(rng, E)} | constants).items()]
    x, y = (graph.value(name, np.float32, ["tokens", 16]) for name in "xy")
    return graph.model_of([*nodes, node], [x], [y], given, {"com.microsoft": 1})


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_are_read_as_they_are(rng, bits, group, zero_points):
    constants, floats = quantised(rng, bits, group, zero_points)
    inputs = [*QINPUTS, *[""] * 4, "fc1_zero", "fc2_zero"] if zero_points else QINPUTS
    model = qmodel(rng, constants, inputs, expert_weight_bits=bits, block_size=group)
    layer = microsoft.read(model)["layer"]
    experts = experts_of(layer)
    for weight, meant in ((experts.up, floats["fc1"]), (experts.down, floats["fc2"])):
        assert weight.bits == bits and weight.codes.dtype == np.uint8
        np.testing.assert_allclose(array(weight.dequantize(jnp.float32)), meant, rtol=1e-7)
    check_same_result(rng, layer, model)


def test_qmoe_that_does_not_normalise_means_what_the_target_does(rng):
    constants, _ = quantised(rng)
    model = qmodel(rng, constants, expert_weight_bits=8)
    cpu, cuda = (
        microsoft.read(model, target=target)["layer"] for target in (microsoft.CPU, microsoft.CUDA)
    )
    assert (cpu.config.router, cuda.config.router) == (Router(), Router(order="before_top_k"))
    check_same_result(rng, cpu, model)


def separate_router(score, biased, by_score):
    nodes = [
        graph.node("MatMul", ["x", "wr"], ["affinities"]),
        graph.node(score, ["affinities"], ["scores"]),
    ]
    source = "scores" if by_score else "affinities"
    if biased:
        return [*nodes, graph.node("Add", [source, "br"], ["logits"])]
    return [*nodes, graph.node("Identity", [source], ["logits"])]


@pytest.mark.parametrize(
    "score, biased, by_score, normalize, router",
    [
        ("Sigmoid", True, True, 1, Router("sigmoid", "before_top_k", renormalize=True)),
        ("Sigmoid", True, False, 0, Router("sigmoid", "after_top_k")),
        ("Sigmoid", False, False, 0, Router("sigmoid", "before_top_k")),
        ("Softmax", True, True, 0, Router(order="before_top_k")),
        ("Softmax", True, False, 1, Router()),
        ("Softmax", False, True, 0, Router(order="before_top_k")),
        ("Softmax", False, False, 1, Router()),
        ("Softmax", True, False, 0, None),
    ],
)
def test_separate_selection_and_weights(rng, score, biased, by_score, normalize, router):
    constants, floats = quantised(rng)
    model = qmodel(
        rng,
        constants,
        [*QINPUTS, *[""] * 7, "scores"],
        separate_router(score, biased, by_score),
        expert_weight_bits=8,
        normalize_routing_weights=normalize,
    )
    if router is None:
        with pytest.raises(FormatError, match="normalize_routing_weights"):
            microsoft.read(model)
        return
    layer = microsoft.read(model)["layer"]
    assert layer.config.router == router
    assert (layer.selection_bias is None) == (not biased)
    constant = oracle.constants_of(model)
    numbers = {"weight": constant["wr"].T, "bias": 0.0, "selection": constant["br"] * biased}
    meant = oracle.Layer(layer, {"up": floats["fc1"], "down": floats["fc2"]}, numbers)
    x = draw(rng, 5, 16)
    assert oracle.relative_error(oracle.run(model, x), meant(x)) < 1e-6


def test_layers_inside_other_graphs_are_found(rng):
    """A node in a branch of an If names constants of the outer graph."""
    inner, _ = model_with(rng)
    branch = onnx.helper.make_graph(
        list(inner.graph.node), "branch", [], [graph.value("y", np.float32, ["tokens", D])]
    )
    condition = graph.value("condition", np.bool_, [])
    other = onnx.helper.make_graph(
        [graph.node("Identity", ["x"], ["z"])],
        "other",
        [],
        [graph.value("z", np.float32, ["tokens", D])],
    )
    outer = graph.model_of(
        [graph.node("If", ["condition"], ["out"], then_branch=branch, else_branch=other)],
        [inner.graph.input[0], condition],
        [graph.value("out", np.float32, ["tokens", D])],
        list(inner.graph.initializer),
        {"com.microsoft": 1},
    )
    assert_same_layer(microsoft.read(outer)["layer"], microsoft.read(inner)["layer"])


def test_experts_alone_where_the_logits_come_from_elsewhere(rng):
    router = [graph.node("ReduceSum", ["x"], ["sum"], keepdims=1),
              graph.node("Mul", ["sum", "br"], ["logits"])]  # fmt: skip
    model, weights = model_with(rng, router=router, normalize_routing_weights=1)
    with pytest.raises(FormatError, match="read_experts"):
        microsoft.read(model)
    node = microsoft.read_experts(model)["layer"]
    np.testing.assert_array_equal(array(node.experts.up), weights["fc1"])
    assert (node.experts_per_token, node.router, node.logits) == (2, Router(), "logits")


def test_a_router_of_another_input_is_refused(rng):
    router = [
        graph.node("Relu", ["x"], ["other"]),
        graph.node("MatMul", ["other", "wr"], ["logits"]),
    ]
    with pytest.raises(FormatError, match="logits are made of 'other'"):
        microsoft.read(model_with(rng, router=router)[0])


def test_a_file_without_layers_is_refused(rng):
    x, y = (graph.value(name, np.float32, [D]) for name in "xy")
    with pytest.raises(FormatError, match="no com.microsoft node of MoE or QMoE"):
        microsoft.read(graph.model_of([graph.node("Relu", ["x"], ["y"])], [x], [y], []))


WRONG = {
    "k": (dict(k=4), "k must be 1 to 3"),
    "zero k": (dict(k=0), "k must be 1 to 3"),
    "activation": (dict(activation_type="tanh"), "activation_type"),
    "float k": (dict(k=2.0), "k must be of type int"),
    "sparse mixer": (dict(use_sparse_mixer=1), "use_sparse_mixer"),
    "unknown attribute": (dict(expert_parallel=2), "expert_parallel"),
    "fusion": (dict(swiglu_fusion=3), "swiglu_fusion"),
    "normalize": (dict(normalize_routing_weights=2), "normalize_routing_weights"),
    "relu with fc3": (
        dict(constants={"fc3": np.zeros((E, I, D), np.float32)},
             inputs=["x", "logits", "fc1", "b1", "fc2", "b2", "fc3"]),
        "fc3 belongs to swiglu or silu",
    ),
    "fusion with fc3": (
        dict(constants={"fc3": np.zeros((E, I, D), np.float32)}, swiglu_fusion=1,
             activation_type="swiglu", inputs=["x", "logits", "fc1", "b1", "fc2", "b2", "fc3"]),
        "fc3 with swiglu_fusion=1",
    ),
    "weights that are computed": (
        dict(inputs=["x", "logits", "logits", "b1", "fc2", "b2"]),
        "not a constant",
    ),
    "no weights": (dict(inputs=["x", "logits", "fc1", "b1", "", "b2"]), "must have fc1 and fc2"),
    "router width": (
        dict(constants={"wr": np.zeros((D, 5), np.float32), "br": np.zeros(5, np.float32)}),
        "fc1 weights must be",
    ),
    "bias": (dict(constants={"b1": np.zeros((E, I + 1), np.float32)}), "fc1 bias must be"),
    "rank": (dict(constants={"fc1": np.zeros((E, I * D), np.float32)}), "expert, out, in"),
    "experts": (dict(constants={"fc2": np.zeros((E + 1, D, I), np.float32)}), "fc2 weights"),
    "intermediate": (dict(constants={"fc2": np.zeros((E, D, I + 1), np.float32)}), "fc1 weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_malformed_nodes_are_refused(rng, case):
    arguments, message = WRONG[case]
    with pytest.raises(FormatError, match=message):
        microsoft.read(model_with(rng, **arguments)[0])


def with_hint(rng, **changes):
    """A model of ours with changes to what its metadata say, or with other metadata."""
    model = microsoft.to_model(random_layer(rng).ours)
    (entry,) = oracle.node_of(model).metadata_props
    entry.value = changes.pop("text", None) or json.dumps(json.loads(entry.value) | changes)
    return model


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(experts="GatedMLP"), "GatedMLP"),
        (dict(experts="Mystery"), "Mystery"),
        (dict(mxfp4=True), "MXFP4"),
        (dict(order="before_top_k"), "its metadata say"),
        (dict(order="sideways"), "order"),
        (dict(scale=2.0), "no Mul"),
        (dict(layout="sideways"), "layout"),
        (dict(text="{"), "metadata"),
        (dict(text="[]"), "metadata"),
    ],
)
def test_metadata_that_contradict_the_node_are_refused(rng, changes, message):
    with pytest.raises(ValueError, match=message):
        microsoft.read(with_hint(rng, **changes))


QWRONG = {
    "block size": (dict(block_size=3), "block_size"),
    "quant type": (dict(quant_type="fp4"), "quant_type"),
    "prepacked": (dict(weights_prepacked=1), "weights_prepacked"),
    "bits": (dict(expert_weight_bits=3), "2, 4 or 8 bits"),
    "scales": (dict(block_size=16), "fc1_scales"),
    "global scale": (dict(inputs=[*QINPUTS, *[""] * 8, "br"]), "fc1_global_scale"),
    "zero points": (dict(inputs=[*QINPUTS, *[""] * 4, "br"]), "fc1_zero_points"),
    "width": (dict(expert_weight_bits=4), "fc1 weights must be"),
}


@pytest.mark.parametrize("case", QWRONG)
def test_malformed_integers_are_refused(rng, case):
    arguments, message = QWRONG[case]
    constants, _ = quantised(rng)
    with pytest.raises(FormatError, match=message):
        microsoft.read(qmodel(rng, constants, **{"expert_weight_bits": 8} | arguments))


def test_two_nodes_of_one_name(rng):
    model, _ = model_with(rng)
    extra = model.graph.node.add()
    extra.CopyFrom(oracle.node_of(model))
    extra.output[0] = "z"
    with pytest.raises(FormatError, match="two nodes"):
        microsoft.read(model)


def test_files_that_are_not_onnx(tmp_path, rng):
    path = tmp_path / "layer.onnx"
    with pytest.raises(OSError):
        microsoft.read(path)
    for content in (b"", b"junk junk"):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="layer.onnx"):
            microsoft.read(path)
    microsoft.write(path, random_layer(rng).ours, external_data="weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(FormatError, match="weights.bin"):
        microsoft.read(path)


def test_bfloat16_weights_of_a_cuda_export(rng):
    layer = random_layer(rng, dtype=jnp.bfloat16).ours
    node = microsoft.read_experts(microsoft.to_model(layer, target=microsoft.CUDA))["moe"]
    assert node.experts.up.dtype == jnp.bfloat16
