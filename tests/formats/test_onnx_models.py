"""The MoE layers of a Flax model: found by path, written into one file, and read back."""

import dataclasses

import jax
import jax.numpy as jnp
import layer_oracle
import numpy as np
import onnxruntime_tools
import pytest
from flax import nnx

from moe_jax import Activation, MoE, Router
from moe_jax.formats import FormatError
from moe_jax.formats.modules import load_layers, moe_layers
from moe_jax.formats.onnx import custom, dense
from moe_jax.variables import value

PATHS = ["blocks.0.mlp", "blocks.1.mlp", "last"]


class Block(nnx.Module):
    def __init__(self, mlp: MoE) -> None:
        self.norm = nnx.Param(jnp.ones(4))
        self.mlp = mlp


class Model(nnx.Module):
    """Two blocks of four numbers a token and a last layer of six."""

    def __init__(self, rng: np.random.Generator, **options) -> None:
        make = layer_oracle.gelu_layer
        self.blocks = nnx.List([Block(make(rng, **options)), Block(make(rng, k=1))])
        self.last = make(rng, experts=3, hidden=6)


FORMATS = {
    "custom": (
        lambda layers: custom.to_model(layers, functions=[custom.custom_moe_function()]),
        custom.read,
    ),
    "dense": (dense.to_model, dense.read),
}


@pytest.mark.parametrize("name", FORMATS)
def test_x1_x2_all_layers_of_a_model_go_into_one_file(name, rng, record_property):
    write, read = FORMATS[name]
    model = Model(rng)
    layers = moe_layers(model)
    assert list(layers) == PATHS
    file = write(layers)
    session = onnxruntime_tools.session(file)
    inputs = {
        # a count of tokens for each layer: their axes are not shared
        f"{path}.x": rng.normal(size=(2, tokens, 6 if path == "last" else 4)).astype(np.float32)
        for path, tokens in zip(PATHS, (3, 5, 1), strict=True)
    }
    outputs = session.run([f"{path}.y" for path in PATHS], inputs)
    error = 0.0
    for path, y in zip(PATHS, outputs, strict=True):
        expected = layer_oracle.evaluate(layers[path], inputs[f"{path}.x"])
        error = max(error, float(abs(y - expected).max() / max(1, abs(expected).max())))
    assert error < 1e-6
    other = Model(np.random.default_rng(1))
    load_layers(other, read(file))
    for path, layer in moe_layers(other).items():
        layer_oracle.assert_same_layer(layer, layers[path])
    record_property("row", {"custom": "X1", "dense": "X2"}[name])
    record_property("error", error)
    record_property("with", f"{onnxruntime_tools.VERSION}, layers of a model")


def test_a_layer_that_lies_twice_is_found_once(rng):
    model = Model(rng)
    model.blocks[1].mlp = model.blocks[0].mlp
    assert list(moe_layers(model)) == ["blocks.0.mlp", "last"]
    assert list(moe_layers(model.last)) == ["moe"]
    with pytest.raises(ValueError, match="Linear holds no moe_jax.MoE"):
        moe_layers(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_the_models_own_order_of_axes_and_algorithm_stay(rng):
    layer = layer_oracle.gelu_layer(rng)
    experts = layer.experts.tree()
    turned = dataclasses.replace(experts, up=experts.up.order("in", "expert", "out"))
    own = MoE(
        jax.tree.map(jnp.zeros_like, turned),
        value(layer.router_weight).order("d", "expert"),
        experts_per_token=2,
        algorithm="dense",
    )
    load_layers(own, {"moe": layer})
    assert own.config.algorithm == "dense"
    assert own.router_weight.shape == (4, 5)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        layer_oracle.ours(own, x), layer_oracle.evaluate(layer, x), atol=1e-5
    )


def test_only_layers_by_name_are_written(rng):
    with pytest.raises(TypeError, match="moe_layers"):
        dense.to_model({"a": Model(rng)})
    with pytest.raises(ValueError, match="at least one"):
        custom.to_model({})


def other_layers(rng, **options) -> dict[str, MoE]:
    return moe_layers(Model(rng, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "'blocks.0.mlp': experts_per_token is 2"),
        ({"router": Router(scale=2.0)}, "router is"),
        ({"experts": 7}, "the model has .*'expert': 5.*not .*'expert': 7"),
        ({"dtype": jnp.float16}, "float32.*not.*float16"),
    ],
)
def test_layers_of_another_kind_are_refused_and_nothing_changes(options, message, rng):
    model = Model(rng)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(FormatError, match=message):
        load_layers(model, other_layers(rng, **options))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_other_paths_and_experts_are_refused(rng):
    model, layers = Model(rng), other_layers(rng)
    with pytest.raises(FormatError, match="got layers for"):
        load_layers(model, {"last": layers["last"]})
    gated = layer_oracle.gated(rng, 3, 6, 7, Activation("swiglu"))
    layers["last"] = layer_oracle.moe(rng, gated, 3, 6, 2)
    with pytest.raises(FormatError, match="'last': the experts are .*MLP.*not .*GatedMLP"):
        load_layers(model, layers)
