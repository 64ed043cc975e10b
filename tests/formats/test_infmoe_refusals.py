"""Files, attributes and layers that InfMoE's format cannot be: each is refused by name."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from core_oracle import f32, random_mxfp4
from infmoe_files import HIDDEN, WIDE, goldens, layer_of, plugin_of, save, weights

import moe_jax
from moe_jax import Activation, MoE, Norm, Router, T5FeedForward
from moe_jax.formats import FormatError, infmoe
from moe_jax.formats.infmoe import DESCRIBED_NORM, KERNEL_NORM
from moe_jax.variables import value


def without(*keys):
    return lambda arrays: {k: a for k, a in arrays.items() if k not in keys}


def having(**changed):
    return lambda arrays: {**arrays, **{k.replace("__", "/"): a for k, a in changed.items()}}


ZEROS = np.zeros((WIDE, HIDDEN), np.float32)
CHANGES = {
    "missing": (without("3/wo_weight"), "missing 3/wo_weight; unexpected none"),
    "missing_expert": (
        without(*(k for k in weights() if k.startswith("4/"))),
        "need: missing 4/layer_norm_weight, 4/wi_0_weight, 4/wi_1_weight, 4/wo_weight; unexpected",
    ),
    "extra": (having(**{"0__wi_2_weight": ZEROS}), "missing none; unexpected 0/wi_2_weight"),
    "extra_expert": (having(**{"5__wi_0_weight": ZEROS}), "unexpected 5/wi_0_weight"),
    "many": (
        lambda arrays: {},
        "missing 0/layer_norm_weight, .*, 2/wo_weight, ...; unexpected none",
    ),
    "bias_of_some": (
        having(**{"1__layer_norm_bias": np.zeros(HIDDEN, np.float32)}),
        "missing 0/layer_norm_bias, 2/layer_norm_bias, 3/layer_norm_bias, 4/layer_norm_bias",
    ),
    "transposed": (
        having(**{"2__wi_0_weight": ZEROS.T}),
        r"2/wi_0_weight in .* must be a float32 array of shape \(9, 6\), got float32 .* \(6, 9\)",
    ),
    "float64": (
        having(**{"2__wi_0_weight": ZEROS.astype(np.float64)}),
        "2/wi_0_weight in .* must be a float32 array .* got float64",
    ),
    "big_endian": (having(**{"2__wi_0_weight": ZEROS.astype(">f4")}), "got >f4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weight_files_that_do_not_fit(tmp_path, name, record_property):
    change, message = CHANGES[name]
    path = save(tmp_path, change(weights()))
    with pytest.raises(FormatError, match=message):
        infmoe.read_layer(plugin_of(path), norm=DESCRIBED_NORM)
    record_property("bad_input", f"InfMoE npz: {name}")


def test_a_file_for_identity_holds_nothing(tmp_path):
    plugin = plugin_of(save(tmp_path, weights()), expert_sublayer_type="Identity")
    with pytest.raises(FormatError, match="experts of type Identity need: missing none"):
        infmoe.read_layer(plugin, norm=KERNEL_NORM)


def test_nothing_is_unpickled(tmp_path, record_property):
    path = save(tmp_path, {**weights(), "0/wi_0_weight": np.array([print], object)})
    with pytest.raises(FormatError, match="is not an npz file of plain arrays: Object arrays"):
        infmoe.read_layer(plugin_of(path), norm=DESCRIBED_NORM)
    record_property("bad_input", "InfMoE npz: pickled object")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "changed", "single_array"])
def test_damaged_files(tmp_path, damage, record_property):
    path = tmp_path / "experts.npz"
    whole = Path(save(tmp_path, weights())).read_bytes()
    place = whole.index(np.asarray(weights()["1/wo_weight"]).tobytes())
    changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    contents = {
        "empty": b"", "text": b"0/wi_0_weight", "cut": whole[: len(whole) // 2],
        "changed": changed,
    }  # fmt: skip
    if damage == "single_array":
        with open(path, "wb") as file:
            np.save(file, ZEROS)
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(FormatError, match="is not an npz file of plain|holds a single array"):
        infmoe.read_layer(plugin_of(str(path)), norm=DESCRIBED_NORM)
    record_property("bad_input", f"InfMoE npz: {damage}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        infmoe.read_layer(plugin_of(str(tmp_path / "none.npz")), norm=DESCRIBED_NORM)


def nan_at(array, *index):
    array = array.copy()
    array[index] = np.nan
    return array


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"expert_count": 0}, "expert_count must be a positive int, got 0"),
        ({"hidden_size": -1}, "hidden_size must be a positive int, got -1"),
        ({"embedding_size": 6.0}, "embedding_size must be a positive int, got 6.0"),
        ({"max_concurrency": True}, "max_concurrency must be a positive int, got True"),
        ({"moe_variant": "cpm2"}, r"moe_variant must be one of \('default', .* got 'cpm2'"),
        (
            {"moe_variant": "cpm_2", "layernorm_weight": None},
            "layernorm_weight belongs to moe_variant 'cpm_2' .* got 'cpm_2' without it",
        ),
        (
            {"layernorm_weight": np.ones(HIDDEN, np.float32)},
            "layernorm_weight belongs to moe_variant 'cpm_2' .* got 'default' with it",
        ),
        (
            {"expert_centroids": goldens()["centroids"].T},
            r"expert_centroids must be a float32 array of shape \(5, 6\), got .* \(6, 5\)",
        ),
        (
            {"expert_centroids": goldens()["centroids"].astype(np.float64)},
            "expert_centroids must be a float32 array .* got float64",
        ),
        ({"expert_centroids": [[0.0]]}, "expert_centroids must be a float32 array .* got list"),
        (
            {"expert_centroids": nan_at(goldens()["centroids"], 2, 3)},
            r"expert_centroids holds NaN at \[2, 3\]",
        ),
        (
            {
                "moe_variant": "cpm_2",
                "layernorm_weight": nan_at(goldens()["router_norm_weight"], 1),
            },
            r"layernorm_weight holds NaN at \[1\]",
        ),
    ],
)
def test_attributes_that_do_not_fit(attributes, message, record_property):
    with pytest.raises(FormatError, match=message):
        plugin_of("experts.npz", **attributes)
    record_property("bad_input", f"InfMoE attribute: {', '.join(attributes)}")


def test_sublayers_and_norms_that_are_unknown(tmp_path):
    path = save(tmp_path, weights())
    with pytest.raises(FormatError, match=r"one of \('T5_FF', 'Identity'\), got 'T5'"):
        infmoe.read_layer(plugin_of(path, expert_sublayer_type="T5"), norm=KERNEL_NORM)
    for norm in (Norm("rms", 1e-5), "rms", None):
        with pytest.raises(FormatError, match=r"norm must be Norm\(kind='rms', eps=1e-06\)"):
            infmoe.read_layer(plugin_of(path), norm=norm)
    with pytest.raises(TypeError, match="norm"):
        infmoe.read_layer(plugin_of(path))


def remade(layer, **options):
    """The layer with other options."""
    known = {"experts_per_token": 1, "router": layer.config.router}
    experts = options.pop("experts", layer.experts.tree())
    return MoE(experts, value(layer.router_weight), **{**known, **options})


def replaced(**fields):
    return lambda layer: remade(layer, experts=dataclasses.replace(layer.experts.tree(), **fields))


VECTOR = f32(np.ones(4), "expert")
LAYERS = {
    "activation": (
        replaced(activation=Activation("geglu")),
        r"Activation\('geglu_tanh'\) and no other, got activation=Activation\(kind='geglu'",
    ),
    "limit": (replaced(activation=Activation("geglu_tanh", limit=7.0)), "got activation=.*limit=7"),
    "eps": (replaced(norm=Norm("rms", 1e-5)), "the norm of the experts must be .* eps=1e-05"),
    "wi_1 dtype": (
        lambda layer: remade(
            layer,
            experts=dataclasses.replace(
                layer.experts.tree(), wi_1=layer.experts.tree().wi_1.astype("bfloat16")
            ),
        ),
        "wi_1 is bfloat16: expected float32, cast it",
    ),
    "norm_weight axes": (
        replaced(norm_weight=f32(np.ones((4, 3)), "expert", "in")),
        r"norm_weight must have the axes {expert, d}, got {expert=4, in=3}",
    ),
    "wo shape": (
        replaced(wo=f32(np.ones((4, 3, 8)), "expert", "out", "in")),
        r"wo_weight must be a float32 array of shape \(4, 3, 7\), got .* \(4, 3, 8\)",
    ),
    "router_bias": (
        lambda layer: remade(layer, router_bias=VECTOR),
        "router_bias: this format has no place",
    ),
    "selection_bias": (
        lambda layer: remade(layer, selection_bias=VECTOR),
        "selection_bias: this format has no place",
    ),
    "experts_per_token": (
        lambda layer: remade(layer, experts_per_token=2),
        "InfMoE has experts_per_token=1, got 2",
    ),
    "tokens_per_expert_ratio": (
        lambda layer: remade(layer, tokens_per_expert_ratio=1.5),
        "tokens_per_expert_ratio=1.5",
    ),
    "router": (
        lambda layer: remade(layer, router=Router("sigmoid", "before_top_k")),
        r"no moe_variant with router=Router\(score='sigmoid', order='before_top_k'",
    ),
    "remaining_weight": (
        lambda layer: remade(layer, remaining_weight="input"),
        "no moe_variant with .* remaining_weight='input' and no router_norm_weight",
    ),
    "router_norm eps": (
        lambda layer: remade(
            layer, router_norm_weight=f32(np.ones(3), "d"), router_norm=Norm("rms", 0.1)
        ),
        "router_norm must be Norm",
    ),
    "two norms": (
        lambda layer: remade(
            layer, router_norm_weight=f32(np.ones(3), "d"), router_norm=KERNEL_NORM
        ),
        "one norm throughout: router_norm is .*'layer'.* that of the experts .*'rms'",
    ),
    "experts": (
        lambda layer: remade(layer, experts=moe_jax.GatedMLP.random(jax.random.key(0), 4, 3, 7)),
        "no expert_sublayer_type for experts of the class GatedMLP, only for T5FeedForward, Ident",
    ),
    "centroids NaN": (
        lambda layer: MoE(
            layer.experts.tree(), f32(np.full((4, 3), np.nan), "expert", "d"), experts_per_token=1
        ),
        r"expert_centroids holds NaN at \[0, 0\]",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_infmoe_cannot_say(tmp_path, rng, name, record_property):
    change, message = LAYERS[name]
    path = tmp_path / "experts.npz"
    with pytest.raises(FormatError, match=message):
        infmoe.write_layer(change(layer_of(rng)), path)
    assert not path.exists()
    record_property("bad_input", f"InfMoE cannot say: {name}")


def test_packed_weights_are_refused(tmp_path, rng):
    packed, _ = random_mxfp4(rng, 2, 32, 1)
    experts = T5FeedForward(f32(np.ones((2, 32)), "expert", "d"), packed, packed, packed)
    layer = MoE(experts, f32(np.ones((2, 32)), "expert", "d"), experts_per_token=1)
    with pytest.raises(FormatError, match="wi_0 is BlockScaled.*dequantize"):
        infmoe.write_layer(layer, tmp_path / "experts.npz")
