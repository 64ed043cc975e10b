"""Layers of gpt-oss's checkpoints: the shipped one against float64, round trips, refusals."""

import dataclasses
from pathlib import Path

import layer_oracle
import numpy as np
import pytest
from layer_files import DROPLESS, MXFP4
from mxfp4_oracle import decode_mxfp4

from moe_jax import GPT_OSS_ACTIVATION, Activation, MoE, Router, prepare_experts, tag
from moe_jax.formats import FormatError, gpt_oss
from moe_jax.formats.torch import load_tensors
from moe_jax.variables import value

NANO = Path(__file__).parents[2] / "examples/gpt_oss/checkpoints/gpt-oss-nano"


def remade(layer: MoE = MXFP4, **changes) -> MoE:
    fields = {
        "experts": layer.experts.tree(),
        "router_weight": value(layer.router_weight),
        "router_bias": value(layer.router_bias),
        "experts_per_token": 2,
    }
    return MoE(**(fields | changes))


def test_the_shipped_checkpoint_against_float64(rng):
    prefix = "model.layers.3.mlp."
    state = load_tensors(NANO, prefix)
    layer = gpt_oss.import_state(state, experts_per_token=4, prefix=prefix)
    floats = {}
    for field in ("gate_up", "down"):
        name = f"{prefix}experts.{field}_proj"
        weight = decode_mxfp4(state[f"{name}_blocks"], state[f"{name}_scales"])
        floats[field] = tag(weight.astype(np.float32), "expert", "out", "in")
    plain = MoE(
        dataclasses.replace(layer.experts.tree(), **floats),
        value(layer.router_weight),
        value(layer.router_bias),
        experts_per_token=4,
    )
    x = rng.normal(size=(1, 5, 192)).astype(np.float32)
    expected = layer_oracle.evaluate(plain, x)
    np.testing.assert_allclose(
        layer_oracle.ours(layer, x), expected, atol=2e-5 * abs(expected).max()
    )


def test_bits_are_kept():
    state = gpt_oss.export_state(MXFP4, prefix="a.")
    layer = gpt_oss.import_state(state, experts_per_token=2, prefix="a.")
    layer_oracle.assert_same_layer(layer, MXFP4)
    prepared = remade(experts=prepare_experts(MXFP4.experts.tree()))
    again = gpt_oss.export_state(prepared, prefix="a.")
    assert all((again[name] == array).all() for name, array in state.items())


def test_another_limit_is_stated_on_both_sides():
    activation = dataclasses.replace(GPT_OSS_ACTIVATION, limit=0.5)
    layer = remade(experts=dataclasses.replace(MXFP4.experts.tree(), activation=activation))
    with pytest.raises(FormatError, match="activation"):
        gpt_oss.export_state(layer)
    state = gpt_oss.export_state(layer, activation=activation)
    back = gpt_oss.import_state(state, experts_per_token=2, activation=activation)
    layer_oracle.assert_same_layer(back, layer)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda: DROPLESS, "MLP"),
        (lambda: remade(router=Router(score="sigmoid")), "router"),
        (lambda: remade(router_bias=None), "router_bias"),
        (lambda: remade(remaining_weight="input"), "remaining_weight"),
        (
            lambda: remade(
                experts=dataclasses.replace(MXFP4.experts.tree(), activation=Activation("swiglu"))
            ),
            "activation",
        ),
        (
            lambda: remade(
                experts=dataclasses.replace(
                    MXFP4.experts.tree(), down=MXFP4.experts.tree().down.dequantize(np.float32)
                )
            ),
            "down is",
        ),
    ],
)
def test_what_it_cannot_say(layer, expected):
    with pytest.raises(FormatError, match=expected):
        gpt_oss.export_state(layer())


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("router.bias", None, "missing are .'router.bias'"),
        ("extra", np.zeros(3, np.float32), "not known are .'extra'"),
        ("router.bias", np.zeros(4, np.float32), "router_bias must have"),
        ("router.bias", np.zeros((3, 1), np.float32), "router.bias must have the axes"),
        ("experts.down_proj_bias", np.zeros((3, 65), np.float32), "down_bias must have"),
        ("experts.down_proj_scales", np.zeros((3, 64, 2), np.uint8), "scales"),
        ("experts.down_proj_blocks", np.zeros((3, 64, 1, 16), np.int8), "uint8"),
    ],
)
def test_tensors_that_do_not_fit(name, change, expected):
    state = gpt_oss.export_state(MXFP4)
    if change is None:
        del state[name]
    else:
        state[name] = change
    with pytest.raises(FormatError, match=expected):
        gpt_oss.import_state(state, experts_per_token=2)
