"""Numbers at the ends of their types, in ONNX: written so that they are computed, or refused."""

import dataclasses

import jax.numpy as jnp
import layer_oracle
import microsoft_oracle
import numpy as np
import onnxruntime_tools
import pytest

from moe_jax import Activation, Router, tag
from moe_jax.formats import FormatError
from moe_jax.formats.onnx import custom, dense, microsoft
from moe_jax.variables import value

SIGMOID = Router("sigmoid", order="before_top_k", renormalize=True)


@pytest.mark.parametrize("bias", [-10.0, -16.0, -40.0])
def test_r7_small_sigmoids_match_onnxruntime(rng, bias, record_property):
    """They differ by more than what they are from those of onnxruntime's Sigmoid."""
    biases = tag(jnp.full(5, bias, jnp.float32), "expert")
    layer = layer_oracle.gelu_layer(rng, router=SIGMOID, router_bias=biases)
    x = rng.normal(size=(1, 7, 4)).astype(np.float32)
    found = onnxruntime_tools.run(dense.to_model(layer), {"x": x})
    expected = layer_oracle.evaluate(layer, x)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    record_property("row", "R7")
    record_property("error", error)
    record_property("with", f"{onnxruntime_tools.VERSION}, dense graph")
    assert error < 4e-6


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("module", [dense, custom, microsoft])
def test_routers_that_are_not_finite_are_refused(rng, module, number, record_property):
    record_property("bad_input", "export of what the target cannot say")
    layer = layer_oracle.gelu_layer(rng)
    if module is microsoft:
        layer = microsoft_oracle.random_layer(rng, activation=Activation("relu")).ours
    weight = value(layer.router_weight)
    layer.router_weight.set_value(weight.array.at[1, 2].set(number))
    with pytest.raises(FormatError, match="router_weight .* finite"):
        module.to_model(layer)


@pytest.mark.parametrize("field", ["up", "down_bias", "beta"])
def test_numbers_beyond_float16_are_refused(rng, field, record_property):
    record_property("bad_input", "export of what the target cannot say")
    experts = layer_oracle.mlp(rng, 5, 4, 7, Activation("swiglu"))
    if field == "beta":
        experts = dataclasses.replace(experts, activation=Activation("swiglu", beta=1e5))
    else:
        large = getattr(experts, field).map(lambda a: a.at[0, 1].set(1e5))
        experts = dataclasses.replace(experts, **{field: large})
    layer = layer_oracle.moe(rng, experts, 5, 4, 2)
    dense.to_model(layer)
    with pytest.raises(FormatError, match="holds numbers beyond float16"):
        dense.to_model(layer, dtype="float16")


def test_mxfp4_beside_other_integers_comes_back_as_integers(rng):
    """A file says of all weights of a node whether they were MXFP4."""
    layers = [
        microsoft_oracle.random_layer(
            rng, activation=Activation("relu"), sizes=(4, 32, 64), make=make
        ).ours
        for make in (
            microsoft_oracle.mxfp4_weight,
            lambda rng, shape: microsoft_oracle.integer_weight(rng, shape, bits=8, group_size=32),
        )
    ]
    first, second = (layer.experts.tree() for layer in layers)
    mixed = layer_oracle.moe(rng, dataclasses.replace(first, down=second.down), 4, 32, 2)
    back = microsoft.read(microsoft.to_model(mixed))["moe"].experts.tree()
    for name in ("up", "down"):
        one, other = (
            np.asarray(getattr(e, name).dequantize(jnp.float32).array)
            for e in (back, mixed.experts.tree())
        )
        np.testing.assert_array_equal(one, other)
