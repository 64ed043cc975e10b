"""What all formats have in common: how layers are named in files, and what none leaves out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import layer_oracle
import numpy as np
import pytest
from flax import nnx
from infmoe_files import layer_of

from moe_jax import Activation, MoE, Norm, QuantizedGatedMLP, StaticFP8, tag
from moe_jax.formats import FormatError, infmoe, openvino, torch
from moe_jax.formats.onnx import custom, dense, microsoft
from moe_jax.layer import MoEConfig
from moe_jax.variables import value

E, D, I = 5, 4, 7  # noqa: E741


@dataclasses.dataclass(frozen=True)
class Format:
    """A format's functions, and a layer that it can say."""

    write: Callable[[Any, Any], Any]
    read: Callable[[Any], dict[str, MoE]] | None
    file: str
    layer: Callable[[np.random.Generator], MoE]
    says: tuple[str, ...] = ()


def relu_layer(rng):
    experts = layer_oracle.mlp(rng, E, D, I, Activation("relu"))
    return layer_oracle.moe(rng, experts, E, D, 2)


def silu_layer(rng):
    experts = layer_oracle.gated(rng, E, D, I, Activation("swiglu"), biases=False)
    return layer_oracle.moe(rng, experts, E, D, 2)


def dropless_layer(rng):
    return layer_oracle.gelu_layer(rng, router=torch.DROPLESS.router)


FORMATS = {
    "microsoft": Format(microsoft.write, microsoft.read, "layer.onnx", relu_layer),
    "custom": Format(custom.write, custom.read, "layer.onnx", layer_oracle.gelu_layer),
    "dense": Format(
        dense.write,
        dense.read,
        "layer.onnx",
        relu_layer,
        ("remaining_weight", "router_norm", "router_norm_weight", "bilinear"),
    ),
    "openvino": Format(openvino.write, openvino.read, "layer.xml", silu_layer),
    "torch": Format(
        lambda path, layers: torch.write(path, layers, torch.DROPLESS),
        lambda path: torch.read(path, torch.DROPLESS, experts_per_token=2),
        "layer.safetensors",
        dropless_layer,
    ),
    "infmoe": Format(
        lambda path, layer: infmoe.write_layer(layer, path),
        None,
        "experts.npz",
        lambda rng: layer_of(rng, sizes=(E, D, I)),
        ("router_norm", "router_norm_weight"),
    ),
}
NAMED = [name for name, known in FORMATS.items() if known.read is not None]


@dataclasses.dataclass(frozen=True)
class NewConfig(MoEConfig):
    """A config with an option that no format knows."""

    turbo: int = 0


def with_config(**changes):
    def change(layer):
        layer.config = dataclasses.replace(layer.config, **changes)
        return layer

    return change


def with_new_field(layer):
    layer.config = NewConfig(**vars(layer.config), turbo=1)
    return layer


def with_new_state(layer):
    layer.new_scale = nnx.Param(jnp.ones(D))
    return layer


def with_router_norm_weight(layer):
    return remade(layer, layer.experts.tree(), router_norm_weight=tag(jnp.ones(D), "d"))


def remade(layer, experts, **options):
    known = {"experts_per_token": layer.config.experts_per_token, "router": layer.config.router}
    return MoE(experts, value(layer.router_weight), **known, **options)


def quantized(layer):
    rng, scale = np.random.default_rng(0), tag(jnp.ones(E), "expert")
    experts = layer_oracle.gated(rng, E, D, I, Activation("swiglu"), biases=False)
    return remade(layer, QuantizedGatedMLP(experts, StaticFP8(scale)))


def bilinear(layer):
    rng, plain = np.random.default_rng(0), not layer.experts.tree().activation.gated
    make = layer_oracle.mlp if plain else layer_oracle.gated
    return remade(layer, make(rng, E, D, I, Activation("bilinear"), biases=plain))


def bilinear_t5(layer):
    experts = dataclasses.replace(layer.experts.tree(), activation=Activation("bilinear"))
    return remade(layer, experts)


PARTS = {
    "remaining_weight": (with_config(remaining_weight="input"), "remaining_weight"),
    "router_norm": (with_config(router_norm=Norm("layer")), "router_norm"),
    "router_norm_weight": (with_router_norm_weight, "router_norm"),
    "a later field": (with_new_field, "turbo=1: this format only says 0"),
    "a later array": (with_new_state, "new_scale: this format has no place"),
    "QuantizedGatedMLP": (quantized, "QuantizedGatedMLP"),
    "bilinear": (bilinear, "activation.*bilinear"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_cannot_say_is_refused_and_nothing_is_written(
    name, part, rng, tmp_path, record_property
):
    known, (change, message) = FORMATS[name], PARTS[part]
    if name == "infmoe" and part == "bilinear":
        change = bilinear_t5
    layer, path = change(known.layer(rng)), tmp_path / known.file
    if part in known.says:
        known.write(path, layer)
        return
    with pytest.raises(FormatError, match=message):
        known.write(path, layer)
    assert not list(tmp_path.iterdir())
    record_property("bad_input", "export asked of a thing the target op cannot say")


class Model(nnx.Module):
    """Two layers at paths."""

    def __init__(self, layers):
        self.blocks = nnx.List(layers)
        self.size = nnx.Param(jnp.ones(2))


@pytest.mark.parametrize("name", NAMED)
def test_layers_come_back_by_the_names_they_were_written_under(name, rng, tmp_path):
    known = FORMATS[name]
    first, second = known.layer(rng), known.layer(rng)
    path = tmp_path / known.file
    for written, expected in (
        (first, {"moe": first}),
        ({"a.b": first, "c": second}, {"a.b": first, "c": second}),
        (Model([first, second]), {"blocks.0": first, "blocks.1": second}),
    ):
        known.write(path, written)
        found = known.read(path)
        assert list(found) == list(expected)
        for key, layer in expected.items():
            layer_oracle.assert_same_layer(found[key], layer)


@pytest.mark.parametrize("name", NAMED)
def test_nothing_to_write_is_refused(name, rng, tmp_path):
    known = FORMATS[name]
    path = tmp_path / known.file
    with pytest.raises(FormatError, match="at least one layer"):
        known.write(path, {})
    with pytest.raises(FormatError, match="Linear holds no moe_jax.MoE"):
        known.write(path, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(FormatError, match="needs a name"):
        known.write(path, {"": known.layer(rng)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["microsoft", "custom", "dense"])
def test_constants_beside_a_file_are_the_same(name, rng, tmp_path):
    known = FORMATS[name]
    layer, path = known.layer(rng), tmp_path / known.file
    known.write(path, layer, external_data="layer.bin")
    assert (tmp_path / "layer.bin").stat().st_size > 4 * 2 * E * D * I
    layer_oracle.assert_same_layer(known.read(path)["moe"], layer)


def test_no_layer_of_the_layout_in_a_state_dict(rng, tmp_path):
    path = tmp_path / "layer.safetensors"
    torch.write(path, {"a": dropless_layer(rng)}, torch.DROPLESS)
    with pytest.raises(FormatError, match="no tensor gate.weight, the router of the layout"):
        torch.read(path, torch.MIXTRAL, experts_per_token=2)
    with pytest.raises(ValueError, match="experts_per_token"):
        torch.read(path, torch.DROPLESS, experts_per_token=E + 1)
