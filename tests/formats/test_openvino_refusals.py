"""What is refused on the way into an OpenVINO graph and out of one."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import Activation, MoE, Router, tag
from moe_jax.formats import FormatError, openvino

pytest.importorskip("openvino_tools")

from openvino_tools import D, E, F, draw, gated, gpt_oss, ov, with_router

from moe_jax.formats.openvino import package
from moe_jax.formats.openvino.model import from_model, to_model

op = ov.opset15


def refused(layer, message):
    with pytest.raises(FormatError, match=message):
        to_model({"mlp": layer})


@pytest.mark.parametrize(
    ("router", "field"),
    [
        (moe_jax.routing.LINEAR_ROUTER, "router.score='linear'"),
        (Router(num_groups=7, groups_per_token=3), "router.num_groups=7"),
    ],
)
def test_routers_that_a_graph_cannot_say_are_refused(rng, record_property, router, field):
    record_property("bad_input", "export asked of a thing the target op cannot say")
    refused(with_router(rng, gated(rng), router), f"layer 'mlp': {field}")


def test_a_budget_is_refused(rng):
    layer = with_router(rng, gated(rng))
    options = {"experts_per_token": 2, "tokens_per_expert_ratio": 2.0}
    budget = MoE(layer.experts.tree(), draw(rng, (E, D), ("expert", "d")), **options)
    refused(budget, "tokens_per_expert_ratio=2.0")
    options = {"experts_per_token": 2, "algorithm": "fixed_budget", "tokens_per_expert_ratio": 2.0}
    refused(
        MoE(layer.experts.tree(), draw(rng, (E, D), ("expert", "d")), **options), "fixed_budget"
    )


@pytest.mark.parametrize("name", ["router_weight", "router_bias", "selection_bias"])
def test_barred_experts_are_refused(rng, name):
    layer = with_router(rng, gated(rng), selection=True)
    variable = getattr(layer, name)
    variable.set_value(variable.get_value().at[3].set(-jnp.inf))
    refused(layer, f"{name} must be finite")


def test_a_router_for_tokens_of_another_size_is_refused(rng, record_property):
    record_property("bad_input", "x last dim or E differs")
    layer = MoE(gated(rng), draw(rng, (E, D + 1), ("expert", "d")), experts_per_token=2)
    refused(layer, "router_weight takes tokens of size 6, the experts of 5")


def test_experts_that_a_graph_cannot_say_are_refused(rng):
    refused(gated(rng, Activation("swiglu", alpha=1.702)), "activation.alpha=1.702")
    refused(gated(rng, Activation("reglu")), "activation.kind='reglu'")
    refused(gpt_oss(rng, Activation("swiglu", limit=7.0)), "activation.beta=0.0")
    refused(moe_jax.Identity(), "experts=Identity")
    up = tag(jnp.zeros((E, F, D)), "expert", "out", "in")
    refused(moe_jax.MLP(up, tag(jnp.zeros((E, D, F)), "expert", "out", "in")), "experts=MLP")
    with pytest.raises(FormatError, match="at least one layer"):
        to_model({})


def test_paths_and_files_are_checked(rng, tmp_path):
    with pytest.raises(FormatError, match="expected a file NAME.xml"):
        openvino.write(tmp_path / "layer.onnx", {"mlp": gated(rng)})
    with pytest.raises(FileNotFoundError, match="no file"):
        openvino.read(tmp_path / "layer.xml")
    (tmp_path / "layer.xml").write_text("<net/>")
    with pytest.raises(FormatError, match="OpenVINO cannot read"):
        openvino.read(tmp_path / "layer.xml")


def find(model, kind, place=0):
    return [n for n in model.get_ordered_ops() if n.get_type_name() == kind][place]


def replace(node, new):
    for target in list(node.output(0).get_target_inputs()):
        target.replace_source_output(new.output(0))


def other_clamp(model):
    node = find(model, "Clamp")
    replace(node, op.clamp(node.input_value(0), -7.0, 6.0))


def other_offset(model):
    clamp = find(model, "Clamp")
    add = next(iter(clamp.output(0).get_target_inputs())).get_node()
    add.input(1).replace_source_output(op.constant(np.float32(2)).output(0))


def other_lane(model):
    slices = [n for n in model.get_ordered_ops() if n.get_type_name() == "Slice"]
    start = slices[0].input_value(1)
    for node in slices:
        node.input(1).replace_source_output(start)


def other_activation(model):
    node = find(model, "Swish")
    replace(node, op.relu(node.input_value(0)))


def other_matmul(model):
    node = find(model, "Clamp").input_value(0).get_node()
    node = node.input_value(0).get_node().input_value(0).get_node()
    turned = np.array(node.input_value(1).get_node().data).swapaxes(1, 2)
    replace(node, op.matmul(node.input_value(0), op.constant(turned.copy()), False, False))


def other_sum(model):
    node = find(model, "ReduceSum", -1)
    replace(node, op.reduce_mean(node.input_value(0), node.input_value(1), False))


def other_topk(model):
    node = find(model, "TopK")
    new = op.topk(node.input_value(0), node.input_value(1), -1, "min", "value", "i64", stable=True)
    for index in (0, 1):
        for target in list(node.output(index).get_target_inputs()):
            target.replace_source_output(new.output(index))


def other_weights(model):
    node = find(model, "ScatterElementsUpdate")
    node.input(2).replace_source_output(op.abs(node.input_value(2)).output(0))


def other_rank(model):
    node = find(model, "MatMul", -1)
    node.input(1).replace_source_output(op.constant(np.ones((F, 2 * F), np.float32).T).output(0))


def other_input(model):
    node = find(model, "Reshape")
    node.input(0).replace_source_output(op.abs(node.input_value(0)).output(0))


@pytest.mark.parametrize(
    "change",
    [
        other_clamp,
        other_offset,
        other_lane,
        other_activation,
        other_matmul,
        other_sum,
        other_topk,
        other_weights,
        other_rank,
        other_input,
    ],
)
def test_graphs_that_differ_in_anything_are_refused(rng, change):
    # square, so that a transposed weight fits
    model = to_model({"mlp": with_router(rng, gpt_oss(rng, sizes=(E, 2 * F, F)))})
    change(model)
    with pytest.raises(FormatError, match="layer 'mlp' is not as moe_jax writes it"):
        from_model(model)


def test_other_models_are_refused():
    x = op.parameter([2, D], np.float32, name="x")
    y = op.relu(x)
    model = ov.Model([op.result(y)], [x], "other")
    with pytest.raises(FormatError, match="expected an output named NAME.output"):
        from_model(model)
    y.output(0).set_names({"mlp.output"})
    with pytest.raises(FormatError, match="has no input 0"):
        from_model(model)


def test_files_that_openvino_compresses_are_refused(rng, tmp_path):
    """OpenVINO compresses some constants of a graph only, so that its numbers are not a layer's."""
    layer = with_router(rng, gpt_oss(rng))
    ov.save_model(to_model({"mlp": layer}), tmp_path / "small.xml", compress_to_fp16=True)
    with pytest.raises(FormatError, match="expected Constant, found Convert"):
        openvino.read(tmp_path / "small.xml")


def test_importing_sends_no_usage_report():
    # by its path, for the library's own imports take seconds
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('package', {package.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert hasattr(module.load_openvino(), 'Core')\n"
        "assert not any(name.startswith('openvino_telemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
