"""Layers written as OpenVINO graphs, run by OpenVINO."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import Activation, Router
from moe_jax.formats import FormatError

pytest.importorskip("openvino_tools")

import core_oracle
from openvino_tools import (
    CORE,
    LIMIT_OF_ERROR,
    Check,
    D,
    E,
    F,
    K,
    assert_same_layer,
    compiled,
    distinct_ids,
    experts_oracle,
    gated,
    gpt_oss,
    layer_oracle,
    operations,
    outputs,
    tokens,
    with_router,
)

from moe_jax.formats import openvino
from moe_jax.formats.openvino.model import from_model, run_model, to_model

CLAMPED = Activation("swiglu", alpha=1.3, beta=1.0, limit=0.9, layout="interleaved")


def error_of(layer, rng, matrices):
    """The largest error of a layer in OpenVINO, after a check that it was fused."""
    x = tokens(rng)
    program = compiled(to_model({"mlp": layer}))
    count = operations(program)
    assert count["GatherMatmul"] == matrices
    assert count["Tile"] == count["ScatterElementsUpdate"] == 0
    expected, clear = layer_oracle(layer, x)
    assert clear.sum() > 4
    y = outputs(program, [x])["mlp.output"]
    return np.abs(y - expected)[clear].max()


apply = nnx.jit(lambda layer, x: layer(x))


def lane(first, **changes):
    layout = "interleaved" if first == 0 else "interleaved_up_first"
    return Activation(
        "swiglu", **{"alpha": 1.702, "beta": 1.0, "limit": 7.0, **changes}, layout=layout
    )


def test_e3_three_matrices_match_numpy_and_are_fused(rng, record_property):
    Check(record_property, "E3")(error_of(with_router(rng, gated(rng)), rng, 3))


@pytest.mark.parametrize("gate_lane", [0, 1])
def test_e4_two_matrices_match_numpy_and_are_fused(rng, record_property, gate_lane):
    layer = with_router(rng, gpt_oss(rng, lane(gate_lane)))
    record_property("trap", "2")
    Check(record_property, "E4")(error_of(layer, rng, 2))


def test_e4_slope_and_limit_are_the_layers_own(rng, record_property):
    layer = with_router(rng, gpt_oss(rng, CLAMPED))
    record_property("trap", "1")
    Check(record_property, "E4")(error_of(layer, rng, 2))


@pytest.mark.parametrize("layout", ["concatenated", "concatenated_up_first"])
def test_e4_lanes_in_halves_are_written_in_turn(rng, record_property, layout):
    layer = with_router(rng, gpt_oss(rng, Activation("swiglu", 1.702, 1.0, 7.0, layout)))
    Check(record_property, "E4")(error_of(layer, rng, 2))
    again = from_model(to_model({"mlp": layer}))["mlp"]
    x = tokens(rng)
    np.testing.assert_allclose(layer_oracle(again, x)[0], layer_oracle(layer, x)[0], atol=1e-12)
    assert again.experts.tree().activation.layout == layout.replace("concatenated", "interleaved")


@pytest.mark.parametrize("kind", ["geglu", "geglu_tanh"])
def test_e5_gelu_of_both_kinds_matches_numpy_and_is_fused(rng, record_property, kind):
    layer = with_router(rng, gated(rng, Activation(kind)))
    record_property("trap", "4")
    Check(record_property, "E5")(error_of(layer, rng, 3))


def test_r1_softmax_after_top_k_matches_numpy(rng, record_property):
    layer = with_router(rng, gpt_oss(rng), Router(), topk=3)
    Check(record_property, "R1")(error_of(layer, rng, 2))


def test_r2_softmax_before_top_k_matches_numpy(rng, record_property):
    layer = with_router(rng, gated(rng), Router(order="before_top_k"), topk=3)
    Check(record_property, "R2")(error_of(layer, rng, 3))


def test_r3_softmax_before_top_k_renormalised_matches_numpy(rng, record_property):
    router = Router(order="before_top_k", renormalize=True)
    Check(record_property, "R3")(error_of(with_router(rng, gated(rng), router), rng, 3))


def test_r6_experts_alone_take_ids_and_scores_as_they_are(rng, record_property):
    experts = {"two": gpt_oss(rng), "three": gated(rng)}
    x, ids = tokens(rng), distinct_ids(rng, (2, 4))
    scores = rng.normal(size=ids.shape).astype(np.float32)
    program = compiled(to_model(experts))
    assert operations(program)["GatherMatmul"] == 5
    inputs = {}
    for name in experts:
        inputs |= {f"{name}.hidden_states": x, f"{name}.scores": scores}
        inputs[f"{name}.selected_experts"] = ids
    y = outputs(program, inputs)
    errors = []
    for name, layer in experts.items():
        rows, flat, mix = x.reshape(-1, D), ids.reshape(-1, K), scores.reshape(-1, K)
        expected = core_oracle.combine(rows, flat, mix.astype(float), experts_oracle(layer))
        errors.append(np.abs(y[f"{name}.output"].reshape(-1, D) - expected).max())
    Check(record_property, "R6")(max(errors))


def test_r7_a_bias_that_only_selects_matches_numpy(rng, record_property):
    router = Router("sigmoid", order="before_top_k", renormalize=True, scale=2.5)
    errors = [
        error_of(with_router(rng, gated(rng), router, selection=True), rng, 3),
        error_of(with_router(rng, gpt_oss(rng), Router(), selection=True), rng, 2),
    ]
    Check(record_property, "R7")(max(errors))


def test_x4_files_of_several_layers_come_back_and_stay_fused(rng, record_property, tmp_path):
    layers = {
        "model.layers.0.mlp": with_router(rng, gpt_oss(rng, lane(1, alpha=1.1, limit=7.1))),
        "odd, \"<&>'é ": with_router(rng, gated(rng, Activation("geglu"), jnp.bfloat16)),
        "half": with_router(rng, gpt_oss(rng, dtype=jnp.float16), Router("sigmoid", scale=0.3)),
        "alone": gated(rng),
    }
    path = tmp_path / "layers.xml"
    openvino.write(path, layers)
    again = openvino.read(path)
    assert list(again) == list(layers)
    for name, layer in layers.items():
        assert_same_layer(layer, again[name])
    program = compiled(CORE.read_model(path))
    assert operations(program)["GatherMatmul"] == 2 + 3 + 2 + 3
    x = tokens(rng)
    inputs = {f"{name}.hidden_states": x for name in layers}
    inputs["alone.selected_experts"] = distinct_ids(rng, (2, 4))
    inputs["alone.scores"] = np.zeros((2, 4, K), np.float32)
    y = outputs(program, inputs)
    errors = []
    for name in list(layers)[:3]:
        expected, clear = layer_oracle(layers[name], x)
        errors.append(np.abs(y[f"{name}.output"] - expected)[clear].max())
    Check(record_property, "X4")(max(errors))


@pytest.mark.parametrize(
    ("ids", "message", "line"),
    [
        ([E, 0], "must be 0 to 6, got 0 to 7", "id < 0 or >= E"),
        ([-1, 0], "must be 0 to 6, got -1 to 0", "id < 0 or >= E"),
        ([3, 3], "name an expert twice", "duplicate ids"),
    ],
)
def test_ids_that_openvino_would_not_survive_are_refused(rng, record_property, ids, message, line):
    record_property("bad_input", line)
    inputs = {"a.hidden_states": tokens(rng, 1, 1), "a.selected_experts": np.array([[ids]])}
    inputs["a.scores"] = np.ones((1, 1, 2), np.float32)
    with pytest.raises(FormatError, match=message):
        run_model(to_model({"a": gated(rng)}), inputs)


def test_the_library_computes_what_openvino_does(rng):
    layer, x = with_router(rng, gpt_oss(rng)), tokens(rng)
    y = run_model(to_model({"mlp": layer}), {"mlp.hidden_states": x})["mlp.output"]
    np.testing.assert_allclose(apply(layer, x), y, atol=LIMIT_OF_ERROR)


def test_hidden_and_intermediate_sizes_may_be_equal(rng, record_property):
    record_property("trap", "3")
    for build, matrices in ((gpt_oss, 2), (gated, 3)):
        layer = with_router(rng, build(rng, sizes=(E, D, D)))
        assert error_of(layer, rng, matrices) <= LIMIT_OF_ERROR
        assert_same_layer(layer, from_model(to_model({"mlp": layer}))["mlp"])


def test_float32_is_asked_of_the_cpu(rng, record_property):
    record_property("trap", "8")
    layer = with_router(rng, gpt_oss(rng, sizes=(4, 64, 32)))
    x = tokens(rng, hidden=64)
    program = compiled(to_model({"mlp": layer}))
    assert program.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    expected, clear = layer_oracle(layer, x)
    error = np.abs(outputs(program, [x])["mlp.output"] - expected)[clear].max()
    record_property("error", float(error))
    assert error <= LIMIT_OF_ERROR


def test_equal_scores_choose_the_lowest_index(rng, record_property):
    record_property("trap", "5")
    layer = with_router(rng, gated(rng), bias=False, topk=3)
    layer.router_weight.set_value(jnp.zeros_like(layer.router_weight.get_value()))
    x = tokens(rng)
    y = run_model(to_model({"mlp": layer}), {"mlp.hidden_states": x})["mlp.output"]
    np.testing.assert_allclose(y, layer_oracle(layer, x)[0], atol=LIMIT_OF_ERROR)


def test_one_expert_is_not_fused_but_right(rng):
    layer, x = with_router(rng, gpt_oss(rng, sizes=(1, D, F)), topk=1), tokens(rng)
    program = compiled(to_model({"mlp": layer}))
    y = outputs(program, [x])["mlp.output"]
    np.testing.assert_allclose(y, layer_oracle(layer, x)[0], atol=LIMIT_OF_ERROR)


def test_sigmoids_that_are_all_zero_weigh_nothing(rng):
    router = Router("sigmoid", order="before_top_k", renormalize=True)
    layer = with_router(rng, gated(rng), router)
    layer.router_bias.set_value(jnp.full((E,), -1000.0))
    x = tokens(rng)
    y = run_model(to_model({"mlp": layer}), {"mlp.hidden_states": x})["mlp.output"]
    np.testing.assert_array_equal(y, 0.0)
    np.testing.assert_array_equal(apply(layer, x), 0.0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_no_tokens_give_no_rows(rng, record_property, shape):
    record_property("bad_input", "T=0")
    layer = with_router(rng, gpt_oss(rng))
    x = np.zeros((*shape, D), np.float32)
    y = run_model(to_model({"mlp": layer}), {"mlp.hidden_states": x})["mlp.output"]
    assert y.shape == x.shape


@pytest.mark.parametrize("build", [gpt_oss, gated])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_token_is_nan_and_touches_no_other(rng, record_property, build, bad):
    record_property("bad_input", "NaN logit / x")
    layer, x = with_router(rng, build(rng)), tokens(rng)
    program = compiled(to_model({"mlp": layer}))
    clean = outputs(program, [x])["mlp.output"]
    x[1, 2, 3] = bad
    y = outputs(program, [x])["mlp.output"]
    assert np.isnan(y[1, 2]).all()
    y[1, 2] = clean[1, 2]
    np.testing.assert_array_equal(y, clean)


def test_round_trips_keep_every_bit(rng):
    layer = with_router(rng, gpt_oss(rng, CLAMPED), selection=True)
    experts = layer.experts.tree()
    odd = np.asarray(experts.down.array).copy()
    odd[0, 0, :5] = [-0.0, np.inf, np.nan, 1e-42, -np.inf]
    odd[0, 1, 0] = np.uint32(0x7FC01234).view(np.float32)
    layer.experts.leaves["down"].set_value(jnp.asarray(odd))
    assert_same_layer(layer, from_model(to_model({"mlp": layer}))["mlp"])


def test_numbers_are_those_of_float32(rng):
    exact = float(np.float32(1.702))
    activation = Activation("swiglu", exact, 1.0, exact, "interleaved")
    layer = with_router(rng, gpt_oss(rng, activation), Router(scale=1 + 1e-12))
    again = from_model(to_model({"mlp": layer}))["mlp"]
    assert again.experts.tree().activation == Activation("swiglu", 1.702, 1.0, 1.702, "interleaved")
    assert again.config.router.scale == 1.0
    for number in (1e39, 1e-60):
        small = gpt_oss(rng, Activation("swiglu", 1.0, 1.0, number, "interleaved"))
        with pytest.raises(FormatError, match="float32"):
            to_model({"mlp": small})


def test_both_lanes_are_told_apart(rng, record_property):
    """The same weights with the other lane as the gate are another layer."""
    record_property("trap", "2")
    even, odd = (gpt_oss(np.random.default_rng(0), lane(first)) for first in (0, 1))
    x, ids = tokens(rng), np.zeros((2, 4, 1), np.int64)
    y = {}
    for name, experts in (("even", even), ("odd", odd)):
        inputs = {"a.hidden_states": x, "a.selected_experts": ids}
        inputs["a.scores"] = np.ones(ids.shape, np.float32)
        y[name] = run_model(to_model({"a": experts}), inputs)["a.output"]
    assert np.abs(y["even"] - y["odd"]).max() > 0.1


def test_the_name_of_the_package_is_not_shadowed():
    import openvino as package

    assert hasattr(package, "Core") and not hasattr(openvino, "Core")
    assert moe_jax.formats.openvino is openvino
